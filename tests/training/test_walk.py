"""The walks of docs/architecture.md: a training step enters every file once, an evaluation goes downwards."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import FrameType

import pytest
from rich.console import Console

import twinrl
from tests.fake_source import register, small
from tests.training.trainers import make
from twinrl.commands import inspect
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


ROOMS = ("commands", "training", "evaluation")
"""From above to below: the rooms of an evaluation's walk."""
LOOKED_UP = {
    "commands/progress", "training/schema", "training/provider", "training/sources", "evaluation/distances",
    "evaluation/prdc", "evaluation/isolation", "evaluation/content",
}  # fmt: skip
"""Settings, contracts and numbers of these rooms: not doors."""
EVALUATED = [
    "commands/inspect", "training/opened", "training/runs", "training/assembly", "training/laboratory",
    "evaluation/protocol", "evaluation/table", "evaluation/shelf", "training/pictures", "evaluation/grids",
]  # fmt: skip
"""The files that docs/architecture.md lists; cli and run/layout are beside them."""


@pytest.mark.slow
def test_an_evaluation_enters_what_the_architecture_lists_and_never_climbs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    settings = small(tmp_path, "train.steps=1")
    make(settings).train()
    found: set[tuple[str, str]] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_back is not None:
            caller, called = (_door(each.f_code.co_filename) for each in (frame.f_back, frame))
            if called and caller != called:
                found.add((caller, called))

    sys.setprofile(note)
    try:
        inspect.evaluate(settings.directory, None, Console(quiet=True))
    finally:
        sys.setprofile(None)
    assert {called for _, called in found} == set(EVALUATED)
    rooms = [[ROOMS.index(name.partition("/")[0]) for name in arrow] for arrow in found if all(arrow)]
    assert all(above <= below for above, below in rooms)


def _door(file: str) -> str:
    """The file's name in the package, if it is of these rooms and not looked up; else nothing."""
    path = Path(file)
    name = str(path.relative_to(ROOT).with_suffix("")) if path.is_relative_to(ROOT) else ""
    return name if name.partition("/")[0] in ROOMS and name not in LOOKED_UP else ""
