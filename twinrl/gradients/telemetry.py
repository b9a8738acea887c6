"""What Adam's state says about the health of a step."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from twinrl.flow.teacher import LOW
from twinrl.gradients.gradient import Gradient, all_over_ranks, over_ranks, share_of_sum
from twinrl.machine.moving import moved
from twinrl.machine.sharding import local
from twinrl.run import names


@torch.no_grad()
def rms(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Parameter → RMS_t = √mean(g²/max(v̂, ε²)) of the step that Adam, AdamW or RAdam is about to make; empty of others.

    ``v̂`` is the bias-corrected second moment, this gradient included. About 1 while gradients look like their past; an
    RMS spike (≥ 2.3) says that the second moment is out of date, and loss spikes follow by 1 to 8 steps (StableAdamW,
    Wortsman et al., arXiv:2304.13013). Measured before the step, so that it is read with the step's other numbers.
    """
    found: dict[Tensor, Tensor] = {}
    known = isinstance(optimizer, torch.optim.Adam | torch.optim.RAdam)
    for group in optimizer.param_groups:
        states = {p: optimizer.state.get(p, {}) for p in group["params"] if p.grad is not None}
        states = {p: state for p, state in states.items() if "exp_avg_sq" in state or (known and not state)}
        if states:
            found |= _rms_of(states, group["betas"][1], group["eps"])
    return found


def _rms_of(states: Mapping[Tensor, Mapping[str, Tensor]], beta: float, eps: float) -> dict[Tensor, Tensor]:
    """:func:`rms` of parameters with their optimizer's state; nothing is read from the device."""
    first, made = local(next(iter(states))), [state["step"] for state in states.values() if state]
    none = torch.zeros_like(made[0]) if made else torch.zeros(())
    steps = moved(torch.stack([state.get("step", none) for state in states.values()]), first.device, torch.double)
    kept = [beta if state else 0.0 for state in states.values()]
    numbers = [[p.numel() for p in states], [share or 1 - beta for share in kept]]
    sizes, scales = moved(torch.tensor(numbers, dtype=torch.double), first.device)
    corrections = 1 - beta ** (steps + 1)  # taken out of the mean: v̂ = v/correction
    bounds = (corrections * eps**2 / scales).to(first.dtype).unbind()
    sums = [
        share_of_sum(_ratios(local(p.grad), state, share, bound), p)  # type: ignore[arg-type]
        for (p, state), share, bound in zip(states.items(), kept, bounds, strict=True)
    ]
    means = torch.stack(all_over_ranks(sums)).double() * corrections / (scales * sizes)
    return dict(zip(states, means.sqrt().unbind(), strict=True))


def _ratios(g: Tensor, state: Mapping[str, Tensor], kept: float, bound: Tensor) -> Tensor:
    """0-dim Σ g²/max(v, bound), where ``v`` is the second moment that the optimizer's step will leave, over the share
    ``kept`` of the former one: old + g²·(1 − kept)/kept; g² where nothing is kept. In few passes over the memory."""
    v = torch.addcmul(local(state["exp_avg_sq"]), g, g, value=(1 - kept) / kept) if kept else g.square()
    return torch.dot(g.flatten(), torch.div(g, v.clamp_(min=bound), out=v).flatten())


def largest(values: Sequence[Tensor]) -> Tensor:
    """0-dim maximum; nan if any is nan, 0 if there is none."""
    return torch.stack(list(values)).max() if values else torch.zeros(())


class Unmoved:
    """Entries of low precision that the optimizer's next step leaves as they are, though they have a gradient.

    A change below half a unit in the last place is rounded away: in bf16 a weight of 0.1 does not move by 1e-4.

    *When to use*: made before a step and asked after it; it copies what is of low precision, and nothing else.

    Arguments:
        optimizer: with a gradient in each parameter that it is to move.
        parameters: what it moves.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]):
        low = [(p, p.grad) for p in parameters if p.dtype in LOW and p.grad is not None]
        moments = [(optimizer.state.get(p, {}).get("exp_avg_sq"), gradient) for p, gradient in low]
        watched = {
            names.UNMOVED: [(p.detach(), gradient) for p, gradient in low],
            names.UNMOVED_MOMENTS: [(m, gradient) for m, gradient in moments if m is not None and m.dtype in LOW],
        }
        self._watched = {name: [(g, now, now.clone()) for now, g in pairs] for name, pairs in watched.items() if pairs}

    @torch.no_grad()
    def shares(self) -> dict[str, Tensor]:
        """Metric → 0-dim share of the entries with a gradient; empty where nothing is of low precision."""
        return {name: _unmoved(watched) for name, watched in self._watched.items()}


def _unmoved(watched: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    asked = [gradient != 0 for gradient, _, _ in watched]
    stayed = [(now == before).logical_and_(a) for (_, now, before), a in zip(watched, asked, strict=True)]
    counts = [torch.stack(all_over_ranks([e.sum() for e in entries])).sum().double() for entries in (stayed, asked)]
    return counts[0] / counts[1].clamp(min=1)


class Moved:
    """What the optimizer's next step does to the parameters.

    *When to use*: made before a step and asked after it; it copies the parameters, and what :class:`Unmoved` does.

    Arguments:
        optimizer: with a gradient in each parameter that it is to move.
        parameters: what it moves.
    """

    @torch.no_grad()
    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]):
        self.parameters = parameters
        self._before = Gradient({i: p.clone() for i, p in enumerate(parameters)})
        self._unmoved = Unmoved(optimizer, parameters)

    @torch.no_grad()
    def measures(self) -> dict[str, Tensor]:
        """Metric → 0-dim value: ‖θ_after − θ_before‖ / ‖θ_before‖ over all parameters, and what stayed; to be asked
        once."""
        size = self._before.norm
        moved = self._before.scale_(-1.0).add_(Gradient(dict(enumerate(self.parameters)))).norm
        return {names.UPDATE_RATIO: moved / size} | self._unmoved.shares()


@torch.no_grad()
def all_finite(parameters: Sequence[Tensor]) -> bool:
    """Whether every number of every parameter is finite."""
    return all(bool(over_ranks(p.isfinite().all())) for p in parameters)
