"""A term's own network in training: its steps, its checkpoint, the same numbers however a batch is cut."""

from pathlib import Path

import pytest
import torch

from tests.fake_source import register, small
from tests.training.trainers import assert_same, finish, kill, make, rows
from twinrl.config.errors import InputError
from twinrl.run import checkpoints
from twinrl.training.schema import RunConfig

DROPPING = "model.network={kind: dropping}"


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def dmd(runs: Path, *overrides: str) -> RunConfig:
    return small(runs, *overrides, preset="dmd2")


def test_the_own_network_starts_as_the_student_and_takes_its_steps(tmp_path: Path) -> None:
    settings = dmd(tmp_path, "terms.dmd={updates: 3, own_lr: 1.0e-4}")
    trainer = make(settings)
    (owned,) = trainer.owned
    own, student = owned.network.state_dict(), trainer.objective.teacher.student.state_dict()
    assert all(torch.equal(own[name], student[name]) for name in student)
    assert [group["lr"] for group in owned.optimizer.param_groups] == [1e-4]
    before = {name: value.clone() for name, value in own.items()}
    row = trainer.train_step().row
    assert {float(kept["step"]) for kept in owned.optimizer.state.values()} == {3.0}
    assert any(not torch.equal(owned.network.state_dict()[name], before[name]) for name in before)
    assert row["own/dmd/loss"] > 0
    assert row["own/dmd/norm"] > 0
    assert all(parameter.grad is None for parameter in owned.network.parameters())


@pytest.mark.parametrize("more", [(), (DROPPING, "train.micro_batch=7"), ("train.precision=bf16",)])
def test_resume_equals_an_undisturbed_run(tmp_path: Path, more: tuple[str, ...]) -> None:
    undisturbed = finish(dmd(tmp_path / "a", *more))
    settings = dmd(tmp_path / "b", *more)
    for step in (3, 8, 11):
        kill(settings, step)
    resumed = finish(settings)
    assert_same(resumed, undisturbed)
    stored = checkpoints.load(resumed.run.newest_checkpoint())  # type: ignore[arg-type]
    assert {"own_dmd", "optimizer_dmd"} <= set(stored.tensors)


def test_micro_batches_change_no_number_beyond_rounding(tmp_path: Path) -> None:
    """At the first step of each network; later ones go on from what Adam has made of the last bits."""
    once = ("train.steps=1", "terms.dmd.updates=1")
    whole, parts = (finish(dmd(tmp_path / n, *once, f"train.micro_batch={n}")) for n in ("16", "5"))
    keys = ("own/dmd/loss", "own/dmd/norm")
    assert [rows(parts)[0][k] for k in keys] == pytest.approx([rows(whole)[0][k] for k in keys], rel=1e-4)


def test_the_own_network_disturbs_no_other_draw(tmp_path: Path) -> None:
    """A term of weight zero beside `lab`'s: its network learns, and the run's losses stay."""
    plain = finish(small(tmp_path / "a", DROPPING, "branches={e2e: 1, any: 1, adv: 1}", "teacher.kind=frozen"))
    beside = finish(small(tmp_path / "b", DROPPING, "branches={e2e: 1, any: 1, adv: 1}", "teacher.kind=frozen",
                          "terms.dmd={branches: [e2e], weight: 0}"))  # fmt: skip
    shared = [key for key in rows(plain)[0] if key.startswith("loss/")]
    assert [[row[k] for k in shared] for row in rows(plain)] == [[row[k] for k in shared] for row in rows(beside)]


def test_a_checkpoint_without_the_own_network_is_refused(tmp_path: Path) -> None:
    settings = dmd(tmp_path)
    kill(settings, 8)
    newest = make(settings).run.newest_checkpoint()
    assert newest is not None
    (newest / "own_dmd.safetensors").unlink()
    with pytest.raises(InputError, match="own_dmd"):
        make(settings)
