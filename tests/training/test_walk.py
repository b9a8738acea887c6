"""The walk through a training step: the trainer enters every file once."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import FrameType

import pytest

import twinrl
from tests.fake_source import small
from tests.training.trainers import make
from twinrl.training import trainer as module

ROOT = Path(twinrl.__file__).parent
VALUES = {"config", "run/names", "training/schema", "gradients/chain"}
"""Settings, names and checks: looked up anywhere."""
WALK = (
    "flow/draws", "training/feed", "flow/branches", "training/passes", "gradients/engine", "gradients/telemetry",
    "fsdp/ranks", "rewards/keepers", "flow/schedules", "stability/monitor", "training/optim", "stability/precision",
)  # fmt: skip
"""The files that docs/architecture.md lists, in the order in which the trainer enters them."""


@contextmanager
def entered() -> Iterator[list[str]]:
    """The files of the package that code in the trainer's file calls during the block, one entry for each call."""
    found: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        caller, called = frame.f_back, Path(frame.f_code.co_filename)
        if event != "call" or caller is None or caller.f_code.co_filename != module.__file__:
            return
        if called.is_relative_to(ROOT) and str(called) != module.__file__:
            found.append(str(called.relative_to(ROOT).with_suffix("")))

    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)


def visits(calls: list[str]) -> list[str]:
    """Files in the order of their visits: calls that follow each other are one visit."""
    doors = [name for name in calls if name not in VALUES and name.partition("/")[0] not in VALUES]
    return [name for name, _ in groupby(doors)]


@pytest.mark.parametrize("step", [0, 1])
def test_the_trainer_enters_every_file_once(step: int, tmp_path: Path) -> None:
    """With a reward, clips of every term and all telemetry; periodic measures are due at step 0."""
    estimator = "reward.gradient={estimator: vae_backprop, eta: 30}"
    reward = "terms.reward={branches: [e2e]}", "reward.model=brightness", estimator, "gradients.each.clip.max_norm=1"
    trainer = make(small(tmp_path, *reward))
    for _ in range(step):
        trainer.train_step()
    with entered() as calls:
        trainer.train_step()
    assert visits(calls) == list(WALK)
