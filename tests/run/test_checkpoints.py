"""Checkpoints: all or nothing, few kept, and every way to be wrong is one line that names the file."""

import itertools
import json
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.disk import another_user, open_folder
from tests.states import STATE
from twinrl.config.components import ComponentError
from twinrl.config.errors import InputError
from twinrl.machine import files
from twinrl.machine import tensors as safetensors
from twinrl.run import checkpoints, fit, layout
from twinrl.run.checkpoints import Checkpoint, SaveError


def made(value: float = 1.0, **state: object) -> Checkpoint:
    tensors = {
        "student": {"weight": torch.full((3, 2), value), "steps": torch.tensor(7)},
        "optimizer": {"0.step": torch.tensor(value), "0.exp_avg": torch.arange(6.0).view(3, 2)},
    }
    return Checkpoint(tensors, {**STATE, "parts": sorted(tensors), **state})


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in layout.available(folder)]


def refused(path: Path, *words: str) -> str:
    """Loading ``path`` is an input error of one line that has all ``words``."""
    with pytest.raises(InputError) as error:
        checkpoints.load(path)
    message = str(error.value)
    assert "\n" not in message
    assert [word for word in (*words, "fix: ") if word not in message] == []
    return message


def test_round_trip_is_exact(tmp_path: Path) -> None:
    original = made(1 / 3, step=4, config={"a": {"b": [1, None, "x"]}}, teacher_decay=0.1 + 0.2)
    loaded = checkpoints.load(checkpoints.save(tmp_path, 4, original, keep=2))
    assert {k: v for k, v in loaded.state.items() if k != "format"} == original.state
    for part, tensors in original.tensors.items():
        assert set(loaded.tensors[part]) == set(tensors)
        for name, value in tensors.items():
            assert torch.equal(loaded.tensors[part][name], value)
            assert loaded.tensors[part][name].dtype == value.dtype


def test_nothing_inside_is_a_pickle(tmp_path: Path) -> None:
    files = sorted(checkpoints.save(tmp_path, 1, made(), keep=1).iterdir())
    assert [f.name for f in files] == ["optimizer.safetensors", "state.json", "student.safetensors"]
    for file in files:
        assert not zipfile.is_zipfile(file)  # what torch.save writes
        with pytest.raises((ValueError, IndexError)):
            list(pickletools.genops(file.read_bytes()))
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                assert list(tensors.keys())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        checkpoints.save(tmp_path, step, made(), keep=2)
    assert steps(tmp_path) == [15, 20]
    assert layout.newest(tmp_path).name == "step-00000020"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_no_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert layout.newest(tmp_path / "absent") is None
    (tmp_path / "step-notes.txt").write_text("mine")
    assert layout.newest(tmp_path) is None


FAILURES = [(safetensors, "save_file", n, step) for n in (0, 1) for step in (10, 15)]
FAILURES += [(files, "_sync", 0, 10), (files, "_sync", 0, 15)]
FAILURES += [(Path, "rename", 0, 10), (Path, "replace", 0, 10), (Path, "replace", 0, 15)]


@pytest.mark.parametrize(("where", "what", "nth", "step"), FAILURES)
def test_an_exception_during_a_save_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: object, what: str, nth: int, step: int
) -> None:
    """Also where the same step is saved anew: its old checkpoint stays whole."""
    for old in (5, 10):
        checkpoints.save(tmp_path, old, made(float(old)), keep=2)
    real, calls = getattr(where, what), itertools.count()

    def full(*arguments: object) -> object:
        if next(calls) == nth:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(where, what, full)
    with pytest.raises(SaveError, match="No space"):
        checkpoints.save(tmp_path, step, made(99.0), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000010"]
    for old in (5, 10):
        loaded = checkpoints.load(tmp_path / layout.of_step(old))
        assert loaded.tensors["student"]["weight"].unique().tolist() == [old]


@pytest.mark.parametrize("step", [9, 10])
def test_what_a_killed_process_left_is_no_checkpoint_and_goes_away(tmp_path: Path, step: int) -> None:
    """Also where no later save is of the same step."""
    half = tmp_path / f".{layout.of_step(step)}.new"
    half.mkdir()
    (half / "student.safetensors").write_bytes(b"half")
    assert layout.newest(tmp_path) is None
    checkpoints.save(tmp_path, 10, made(), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        path = checkpoints.save(tmp_path, 3, made(value), keep=2)
    assert checkpoints.load(path).tensors["student"]["weight"].unique().tolist() == [2]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


# --- what is not one of ours ---------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path, 5, made(), keep=1)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_tensors(saved: Path, keep: int) -> None:
    file = saved / "student.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(saved, str(file), "corrupted")


@pytest.mark.parametrize("name", ["student.safetensors", "state.json", ""])
def test_what_may_not_be_read_is_not_called_corrupted(name: str) -> None:
    with open_folder() as folder:
        path = checkpoints.save(folder, 5, made(), keep=1)
        (path / name).chmod(0)
        with another_user(), pytest.raises(PermissionError, match=re.escape(str(path / name))):
            checkpoints.load(path)
        (path / name).chmod(0o755)


def test_a_folder_that_may_not_be_read_is_not_without_checkpoints() -> None:
    with open_folder() as folder:
        checkpoints.save(folder / "checkpoints", 5, made(), keep=1)
        (folder / "checkpoints").chmod(0o311)
        with another_user(), pytest.raises(PermissionError):
            layout.newest(folder / "checkpoints")


def test_missing_part(saved: Path) -> None:
    (saved / "optimizer.safetensors").unlink()
    refused(saved, str(saved), "optimizer.safetensors is missing")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{", "state.json"),
        ("", "state.json"),
        ("[1]", "valid dictionary"),
        ("null", "valid dictionary"),
        ("\x00\x01", "state.json"),
        (json.dumps({"format": 1, **STATE}), "format"),
        (json.dumps(STATE), "format"),
        ('{"format": 2, "step": 3, "parts": []}', "iteration"),
        *(
            (json.dumps({"format": 2, **STATE, key: value}), key)
            for key, value in {
                "step": -4, "iteration": 1.5, "log_offset": "0", "teacher_decay": 2, "lr_policy": [1],
                "parts": ["../x"], "more": 1,
            }.items()
        ),
    ],
)  # fmt: skip
def test_state_of_something_else(saved: Path, content: str, word: str) -> None:
    (saved / "state.json").write_text(content)
    refused(saved, str(saved / "state.json"), word)


@pytest.mark.parametrize(("folder", "step", "length"), [(4, 7, 8), (4, 9, 8), (9, 9, 8)])
def test_a_checkpoint_of_another_step_is_refused(folder: int, step: int, length: int) -> None:
    with pytest.raises(InputError, match=rf"state\.json is corrupted.*step {step} in the folder step-0000000{folder}"):
        checkpoints.check_place(Path(layout.of_step(folder)), {"step": step}, length)


def test_state_that_is_no_text(saved: Path) -> None:
    (saved / "state.json").write_bytes(b"\xff\xfe\x80")
    refused(saved, str(saved / "state.json"))


def test_missing_state(saved: Path) -> None:
    (saved / "state.json").unlink()
    refused(saved, str(saved / "state.json"))


def test_asking_for_a_part_that_was_not_saved(saved: Path) -> None:
    with pytest.raises(InputError, match=r"no part ema; got parts optimizer, student; fix"):
        checkpoints.load(saved).part("ema")


def test_judged_weights_are_the_ema_where_there_is_one(saved: Path) -> None:
    loaded = checkpoints.load(saved)
    assert loaded.judged is loaded.tensors["student"]
    both = Checkpoint({**loaded.tensors, "ema": {"weight": torch.zeros(1)}}, loaded.state)
    assert both.judged is both.tensors["ema"]


def test_state_json_is_strict_json(saved: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((saved / "state.json").read_text(), parse_constant=refuse)


def test_an_own_optimizer_that_keeps_text() -> None:
    class Chatty(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            self.state[self.param_groups[0]["params"][0]]["said"] = "text"

    optimizer = Chatty([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    optimizer.step()
    with pytest.raises(ComponentError, match=r"Chatty keeps what no checkpoint takes; got str 'text' as 0\.said"):
        fit.optimizer_tensors(optimizer)
