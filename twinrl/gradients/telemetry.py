"""What Adam's state says about the health of a step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from twinrl.gradients.gradient import all_over_ranks, over_ranks


@torch.no_grad()
def rms(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Parameter → RMS_t = √mean(g²/max(v̂, ε²)), just after a step of Adam, AdamW or RAdam; empty of other optimizers.

    ``v̂`` is the bias-corrected second moment. About 1 while gradients look like their past; an RMS spike (≥ 2.3)
    says that the second moment is out of date, and loss spikes follow by 1 to 8 steps (StableAdamW, Wortsman et
    al., arXiv:2304.13013).
    """
    squares, corrections = {}, []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if parameter.grad is None or not state or "exp_avg_sq" not in state:
                continue
            beta, eps = group["betas"][1], group["eps"]
            correction = 1 - beta ** float(state["step"])  # taken out of the mean: v̂ = v/correction
            bounded = state["exp_avg_sq"].clamp(min=correction * eps**2)
            squares[parameter] = parameter.grad.square().div_(bounded).sum()
            corrections.append(correction / parameter.numel())
    means = [total * factor for total, factor in zip(all_over_ranks(list(squares.values())), corrections, strict=True)]
    return {parameter: mean.sqrt() for parameter, mean in zip(squares, means, strict=True)}


def largest(values: Sequence[Tensor]) -> Tensor:
    """0-dim maximum; nan if any is nan, 0 if there is none."""
    return torch.stack(list(values)).max() if values else torch.zeros(())


@torch.no_grad()
def update_ratio(parameters: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """0-dim ‖θ_after − θ_before‖ / ‖θ_before‖ over all parameters."""
    moved = torch.stack(all_over_ranks([(p - b).square().sum() for p, b in zip(parameters, before, strict=True)])).sum()
    size = torch.stack(all_over_ranks([b.square().sum() for b in before])).sum()
    return (moved / size).sqrt()


@torch.no_grad()
def all_finite(parameters: Sequence[Tensor]) -> bool:
    """Whether every number of every parameter is finite."""
    return all(bool(over_ranks(p.isfinite().all())) for p in parameters)
