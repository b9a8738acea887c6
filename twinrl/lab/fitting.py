"""The one optimisation loop behind all models of the lab."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

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


class Keeper(Protocol):
    """Keeps where a training stands, so that a killed one goes on bit for bit."""

    def kept(self) -> Mapping[str, Tensor] | None:
        """What was kept last; None where there is nothing."""
        ...

    def offer(self, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Keep ``state()``, where it is time."""
        ...


def fit(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[int], Tensor],
    recipe: Recipe,
    tick: Callable[[], None],
    keeper: Keeper | None = None,
) -> None:
    """Minimise ``loss(step)`` over ``parameters``.

    Arguments:
        parameters: what is trained.
        loss: step → scalar; draws its own keyed random numbers.
        recipe: steps and rates.
        tick: called after every step, for the progress bar.
        keeper: where an earlier training was left, and this one is kept.

    Raises:
        FloatingPointError: the last loss is not finite.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=recipe.lr,
        total_steps=recipe.steps,
        pct_start=recipe.warm_up,
        cycle_momentum=False,
    )
    for step in range(resumed(keeper, optimizer, schedule, tick), recipe.steps):
        optimizer.zero_grad(set_to_none=True)
        value = loss(step)
        value.backward()
        optimizer.step()
        schedule.step()
        tick()
        offer(keeper, optimizer, step + 1, recipe.steps)
    if not torch.isfinite(value):
        raise FloatingPointError(f"the loss is {float(value)} after {recipe.steps} steps")


def resumed(
    keeper: Keeper | None,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    tick: Callable[[], None],
    average: nn.Module | None = None,
) -> int:
    """The step to go on from; parameters, optimizer, schedule, bar and average are brought there in place."""
    state = keeper.kept() if keeper is not None else None
    if state is None:
        return 0
    step = int(state["step"])
    with torch.no_grad():
        for number, parameter in enumerate(_parameters(optimizer)):
            prefix = f"optimizer.{number}."
            parameter.copy_(state[f"parameter.{number}"])
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            if own:
                optimizer.state[parameter] = own
    if average is not None:
        average.load_state_dict({name: state[f"average.{name}"] for name in average.state_dict()})
    vars(schedule).update(last_epoch=step - 1, _step_count=step + 1)
    schedule.step()  # rates are functions of the step
    for _ in range(step):
        tick()
    return step


def offer(
    keeper: Keeper | None, optimizer: torch.optim.Optimizer, step: int, steps: int, average: nn.Module | None = None
) -> None:
    """Offer a training to the keeper after ``step`` of ``steps``; the last one is the caller's to keep."""

    def state() -> dict[str, Tensor]:
        made = {"step": torch.tensor(step)}
        for number, parameter in enumerate(_parameters(optimizer)):
            made[f"parameter.{number}"] = parameter.detach()
            made |= {f"optimizer.{number}.{name}": value for name, value in optimizer.state[parameter].items()}
        average_state = {} if average is None else average.state_dict()
        return made | {f"average.{name}": value for name, value in average_state.items()}

    if keeper is not None and step < steps:
        keeper.offer(state)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
