"""Trainers on a small source, killed and resumed."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import logs
from tests.fake_source import FakeSource
from twinrl.run import checkpoints, fit, names
from twinrl.training import assembly
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig
from twinrl.training.trainer import Outcome, Trainer

CPU = torch.device("cpu")


class Killed(Exception):  # noqa: N818
    """Stands for SIGKILL: nothing after it runs."""


class At:
    """An observer that acts after one step."""

    def __init__(self, step: int, act: Callable[[], None]):
        self.step, self.act = step, act

    def after_step(self, row: Mapping[str, Any]) -> None:
        if row["step"] == self.step:
            self.act()

    def after_checkpoint(self, offset: int) -> None: ...

    def after_event(self, event: object) -> None: ...


def weight_size(network: torch.nn.Module, step: int) -> dict[str, float]:
    """A validation that depends on the weights alone."""
    return {names.VAL_QUALITY: sum(p.detach().double().abs().sum().item() for p in network.parameters())}


def make(settings: RunConfig, validate: Any = weight_size, source: Any = None) -> Trainer:
    """A trainer in the state of its newest checkpoint, or at the start."""
    run = RunDirectory(settings.directory)
    if not run.exists:
        run.start(settings, fresh=False)
    trainer = Trainer(settings, run, source or FakeSource(), CPU, validate)
    trainer.resume()
    return trainer


def finish(settings: RunConfig, **arguments: Any) -> Trainer:
    trainer = make(settings, **arguments)
    assert trainer.train() == Outcome("finished", settings.train.steps)
    return trainer


def kill(settings: RunConfig, step: int, **arguments: Any) -> None:
    """Train and die right after ``step`` was logged."""

    def die() -> None:
        raise Killed

    trainer = make(settings, **arguments)
    trainer.observers.append(At(step, die))
    with pytest.raises(Killed):
        trainer.train()


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Weights of all networks, and the optimizers' states."""
    parts = assembly.parts_of(trainer.objective)
    tensors = {f"{part}.{k}": v for part, module in parts.items() for k, v in module.state_dict().items()}
    kept = {part: fit.optimizer_tensors(optimizer) for part, optimizer, _ in trainer._optimizers()}
    return tensors | {f"{part}.{k}": v for part, found in kept.items() for k, v in found.items()}


def rows(trainer: Trainer) -> list[dict[str, Any]]:
    """The log as written, without what a clock decides."""
    return logs.rows(trainer.run)


def assert_same(a: Trainer, b: Trainer) -> None:
    """Equal to the last bit: tensors, rows, what the checkpoints hold beside them."""
    left, right = state(a), state(b)
    assert set(left) == set(right)
    assert [k for k in left if not torch.equal(left[k], right[k])] == []
    assert rows(a) == rows(b)
    stored = [checkpoints.load_state(t.run.newest_checkpoint()) for t in (a, b)]
    for offset in ("log_offset", "events_offset"):  # perf/* has another number of digits each time
        assert all(s.pop(offset) >= 0 for s in stored)
    assert stored[0] == stored[1]
