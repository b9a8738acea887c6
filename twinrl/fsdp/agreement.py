"""What all ranks agree on: the losses of the whole batch, the numbers of a step, flags, errors.

Decisions are made on every rank, from equal numbers, rather than on one rank and sent around: the detectors,
policies and schedules are plain Python over a few floats, so doing them N times costs nothing, needs no second round of
messages, and every rank has the state that a checkpoint holds. "Equal" is taken literally: the floats are rank 0's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from twinrl.config.errors import InputError
from twinrl.machine.moving import moved
from twinrl.run.checkpoints import SaveError
from twinrl.terms.objective import Losses, TermLoss

T = TypeVar("T")


def merged(losses: Losses, device: torch.device) -> Losses:
    """The micro-batches of all ranks, those of rank 0 first, as if one process had made them one after another.

    One message: every rank has the same terms and as many rows of each, so its own losses say how to read the others'.
    """
    template = list(_numbers(losses))
    parts = [moved(t.detach(), device, torch.double).flatten() for t in template]
    flat = torch.cat(parts) if parts else torch.zeros(0)
    gathered = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, flat)
    return [part for one in gathered for part in _rebuilt(losses, template, one)]


def _numbers(losses: Losses) -> Iterator[Tensor]:
    """Everything in the losses that is logged or named in events, in a fixed order."""
    for found in losses:
        for name in sorted(found):
            part = found[name]
            yield from (part.loss, part.unweighted, part.per_row, part.rows)
            yield from (part.aux[metric] for metric in sorted(part.aux))


def _rebuilt(losses: Losses, template: Sequence[Tensor], flat: Tensor) -> Losses:
    pieces = flat.split([t.numel() for t in template])
    values = iter([v.view(t.shape).to(t.dtype) for v, t in zip(pieces, template, strict=True)])
    return [{name: _filled(found[name], values) for name in sorted(found)} for found in losses]


def _filled(part: TermLoss, values: Iterator[Tensor]) -> TermLoss:
    loss, unweighted, per_row, rows = (next(values) for _ in range(4))
    aux = {metric: next(values) for metric in sorted(part.aux)}
    return replace(part, loss=loss, unweighted=unweighted, per_row=per_row, rows=rows, aux=aux, parts={})


def numbers_of_first(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Rank 0's 0-dim tensors as numbers for everybody, in one message and one transfer; all ranks have the same."""
    if not scalars:
        return {}
    flat = torch.stack([scalar.double() for scalar in scalars.values()])
    dist.broadcast(flat, 0)
    return dict(zip(scalars, flat.tolist(), strict=True))


def of_first(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Rank 0's numbers for everybody, to the last bit; all ranks have the same names."""
    if not values:
        return values
    flat = torch.tensor([float(v) for v in values.values()], dtype=torch.double, device=device)
    dist.broadcast(flat, 0)
    return dict(zip(values, flat.tolist(), strict=True))


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank."""
    there = device if "cpu:" not in dist.get_backend_config() else None  # hosts among themselves wait for no device
    found = torch.tensor(int(flag), device=there)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def together(action: Callable[[], T]) -> T:
    """Do something that needs no other rank, and go on only if all ranks could.

    Raises:
        InputError or SaveError: on *every* rank, that of the first that failed; so nobody waits for one that is gone.
    """
    result, failure = None, None
    try:
        result = action()
    except (InputError, SaveError) as error:
        failure = type(error), str(error)
    failures: list[tuple[type[Exception], str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for kind, message in filter(None, failures):
        raise kind(message)
    return result  # type: ignore[return-value]


def on_first(action: Callable[[], object]) -> None:
    """Do something on rank 0 while the others wait; its InputError or SaveError is everybody's."""
    together(action if dist.get_rank() == 0 else lambda: None)
