"""Conditions: what a network is told beside x and the times (text embeddings, labels, masks).

A condition is a mapping from names to tensors whose first dimension is the batch, e.g.
``{"text": (B, D)}`` for the lab or ``{"label": (B,)}`` for MNIST. Terms and samplers never look inside.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from twinrl.machine.moving import is_noted, known, moved, on_host, rows_of

Condition: TypeAlias = Mapping[str, Tensor]
Network: TypeAlias = Callable[[Tensor, Tensor, Tensor, Condition], Tensor]
"""``F(x, t, r, condition)``: a velocity (B, C, H, W) at x (B, C, H, W) and signed times t, r (B,)."""


def rows(condition: Condition, index: Tensor | slice) -> Condition:
    """The condition of the chosen rows; ``index`` is anything that indexes the first dimension."""
    return {name: _kept(value, lambda part: rows_of(part, index)) for name, value in condition.items()}


def concatenate(conditions: Sequence[Condition]) -> Condition:
    """Conditions with equal names, one after another along the batch."""
    first = conditions[0]
    if len(conditions) == 1:
        return first
    return {name: _joined([c[name] for c in conditions]) for name in first}


def repeated(condition: Condition, n: int) -> Condition:
    """n rows that are all the one row of the condition, in its memory."""
    return {name: _kept(value, lambda part: part.expand(n, *part.shape[1:])) for name, value in condition.items()}


def _kept(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A changed tensor; what the host knows of it is changed alike."""
    changed = change(value)
    return known(changed, change(on_host(value))) if is_noted(value) else changed


def _joined(values: Sequence[Tensor]) -> Tensor:
    joined = torch.cat(list(values))
    return known(joined, torch.cat([on_host(value) for value in values])) if all(map(is_noted, values)) else joined


def to(condition: Condition, device: torch.device | str, dtype: torch.dtype | None = None) -> Condition:
    """The condition on ``device``; floating-point tensors in ``dtype`` where given, integers as they are."""
    place = torch.device(device)
    return {
        name: _there(value, place, dtype if value.is_floating_point() else None) for name, value in condition.items()
    }


def _there(value: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """A tensor on the device; of a mask the host keeps the values, since its lengths are asked for."""
    there = moved(value, device, dtype)
    return known(there, value) if value.dtype == torch.bool and value.device.type == "cpu" else there


def size(condition: Condition) -> int:
    """The number of rows, B."""
    return len(next(iter(condition.values())))
