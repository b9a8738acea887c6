"""What Adam's state says about the health of a step."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from twinrl.gradients.gradient import Gradient, all_over_ranks, over_ranks


@torch.no_grad()
def rms(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Parameter → RMS_t = √mean(g²/max(v̂, ε²)), just after a step of Adam, AdamW or RAdam; empty of other optimizers.

    ``v̂`` is the bias-corrected second moment. About 1 while gradients look like their past; an RMS spike (≥ 2.3)
    says that the second moment is out of date, and loss spikes follow by 1 to 8 steps (StableAdamW, Wortsman et
    al., arXiv:2304.13013).
    """
    found: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        states = {p: optimizer.state[p] for p in group["params"] if p.grad is not None and p in optimizer.state}
        states = {p: state for p, state in states.items() if "exp_avg_sq" in state}
        if states:
            found |= _rms_of(states, group["betas"][1], group["eps"])
    return found


def _rms_of(states: Mapping[Tensor, Mapping[str, Tensor]], beta: float, eps: float) -> dict[Tensor, Tensor]:
    """:func:`rms` of parameters with their optimizer's state; without a look at the device."""
    steps = torch.stack([state["step"] for state in states.values()])
    corrections = 1 - beta ** steps.double()  # taken out of the mean: v̂ = v/correction
    bounds = (corrections * eps**2).to(next(iter(states)).device).unbind()
    squares = [
        parameter.grad.square().div_(state["exp_avg_sq"].clamp(min=bound)).sum()
        for (parameter, state), bound in zip(states.items(), bounds, strict=True)
    ]
    totals = torch.stack(all_over_ranks(squares)).double()
    sizes = torch.tensor([parameter.numel() for parameter in states], dtype=torch.double)
    means = totals * (corrections / sizes.to(corrections.device)).to(totals.device)
    return dict(zip(states, means.sqrt().unbind(), strict=True))


def is_due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps (0 = never) happens at this one."""
    return every > 0 and step % every == 0


def largest(values: Sequence[Tensor]) -> Tensor:
    """0-dim maximum; nan if any is nan, 0 if there is none."""
    return torch.stack(list(values)).max() if values else torch.zeros(())


@torch.no_grad()
def update_ratio(parameters: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """0-dim ‖θ_after − θ_before‖ / ‖θ_before‖ over all parameters; ``before`` is written over."""
    start = Gradient(dict(enumerate(before)))
    size = start.norm
    return start.scale_(-1.0).add_(Gradient(dict(enumerate(parameters)))).norm / size


@torch.no_grad()
def all_finite(parameters: Sequence[Tensor]) -> bool:
    """Whether every number of every parameter is finite."""
    return all(bool(over_ranks(p.isfinite().all())) for p in parameters)
