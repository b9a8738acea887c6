"""Objectives of presets around networks of the tests' own, as the trainer would assemble them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twinrl import config as configuration
from twinrl.backends.wrappers import WithoutTargetTime
from twinrl.flow.branches import Batch, BatchDraws, divide
from twinrl.flow.conditions import Condition
from twinrl.flow.teacher import Teacher, copy_of
from twinrl.terms import TERMS, NetworkOwner
from twinrl.terms.objective import Objective, TermLoss
from twinrl.training import schema

LAB_PRESETS = [name for name in configuration.presets() if schema.load(name).model.family is None]
"""Those with a network of one's own; the others train a pretrained family with the same terms."""


@dataclass(frozen=True)
class DoubleDraws(BatchDraws):
    """Keyed draws in float64, so that tests can compare to rounding error."""

    def normal(self, purpose: str, rows: Sequence[int]) -> Tensor:
        return super().normal(purpose, rows).double()

    def uniform(self, purpose: str) -> Tensor:
        return super().uniform(purpose).double()


@dataclass(frozen=True)
class GivenDraws:
    """Draws of a global batch given by purpose."""

    numbers: Mapping[str, Tensor]

    def normal(self, purpose: str, rows: Sequence[int]) -> Tensor:
        return self.numbers[purpose][list(rows)]

    def uniform(self, purpose: str) -> Tensor:
        return self.numbers[purpose]


def objective_of(
    preset: str,
    student: nn.Module,
    overrides: Sequence[str] = (),
    teacher: nn.Module | None = None,
    autocast: torch.dtype | None = None,
) -> tuple[Objective, schema.RunConfig]:
    """The preset's objective on ``student``; copies start from ``teacher`` where it is given."""
    config = schema.load(preset, list(overrides))
    wrap = (lambda network: network) if config.model.target_time else WithoutTargetTime
    made = Teacher(wrap(student), config.teacher)
    for copied in (made.ema, made.frozen):
        if copied is not None and teacher is not None:
            copied.load_state_dict(wrap(teacher).state_dict())
    terms = {name: TERMS.build(term) for name, term in config.terms.items()}
    own = {n: copy_of(made.student, trained=True) for n, term in terms.items() if isinstance(term, NetworkOwner)}
    return Objective(terms, made, config.guidance, autocast, own=own), config


def batch_of(config: schema.RunConfig, x: Tensor, c: Condition, null: Condition, seed: int = 3) -> Batch:
    """A global batch of data ``x`` with keyed draws in ``x``'s dtype."""
    kind = DoubleDraws if x.dtype == torch.float64 else BatchDraws
    return divide(config.branches, config.time, x, c, null, kind(seed, 0, tuple(x.shape)))


def counts_of(batch: Batch) -> dict[str, int]:
    return {name: len(at) for name, at in batch.branch.items()}


def losses_of(made: Objective, batch: Batch) -> dict[str, TermLoss]:
    return made.evaluate(batch, counts_of(batch)).losses()


def gradient(module: nn.Module) -> Tensor:
    """All gradients, flattened and joined; zeros where there is none. Clears them."""
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
    module.zero_grad(set_to_none=True)
    return torch.cat([part.flatten() for part in parts])
