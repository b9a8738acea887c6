"""The one optimisation loop behind all models of the lab."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twinrl.flow.draws import shuffled_rows


@dataclass(frozen=True)
class Recipe:
    """How a model of the lab is optimised: AdamW, one warm-up, cosine decay to zero.

    Attributes:
        steps: optimiser steps.
        batch: rows per step.
        lr: peak learning rate.
        seed: key of every random number drawn.
        warm_up: fraction of the steps before the peak.
        weight_decay: decoupled.
    """

    steps: int
    batch: int
    lr: float
    seed: int
    warm_up: float = 0.1
    weight_decay: float = 1e-2

    def rows(self, n: int, step: int) -> Tensor:
        """The data rows of a step, out of n."""
        return shuffled_rows(n, self.batch, self.seed, step)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's global CPU generator starts from ``seed``; afterwards it is as it was before.

    *When to use*: for initial weights, which layers draw from the global generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def fit(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[int], Tensor],
    recipe: Recipe,
    tick: Callable[[], None],
) -> None:
    """Minimise ``loss(step)`` over ``parameters``.

    Arguments:
        parameters: what is trained.
        loss: step → scalar; draws its own keyed random numbers.
        recipe: steps and rates.
        tick: called after every step, for the progress bar.

    Raises:
        FloatingPointError: the last loss is not finite.
    """
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=recipe.lr,
        total_steps=recipe.steps,
        pct_start=recipe.warm_up,
        cycle_momentum=False,
    )
    for step in range(recipe.steps):
        optimizer.zero_grad(set_to_none=True)
        value = loss(step)
        value.backward()
        optimizer.step()
        schedule.step()
        tick()
    if not torch.isfinite(value):
        raise FloatingPointError(f"the loss is {float(value)} after {recipe.steps} steps")
