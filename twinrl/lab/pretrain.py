"""Flow-matching pretraining: the teacher from which TwinFlow students start."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twinrl.flow.conditions import Condition
from twinrl.flow.draws import normal, shuffled_rows, uniform
from twinrl.flow.transport import interpolate, like, velocity
from twinrl.lab.fitting import Keeper, offer, resumed, seeded

ConditionOf = Callable[[Tensor, int], Condition]
"""(what the rows are told by (B,), step) → condition of B rows, captions drawn anew at every step."""


@dataclass(frozen=True)
class Pretraining:
    """How a teacher is pretrained: AdamW, 100 steps of warm-up, a linear decay; the averaged weights are the result.

    Attributes:
        steps: optimiser steps.
        batch: rows per step.
        lr: learning rate between warm-up and decay.
        decay: last fraction of the steps, over which the rate falls linearly to a twentieth.
        dropout: share of rows whose condition is replaced by ∅, for guidance.
        ema: decay of the average of the weights.
        seed: key of every random number.
    """

    steps: int = 2000
    batch: int = 256
    lr: float = 2e-3
    decay: float = 0.5
    dropout: float = 0.1
    ema: float = 0.995
    seed: int = 0


@dataclass(frozen=True)
class FlowData:
    """What a teacher learns from.

    Attributes:
        latents: (N, C, H, W) normalised.
        told: (N,) integers from which the condition is made: labels, or numbers of rows.
        condition: captions and their condition for a batch of these.
        empty: one row of the empty condition ∅.
    """

    latents: Tensor
    told: Tensor
    condition: ConditionOf
    empty: Condition


def pretrain(
    network: nn.Module,
    data: FlowData,
    recipe: Pretraining,
    tick: Callable[[], None],
    keeper: Keeper | None = None,
) -> Mapping[str, Tensor]:
    """Train ``network`` (in place) to predict ``z − x`` at (x_t, t, t) and return its averaged state dict.

    Arguments:
        network: ``F(x_t, t, r, condition)``.
        data: latents and conditions.
        recipe: steps and rates.
        tick: called after every step.
        keeper: where an earlier training was left, and this one is kept.

    Raises:
        FloatingPointError: the last loss is not finite.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema)
    )
    for step in range(resumed(keeper, optimizer, schedule, tick, average), recipe.steps):
        optimizer.zero_grad(set_to_none=True)
        loss = flow_matching_loss(network, data, recipe, step)
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        tick()
        offer(keeper, optimizer, step + 1, recipe.steps, average)
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the flow-matching loss is {float(loss)} after {recipe.steps} steps")
    return {name: value.detach().clone() for name, value in average.module.state_dict().items()}


def flow_matching_loss(network: nn.Module, data: FlowData, recipe: Pretraining, step: int) -> Tensor:
    """Mean of ``‖F(x_t, t, t, c) − (z − x)‖²`` over a keyed batch, t ~ U(0, 1), c = ∅ for some rows."""
    rows = shuffled_rows(len(data.told), recipe.batch, recipe.seed, step)
    x = data.latents[rows]
    t = uniform((recipe.batch,), recipe.seed, "pretraining time", step).to(x)
    z = normal(tuple(x.shape), recipe.seed, "pretraining noise", step).to(x)
    dropped = uniform((recipe.batch,), recipe.seed, "pretraining dropout", step).to(x) < recipe.dropout
    condition = _drop(data.condition(data.told[rows], step), data.empty, dropped)
    return (network(interpolate(x, z, t), t, t, condition) - velocity(x, z)).square().mean()


def _drop(condition: Condition, empty: Condition, dropped: Tensor) -> Condition:
    """The condition with the rows ``dropped`` (B,) replaced by ∅."""
    return {name: torch.where(like(dropped, value), empty[name], value) for name, value in condition.items()}


def _rate(step: int, recipe: Pretraining) -> float:
    """Warm-up over 100 steps, constant, then a linear decay to a twentieth over the last part."""
    remaining = (recipe.steps - step) / (recipe.decay * recipe.steps)
    return min(1.0, (step + 1) / 100, max(0.05, remaining))


def fresh(network: nn.Module, seed: int) -> nn.Module:
    """A new network of the same architecture, its initial weights decided by ``seed`` alone.

    Arguments:
        network: keeps its constructor's arguments as ``config`` and ``spec``.
        seed: of the weights; the global random state is left untouched.
    """
    with seeded(seed):
        return type(network)(network.config, network.spec)
