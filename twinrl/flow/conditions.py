"""Conditions: what a network is told beside x and the times (text embeddings, labels, masks).

A condition is a mapping from names to tensors whose first dimension is the batch, e.g.
``{"text": (B, D)}`` for the lab or ``{"label": (B,)}`` for MNIST. Terms and samplers never look inside.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Condition: TypeAlias = Mapping[str, Tensor]
Network: TypeAlias = Callable[[Tensor, Tensor, Tensor, Condition], Tensor]
"""``F(x, t, r, condition)``: a velocity (B, C, H, W) at x (B, C, H, W) and signed times t, r (B,)."""


def rows(condition: Condition, index: Tensor | slice) -> Condition:
    """The condition of the chosen rows; ``index`` is anything that indexes the first dimension."""
    return {name: value[index] for name, value in condition.items()}


def concatenate(conditions: Sequence[Condition]) -> Condition:
    """Conditions with equal names, one after another along the batch."""
    first = conditions[0]
    if len(conditions) == 1:
        return first
    return {name: torch.cat([c[name] for c in conditions]) for name in first}


def to(condition: Condition, device: torch.device | str, dtype: torch.dtype | None = None) -> Condition:
    """The condition on ``device``; floating-point tensors in ``dtype`` where given, integers as they are."""
    return {
        name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
        for name, value in condition.items()
    }


def size(condition: Condition) -> int:
    """The number of rows, B."""
    return len(next(iter(condition.values())))
