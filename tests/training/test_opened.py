"""An opened run is the run in memory; only the schema knows which kind of source a run has."""

import ast
from pathlib import Path

import pytest
import torch

import ablations
import twinrl
from tests.ablations.tiny import without_figures
from tests.fake_source import FakeSource, register, small
from twinrl.config.errors import InputError
from twinrl.run import names
from twinrl.sampling import few_step
from twinrl.training.opened import OpenedRun, open_run
from twinrl.training.runs import RunDirectory
from twinrl.training.trainer import Trainer


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """At the end of a run of three steps."""
    register(monkeypatch)
    without_figures(monkeypatch)
    settings = small(tmp_path, "train.steps=3")
    run = RunDirectory(settings.directory)
    run.start(settings, fresh=False)
    made = Trainer(settings, run, FakeSource(), torch.device("cpu"), lambda network, step: {names.VAL_QUALITY: 0.0})
    made.train()
    return made


def test_opened_from_disk_or_from_memory(trainer: Trainer, tmp_path: Path) -> None:
    best = trainer.objective.teacher.best
    opened = open_run(trainer.run.path)
    trained = OpenedRun.trained(trainer.run, trainer.provider, best, tmp_path / "judged")
    asked = ["a dark picture"], 3, few_step(1), 5
    ((prompt, ours),), ((_, theirs),) = opened.sample(*asked), trained.sample(*asked)
    assert (prompt, ours.shape) == ("a dark picture", (3, 3, 4, 4))
    assert torch.equal(ours, theirs)
    assert len(opened.sample([], 2, few_step(1), 0)) == len(FakeSource().classes)
    assert opened.folder == trainer.run.path / "evaluation"
    table, grid = trained.judge()
    assert grid.parent == tmp_path / "judged"
    assert table.as_dict()["rows"][0]["name"] == "student"


def test_what_a_run_has_not_is_one_line(trainer: Trainer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint of step 7; expected one of 3"):
        _ = open_run(trainer.run.path, step=7).network
    with pytest.raises(InputError, match="no diffusers pipeline to export"):
        open_run(trainer.run.path).export(tmp_path / "out")
    with pytest.raises(InputError, match="is not a run directory"):
        open_run(tmp_path)


@pytest.mark.slow
def test_only_the_schema_asks_for_the_family() -> None:
    """Whoever needs what a family has asks the provider."""
    asking = []
    for package in (twinrl, ablations):
        root = Path(str(package.__file__)).parent
        for path in root.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr == "family":
                    of = node.value
                    if (of.attr if isinstance(of, ast.Attribute) else getattr(of, "id", "")) == "model":
                        asking.append(path.name)
    assert set(asking) == {"schema.py"}
