"""A run from Python: trained, looked at, judged; it is what the commands make."""

from pathlib import Path

import pytest
import yaml

import twinrl
from tests import pages
from tests.ablations.tiny import without_figures
from tests.fake_source import SMALL, register
from twinrl.config.errors import InputError
from twinrl.run import layout, names

SETTINGS = {key: yaml.safe_load(value) for key, _, value in (line.partition("=") for line in SMALL)}


@pytest.mark.slow
def test_train_look_and_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    without_figures(monkeypatch)
    run = twinrl.train("twinflow", SETTINGS | {"run.dir": str(tmp_path), "train.steps": 4}, seed=1)
    assert run.status == "finished"
    assert run.config["seed"] == 1
    assert list(run.log["step"]) == [1, 2, 3, 4]
    assert run.log[names.LOSS_TOTAL].notna().all()
    assert [event.as_dict() for event in run.events] == layout.read_events(run.path)
    prompt = run.opened.provider.example_prompts(0)[0]
    picture, again = run.sample(prompt, nfe=2), twinrl.load(run.path).samples(prompt, n=2, nfe=2)
    assert picture.size == (4, 4)
    assert (len(again), again[0].tobytes()) == (2, picture.tobytes())
    judged = run.evaluate()
    assert (run.path / layout.EVALUATION / layout.TABLE).is_file()
    assert judged.table.as_dict()["rows"][0]["name"] == "student"
    with pytest.raises(InputError, match="this run exists"):
        twinrl.train("twinflow", SETTINGS | {"run.dir": str(tmp_path), "train.steps": 4}, seed=1)


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run directory"):
        twinrl.load(tmp_path)
    with pytest.raises(InputError, match=r"train\.step.*did you mean steps"):
        twinrl.train("lab", {"train.step": 5})


def test_what_is_offered_is_listed_and_nothing_else() -> None:
    offered = {"train", "load", "watch", "Run", "Watch", "Stopped"}
    assert offered <= set(dir(twinrl))
    assert all(callable(getattr(twinrl, name)) for name in offered)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = twinrl.trian


def test_the_page_names_what_there_is() -> None:
    shown = pages.page("python")
    for name in ("twinrl.train", "twinrl.load", "twinrl.study", "run.log", "run.events", "run.sample", "run.evaluate"):
        assert name in shown
