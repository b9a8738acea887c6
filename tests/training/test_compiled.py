"""Compiled blocks train as others do: the same losses but for rounding, and nothing is compiled again at each step."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch
from torch._dynamo.utils import counters

from tests.backends.families.made import made, short_prompts
from tests.fake_source import small
from tests.rounding import bound
from tests.training.trainers import CPU, make, rows
from twinrl.backends.families import FAMILIES
from twinrl.training import assembly, schema
from twinrl.training.schema import RunConfig

STEPS = 8
KNOWN_AFTER = 5
"""Steps in which every form of a block has been seen: with and without gradient, of one row, of several, of texts of
two lengths, then of any, masked or not."""
DIT = "model.network={kind: dit, width: 16, depth: 2, condition_width: 16, heads: 2}"
PRECISE = (
    f"train={{steps: {STEPS}, precision: float64}}", "evaluation.every=0", "gradients.each.clip.max_norm=0.1",
    "optim={lr: 0.1, eps: 1}",  # with so large an ε a step of Adam does not amplify what rounding has done
)  # fmt: skip


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = functorch.donated_buffer  # compiling changes it
    yield
    functorch.donated_buffer = before


class Graphs:
    """An observer that notes how many graphs have been compiled after each step."""

    def __init__(self) -> None:
        self.number: list[int] = []

    def after_step(self, row: Any) -> None:
        self.number.append(counters["stats"]["unique_graphs"])

    def after_checkpoint(self, offset: int) -> None: ...

    def after_event(self, event: object) -> None: ...


def compare(settings: Callable[[str], RunConfig], backend: str, source: Any = None) -> None:
    """Fails where compiled blocks give other losses and norms, leave the graph, or go on being compiled."""
    expected = make(settings("null"), source=source)
    expected.train()
    torch.compiler.reset()
    counters.clear()
    trainer, graphs = make(settings(backend), source=source), Graphs()
    trainer.observers.append(graphs)
    trainer.train()
    assert graphs.number[0] > 0
    assert graphs.number[KNOWN_AFTER - 1] == graphs.number[-1]
    assert not counters["graph_break"]
    for step, (row, other) in enumerate(zip(rows(trainer), rows(expected), strict=True), 1):
        for name in (name for name in other if name.startswith(("loss/", "grad/"))):
            allowed = bound(1e5 * step, max(1.0, abs(other[name])), torch.float64)
            assert row[name] == pytest.approx(other[name], abs=allowed), (step, name)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.campaign)])
def test_losses_are_those_of_uncompiled_blocks(tmp_path: Path, backend: str) -> None:
    compare(lambda name: small(tmp_path / name, DIT, *PRECISE, f"machine.compile={name}"), backend)


@pytest.mark.campaign
@pytest.mark.parametrize("name", FAMILIES)
def test_families_with_recomputation(tmp_path: Path, name: str) -> None:
    def settings(backend: str) -> RunConfig:
        overrides = [*made(tmp_path, name).overrides, *PRECISE, "train.batch=8", "model.gradient_checkpointing=true"]
        where = ["tracking.mlflow=false", f"run.dir={tmp_path / backend}", f"machine.compile={backend}"]
        return schema.load("twinflow", [*overrides, *where])

    with short_prompts():
        compare(settings, "aot_eager", assembly.load_source(settings("null"), CPU))


def test_the_older_key_means_the_same() -> None:
    older = schema.load("twinflow", ["fsdp.compile=aot_eager"])
    assert older == schema.load("twinflow", ["machine.compile=aot_eager"])
    assert older.hash == schema.load("twinflow", ["fsdp.compile=null"]).hash == schema.load("twinflow").hash
