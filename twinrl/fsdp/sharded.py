"""The answers of several processes that train one sharded model; see :mod:`twinrl.fsdp.ranks`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from twinrl.backends import tells_trajectories_apart
from twinrl.backends.wrappers import unwrapped
from twinrl.config.errors import InputError
from twinrl.flow.conditions import Condition
from twinrl.flow.teacher import widened
from twinrl.fsdp import agreement, initial, mesh, wrap
from twinrl.fsdp import checkpoint as storage
from twinrl.fsdp.config import FSDPConfig
from twinrl.fsdp.frozen import Parted
from twinrl.fsdp.ranks import Ranks, T
from twinrl.fsdp.watchdog import APART, Progress
from twinrl.machine.sharding import local
from twinrl.machine.visiting import IN_PARTS
from twinrl.run.checkpoints import Checkpoint
from twinrl.run.fit import Formats, Kept
from twinrl.terms.objective import Losses


class Sharded(Ranks):
    """All processes of the default group, each with its part of every network.

    Arguments:
        config: how networks are sharded.
        device: of this process.
        dtype: of the parameters.
        low_precision: dtype in which parameters are gathered and used; None: as they are.
        progress: is told where this process is.
        backend: of ``torch.compile``, for every block; None: they are not compiled.

    Raises:
        InputError: the configured copies do not divide the processes.
    """

    def __init__(
        self,
        config: FSDPConfig,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        low_precision: torch.dtype | None = None,
        progress: Progress | None = None,
        backend: str | None = None,
    ):
        self.backend = backend
        self.config, self.device, self.dtype, self.low_precision = config, device, dtype, low_precision
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.mesh = mesh.mesh_of(device, config.replicate)
        self.progress = Progress() if progress is None else progress
        self._apart: dist.ProcessGroup | None = None
        self._outline: nn.Module | None = None  # of the student, from which teachers are made

    def own(self, purpose: str) -> str:
        return f"{purpose} of rank {self.rank}" if self.rank else purpose

    # --- a step -----------------------------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        self.progress.step, self.progress.doing = step, "forward and backward passes"

    def check_shares(self, counts: Mapping[str, int]) -> None:
        check_equal_shares(counts, self.world)

    def total(self, value: Tensor) -> Tensor:
        return wrap.all_reduced(value)

    def reduce_after(self, student: nn.Module, backward: bool) -> None:
        if not self.config.reduce_every_micro_batch:
            for unit in wrap.sharded_modules(student)[:1]:  # the root tells the others
                unit.set_requires_gradient_sync(backward)

    def merge(self, losses: Losses) -> Losses:
        with self.progress.during("losses of all ranks"):
            return agreement.merged(losses, self.device)

    def numbers(self, scalars: Mapping[str, Tensor]) -> dict[str, float]:
        with self.progress.during("the step's numbers"):
            return agreement.numbers_of_first(scalars)

    def agree(self, values: dict[str, float]) -> dict[str, float]:
        with self.progress.during("the step's numbers"):
            return agreement.of_first(values, self.device)

    def anywhere(self, flag: bool) -> bool:
        with self.progress.during("whether any rank stops"):
            return agreement.anywhere(flag, self.device)

    def gathered(self, word: str) -> list[str]:
        with self.progress.during("what each rank says"):
            words = [""] * self.world
            dist.all_gather_object(words, word)
            return words

    def on_first(self, action: Callable[[], Any]) -> None:
        with self.progress.during("what rank 0 does alone"):
            agreement.on_first(action)

    def together(self, action: Callable[[], T]) -> T:
        with self.progress.during("what each rank does alone"):
            return agreement.together(action)

    # --- networks and optimizers ----------------------------------------------------------------------------------

    def network(
        self,
        build: Callable[[], nn.Module],
        random: bool,
        trained: bool = True,
        outline: Callable[[], initial.Outline | None] = lambda: None,
    ) -> nn.Module:
        if (pretrained := outline()) is not None:
            return self._pretrained(pretrained)
        hollow = initial.outline(build)
        parts: dict[str, Tensor] = {}
        if random or initial.has_hidden_buffers(hollow):
            classes = wrap.block_classes(hollow, self.config.blocks)
            shards = self.mesh[mesh.SHARD]
            hollow, parts = initial.streamed(build, classes, shards.size(), shards.get_local_rank())
        hollow.to(self.dtype)
        if trained:
            self._outline = deepcopy(hollow)
        network = self._sharded(hollow, trained)
        initial.fill(network, parts)
        if trained:
            wrap.reduce_whole_parameters(network, wrap.all_reduced)
        return network

    def _pretrained(self, outline: initial.Outline) -> nn.Module:
        """A student that starts from files, of which every rank reads its part."""
        self.config = self.config.model_copy(update={"blocks": self.config.blocks or outline.blocks})
        hollow = outline.network
        buffers = {name: buffer for name, buffer in hollow.named_buffers() if not buffer.is_meta}
        self._outline = deepcopy(hollow)
        network = self._sharded(hollow, trained=True)
        initial.fill(network, buffers)
        targets = dict(network.named_parameters()) | dict(network.named_buffers())
        initial.read_into({name: targets[name] for name in outline.weights if name in targets}, outline.weights)
        wrap.reduce_whole_parameters(network, wrap.all_reduced)
        return network

    def _sharded(
        self, hollow: nn.Module, trained: bool, low_precision: torch.dtype | None = None, kept: bool | None = None
    ) -> nn.Module:
        """A network on the meta device, sharded, with memory for this rank's part and no values yet."""
        inner = unwrapped(hollow)  # a LoRA teacher calls it directly
        wrap.shard(inner, self.config, self.mesh, low_precision or self.low_precision, trained, self.backend, kept)
        if not self.config.cpu_offload:
            return hollow.to_empty(device=self.device)
        hollow.to_empty(device="cpu")
        for module in hollow.modules():  # what is not sharded is not offloaded either
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)
            for parameter in module._parameters.values():
                if parameter is not None and not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.to(self.device)
        return hollow

    def place(self, network: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
        return network

    def copy(self, student: nn.Module, average: bool = False, trained: bool = False) -> nn.Module:
        assert self._outline is not None, "the student was not made by these ranks"
        hollow = deepcopy(self._outline)
        low = widened(hollow) if average else None
        hollow = hollow if trained else hollow.requires_grad_(False)
        copied = self._sharded(hollow, trained, low, kept=False)  # it runs without a backward pass, too
        initial.copy_parts(student, copied)
        if trained:
            wrap.reduce_whole_parameters(copied, wrap.all_reduced)
        return copied

    def compiled(self, network: nn.Module, classes: Sequence[str] | None, backend: str) -> nn.Module:
        return network  # it was, when it was sharded

    def keep_frozen(self, modules: Iterable[nn.Module]) -> None:
        if self.config.frozen == "replicated":
            return
        group = self.mesh[mesh.SHARD].get_group()
        for module in modules:
            if module not in IN_PARTS:
                IN_PARTS[module] = Parted(module, group).together

    def tells_trajectories_apart(self, network: nn.Module, shape: tuple[int, int, int], condition: Condition) -> bool:
        return tells_trajectories_apart(network, shape, condition, self._plain_copy)

    def _plain_copy(self, network: nn.Module) -> nn.Module:
        """A copy of a network that may have no weights yet: matrices zero, vectors (as of norms) one."""
        copied = self.copy(network)
        with torch.no_grad():
            for parameter in copied.parameters():
                local(parameter).fill_(0.0 if parameter.ndim > 1 else 1.0)
        return copied

    def prepare(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if len({isinstance(p, DTensor) for p in parameters}) > 1:
            for group in optimizer.param_groups:
                group |= {"foreach": False, "fused": False}  # torch does not join sharded and whole tensors
        return optimizer

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def save(self, directory: Path, step: int, checkpoint: Checkpoint, keep: int) -> None:
        with self.progress.during("writing a checkpoint"):
            storage.save(directory, step, checkpoint, keep)

    def save_later(self, directory: Path, step: int, checkpoint: Checkpoint, keep: int) -> "Future[None]":
        if self._apart is None:  # training and the background each wait in collectives of their own
            self._apart = dist.new_group(backend="gloo", group_desc=APART)
        with self.progress.during("copying a checkpoint"):
            return storage.save_later(directory, step, checkpoint, keep, self._apart)

    def load(self, path: Path) -> Checkpoint:
        return storage.load(path)

    def load_module(
        self, module: nn.Module, tensors: Mapping[str, Tensor], origin: str, formats: Formats | None = None
    ) -> None:
        for unit in wrap.sharded_modules(module):
            unit.reshard()  # what is gathered would be out of date
        initial.load_parts(module, tensors, origin, formats)

    def load_optimizer(
        self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], origin: str, kept: Kept | None = None
    ) -> None:
        storage.load_optimizer(optimizer, tensors, origin, kept)


def check_equal_shares(counts: Mapping[str, int], world: int) -> None:
    """Raises InputError where the rows of a branch cannot be shared over the ranks equally.

    Ranks with unequal rows would make different forward passes, and wait for each other for ever.
    """
    uneven = {name: count for name, count in counts.items() if count % world}
    if uneven:
        name, count = next(iter(uneven.items()))
        raise InputError(
            f"the rows of branch {name} cannot be shared by {world} processes equally",
            got=f"{count} of {sum(counts.values())} rows, from train.batch and branches",
            expected=f"a multiple of {world} in every branch",
            fix="change train.batch, branches or the number of processes; in buckets data.row_multiple helps",
        )
