"""Which modules are sharded, and how: ``fully_shard`` over blocks found by the name of their class.

Each block is one unit of communication: its parameters are gathered before it runs and freed afterwards. What lies
outside the blocks belongs to the root. A parameter without dimensions cannot be divided: it stays whole on every
rank, and its gradient is summed over the ranks.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from twinrl.config.errors import InputError
from twinrl.flow.teacher import in_low_precision
from twinrl.fsdp.config import FSDPConfig
from twinrl.machine.compiling import compile_blocks
from twinrl.machine.sharding import own_memory


def block_classes(network: nn.Module, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the classes to be sharded each for itself.

    Arguments:
        network: may be on the meta device.
        wanted: names from the configuration; None = the class whose modules, repeated in a list, have most parameters.

    Raises:
        InputError: the network has no module of a wanted class.
    """
    if wanted is None:
        return _repeated(network)
    present = {type(module).__name__ for module in network.modules()}
    if missing := [name for name in wanted if name not in present]:
        raise InputError(
            f"fsdp.blocks names {missing[0]}, of which the network has none",
            got=f"a network with {', '.join(sorted(present))}",
            fix="name classes of its blocks, or null to find them",
        )
    return tuple(wanted)


def _repeated(network: nn.Module) -> tuple[str, ...]:
    """The class of most parameters among those repeated in a list; none if there is no such class."""
    sizes: Counter[str] = Counter()
    for module in network.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            for child in module:
                sizes[type(child).__name__] += sum(p.numel() for p in child.parameters())
    return tuple(name for name, size in sizes.most_common(1) if size)


def shard(
    network: nn.Module,
    config: FSDPConfig,
    mesh: DeviceMesh,
    low_precision: torch.dtype | None,
    trained: bool,
    backend: str | None = None,
    kept: bool | None = None,
) -> list[nn.Module]:
    """Shard ``network`` in place, from the inside out; returns the outermost blocks in order.

    Arguments:
        network: on the meta device, or with values on the mesh's devices.
        config: blocks, prefetching, checkpointing, offload.
        mesh: of all ranks.
        low_precision: dtype in which parameters are gathered; gradients are reduced in float32. None: as they are.
        trained: False for teachers, which no backward pass follows.
        kept: root and last block stay gathered after a forward pass, for the backward pass that follows it; else all is
            freed wherever it does not run. None: if it is trained.
        backend: of ``torch.compile``, outside of which parameters are gathered and freed; None: blocks stay as they
            are.
    """
    classes = block_classes(network, config.blocks)
    units = [m for m in network.modules() if type(m).__name__ in (*classes, *config.full_precision)]
    blocks = blocks_of(network, classes)
    if backend is not None:
        compile_blocks(blocks, backend, hooks=True)
    if config.checkpoint_activations and trained:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    low = MixedPrecisionPolicy(low_precision, torch.float32, cast_forward_inputs=False)
    full = MixedPrecisionPolicy(cast_forward_inputs=False)  # times would lose precision
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if config.cpu_offload else OffloadPolicy()
    whole = {p for p in network.parameters() if p.ndim == 0}
    last = blocks[-1] if blocks else None
    for unit in [*reversed(units), network]:
        keep = (trained if kept is None else kept) and (unit is network or (unit is last and not config.reshard_last))
        unit.register_forward_hook(own_memory)
        fully_shard(
            unit, mesh=mesh, reshard_after_forward=not keep, offload_policy=offload, ignored_params=whole,
            mp_policy=low if low_precision and type(unit).__name__ not in config.full_precision else full,
        )  # fmt: skip
    for module in sharded_modules(network):
        module.set_gradient_divide_factor(1.0)  # losses are divided by the rows of the global batch already
        module.set_force_sum_reduction_for_comms(True)
    _prefetch(blocks, config.prefetch)
    if low_precision:
        network.forward = partial(in_low_precision, network.forward, low_precision)
    return blocks


def blocks_of(network: nn.Module, classes: Sequence[str]) -> list[nn.Module]:
    """The modules of these classes that lie in no other one of them, in order."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for block in (module for module in network.modules() if type(module).__name__ in classes):
        if block not in inside:
            found.append(block)
        inside |= set(block.modules())
    return found


def _prefetch(blocks: list[nn.Module], depth: int) -> None:
    """Gather the next blocks while one runs, in the order of the network and, in backward, against it."""
    if depth == 0:
        return
    for i, block in enumerate(blocks):
        assert isinstance(block, FSDPModule)
        block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + depth])  # type: ignore[arg-type]
        block.set_modules_to_backward_prefetch(blocks[max(0, i - depth) : i][::-1])  # type: ignore[arg-type]


def sharded_modules(network: nn.Module) -> list[FSDPModule]:
    """The units of communication, the root first."""
    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def reduce_whole_parameters(network: nn.Module, total: Callable[[Tensor], Tensor]) -> None:
    """Sum the gradients of parameters that are whole on every rank, as they are made."""
    for parameter in network.parameters():
        if not isinstance(parameter, DTensor) and parameter.requires_grad:
            parameter.register_hook(total)


# --- a rank's part of a tensor ----------------------------------------------------------------------------


def part(size: int, ranks: int, rank: int) -> slice:
    """The rows of a dimension of ``size`` that belong to ``rank``: equal parts rounded up, the last ones shorter."""
    each = -(-size // ranks)
    return slice(min(rank * each, size), min((rank + 1) * each, size))


def own_part(tensor: Tensor) -> slice | None:
    """The rows of the first dimension that this rank holds of a tensor; None where it holds all."""
    if not isinstance(tensor, DTensor):
        return None
    for dimension, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            mesh = tensor.device_mesh
            return part(tensor.shape[0], mesh.size(dimension), mesh.get_local_rank(dimension))
    return None


def all_reduced(value: Tensor) -> Tensor:
    """The sum over all ranks, in new memory."""
    value = value.clone()
    dist.all_reduce(value)
    return value
