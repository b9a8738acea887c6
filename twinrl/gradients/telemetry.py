"""What Adam's state says about the health of a step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from twinrl.flow.teacher import LOW
from twinrl.gradients.gradient import all_over_ranks, over_ranks
from twinrl.run import names


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


def is_due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps (0 = never) happens at this one."""
    return every > 0 and step % every == 0


def largest(values: Sequence[Tensor]) -> Tensor:
    """0-dim maximum; nan if any is nan, 0 if there is none."""
    return torch.stack(list(values)).max() if values else torch.zeros(())


@torch.no_grad()
def update_ratio(parameters: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """0-dim ‖θ_after − θ_before‖ / ‖θ_before‖ over all parameters."""
    moved = torch.stack(all_over_ranks([(p - b).square().sum() for p, b in zip(parameters, before, strict=True)])).sum()
    size = torch.stack(all_over_ranks([b.square().sum() for b in before])).sum()
    return (moved / size).sqrt()


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


@torch.no_grad()
def all_finite(parameters: Sequence[Tensor]) -> bool:
    """Whether every number of every parameter is finite."""
    return all(bool(over_ranks(p.isfinite().all())) for p in parameters)
