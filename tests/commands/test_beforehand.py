"""What a run needs of the disk is found out before anything is loaded."""

from pathlib import Path

import pytest

from twinrl.commands import beforehand, processes
from twinrl.config.errors import InputError
from twinrl.training import schema


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(processes.process, "train", lambda *arguments: 0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.dir=file", "the run directory file/.* cannot be written; got Not a directory; fix: set run.dir"),
        ("run.dir=/proc/x", "the run directory /proc/x/.* cannot be written"),
        ("train.init=nothing", "train.init is 'nothing'; expected teacher, random, or the directory of a run"),
        ("judges={far: {kind: pickscore, checkpoint: no/clip}}", "judges.far.checkpoint is not there; got no/clip"),
        ("judges={far: {kind: ensemble, rewards: {a: {reward: {kind: hpsv2, checkpoint: no.pt}}}}}", "no.pt"),
    ],
)
def test_what_is_not_there_is_refused_before_data_are_loaded(override: str, words: str) -> None:
    settings = schema.load("lab", [override])
    with pytest.raises(InputError, match=words):
        processes.train(settings, False, None)  # type: ignore[arg-type]
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_what_is_there_passes() -> None:
    processes.train(schema.load("lab", ["judges={near: {kind: hpsv2, checkpoint: file}}"]), False, None)  # type: ignore[arg-type]
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_paths_are_found_in_all_that_settings_hold() -> None:
    held = {"a": [{"b": Path("x")}, 1], "c": (Path("y"),), "d": "z"}
    assert dict(beforehand.paths(held, "k")) == {"k.a.0.b": Path("x"), "k.c.0": Path("y")}
