"""Several processes that train one model of somebody else's: its copies (DDP) or its shards (FSDP2)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from twinrl.config.errors import InputError
from twinrl.fsdp import agreement, wrap
from twinrl.fsdp.ranks import ALONE, Ranks


class Several(Ranks):
    """All processes of the default group, whose losses and gradients are *averaged*, as DDP and FSDP2 do.

    Arguments:
        device: of this process.
    """

    def __init__(self, device: torch.device):
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device

    def total(self, value: Tensor) -> Tensor:
        return wrap.all_reduced(value)

    def agree(self, values: dict[str, float]) -> dict[str, float]:
        return agreement.of_first(values, self.device)

    def on_first(self, action: Callable[[], Any]) -> None:
        agreement.on_first(action)


def processes_of(model: nn.Module, parameters: Sequence[Tensor]) -> Ranks:
    """Those that train the model.

    Raises:
        InputError: it is of FSDP's first version, whose gradients lie in flat pieces, or of DDP with a static graph,
            which waits for its own backward.
    """
    if any(isinstance(module, DistributedDataParallel) and module.static_graph for module in model.modules()):
        raise InputError("twinrl.watch takes no DDP model with static_graph=True", fix="leave it out")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise InputError(
            "twinrl.watch takes no FullyShardedDataParallel model", fix="shard it by FSDP2 (fully_shard), or use DDP"
        )
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return ALONE
    return Several(parameters[0].device)


def mean(ranks: Ranks, value: Tensor) -> Tensor:
    """The mean over the processes of what each has of it."""
    return ranks.total(value) / ranks.world


def of_squares(ranks: Ranks) -> Callable[[Tensor], Tensor]:
    """Sums squares and products over processes, each of which holds its rows' part of ``world`` times the gradient."""
    return lambda value: ranks.total(value) / ranks.world**2


def replicated(ranks: Ranks, parameters: Sequence[Tensor]) -> bool:
    """Whether each process has a gradient of its own, which is still to be averaged."""
    return ranks.world > 1 and not any(isinstance(parameter, DTensor) for parameter in parameters)


def average_gradients(parameters: Sequence[Tensor], world: int) -> None:
    """Each ``.grad`` becomes its mean over the processes; one that some process has, every process has then."""
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    dist.all_reduce(there, dist.ReduceOp.MAX)
    shared = [p for p, found in zip(parameters, there.tolist(), strict=True) if found]
    for parameter in shared:
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = grad.contiguous()
    grads = [parameter.grad for parameter in shared if parameter.grad is not None]
    for work in [dist.all_reduce(grad, async_op=True) for grad in grads]:
        work.wait()
    if grads:
        torch._foreach_div_(grads, world)


def gathered(ranks: Ranks, value: Any) -> list[Any]:
    """What every process has, in their order; plain values."""
    if ranks.world == 1:
        return [value]
    found = [None] * ranks.world
    dist.all_gather_object(found, value)
    return found
