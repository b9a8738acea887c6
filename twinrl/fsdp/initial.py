"""Building a sharded network of which no rank ever holds the whole.

Three ways, all ending in the local parts that FSDP keeps:

- *outline*: the network is built on the meta device, which stores shapes alone, and weights are read from files part
  by part;
- *streamed*: where the constructor's random numbers are the weights, it runs as in a single process, with the same
  numbers in the same order, and every block is cut down to this rank's part the moment it joins its list;
- *copy*: teachers start from the student's local parts, without communication.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from twinrl.config.errors import InputError
from twinrl.fsdp.wrap import own_part, part
from twinrl.machine import files
from twinrl.machine.sharding import local
from twinrl.run import fit

META = torch.device("meta")
Build = Callable[[], nn.Module]


def outline(build: Build) -> nn.Module:
    """The network on the meta device: shapes and structure, no values."""
    with META:
        return build()


def streamed(build: Build, blocks: Iterable[str], ranks: int, rank: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network on the meta device, and this rank's parts of what its constructor gave the parameters.

    At most one block and what lies outside the blocks exist at a time. Buffers are returned whole.

    Arguments:
        build: constructs the network on the CPU.
        blocks: names of the classes of blocks.
        ranks, rank: parts that a parameter is divided into, and this rank's.

    Raises:
        RuntimeError: a block was written to after it had joined its list, so its values are not known.
    """
    kept: dict[Tensor, Tensor] = {}
    names = frozenset(blocks)

    def cut_down(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if type(module).__name__ in names and isinstance(parent, nn.ModuleList):
            _empty(module, kept, ranks, rank)  # type: ignore[arg-type]

    hook = register_module_module_registration_hook(cut_down)
    try:
        network = build()
    finally:
        hook.remove()
    changed = [p for p in kept if p._version]
    if changed:
        raise RuntimeError(f"a block of {', '.join(sorted(names))} is initialised again after it was added to a list")
    _empty(network, kept, ranks, rank)
    return network, {name: kept[tensor] for name, tensor in _tensors(network) if tensor in kept}


def _empty(module: nn.Module, kept: dict[Tensor, Tensor], ranks: int, rank: int) -> None:
    """Move a module's values to ``kept``, cut down to this rank's part, and the module to the meta device."""
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is not None and parameter.device != META:
                hollow = nn.Parameter(torch.empty_like(parameter, device=META), parameter.requires_grad)
                whole = parameter.detach()
                kept[hollow] = whole[part(len(whole), ranks, rank)].clone() if whole.ndim else whole.clone()
                child._parameters[name] = hollow
        for name, buffer in list(child._buffers.items()):
            if buffer is not None and buffer.device != META:
                child._buffers[name] = torch.empty_like(buffer, device=META)
                kept[child._buffers[name]] = buffer  # type: ignore[index]


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and all buffers by name."""
    yield from network.named_parameters()
    yield from network.named_buffers()


def has_hidden_buffers(network: nn.Module) -> bool:
    """Whether buffers exist that no checkpoint holds, so that only the constructor knows their values."""
    return any(child._non_persistent_buffers_set for child in network.modules())


@torch.no_grad()
def fill(network: nn.Module, parts: Mapping[str, Tensor]) -> None:
    """Write this rank's parts into a sharded network."""
    for name, tensor in _tensors(network):
        if name in parts:
            local(tensor).copy_(parts[name])


@torch.no_grad()
def copy_parts(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the values of a network that is sharded alike; nothing is sent."""
    for (_, mine), (_, theirs) in zip(_tensors(target), _tensors(source), strict=True):
        local(mine).copy_(local(theirs))


def described(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of the same shapes and formats; of stored ones nothing is read."""
    return tensors.described() if isinstance(tensors, Stored) else tensors


def load_parts(
    network: nn.Module, tensors: Mapping[str, Tensor], origin: str, formats: fit.Formats | None = None
) -> None:
    """Load weights strictly into a sharded network; of lazily read ones (:class:`Stored`) this rank's parts alone.

    Raises:
        InputError: keys, shapes or formats differ (:func:`fit.check_fit`); names them and ``origin``.
    """
    own: dict[str, Tensor] = network.state_dict()
    fit.check_fit(own, described(tensors), origin, formats=formats)
    read_into(own, tensors)


@torch.no_grad()
def read_into(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Write values by name into (sharded) tensors of the same shapes, in place."""
    if isinstance(tensors, Stored):
        tensors.read_into(targets)
        return
    for name, target in targets.items():
        rows = own_part(target)
        local(target).copy_(tensors[name] if rows is None else tensors[name][rows])


class Stored(Mapping[str, Tensor], ABC):
    """Tensors in files, of which a rank reads what it needs. Subclasses read one kind of file."""

    @abstractmethod
    def described(self) -> dict[str, Tensor]:
        """Name → a tensor of that shape and format on the meta device; none is read."""

    def shapes(self) -> dict[str, torch.Size]:
        """Name → shape."""
        return {name: tensor.shape for name, tensor in self.described().items()}

    @abstractmethod
    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill (sharded) tensors of the same shapes; called by all ranks together."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.described())

    def __len__(self) -> int:
        return len(self.described())


@dataclass(frozen=True)
class Outline:
    """A network whose weights are in files: its structure, and where each value comes from.

    Attributes:
        network: parameters on the meta device, buffers with their values.
        blocks: classes of the modules that are sharded each for itself.
        weights: the start value of every parameter.
    """

    network: nn.Module
    blocks: tuple[str, ...]
    weights: Mapping[str, Tensor]


class SafetensorsPart(Stored):
    """The tensors of one or several safetensors files, e.g. a pretrained model's.

    Arguments:
        paths: the files.
        rename: name in the file → name here.

    Raises:
        InputError: a file is not there, or damaged.
    """

    def __init__(self, paths: Iterable[Any], rename: Callable[[str], str] = lambda name: name):
        self._where: dict[str, tuple[Any, str]] = {}
        for path in paths:
            file = _opened(path)
            self._where |= {rename(name): (file, name) for name in file.keys()}  # noqa: SIM118  not a mapping

    def described(self) -> dict[str, Tensor]:
        found = {}
        for name, (file, key) in self._where.items():
            shape = file.get_slice(key).get_shape()
            dtype = (file.get_slice(key)[:0] if shape else file.get_tensor(key)).dtype  # the file's own are other names
            found[name] = torch.empty(shape, dtype=dtype, device=META)
        return found

    def __getitem__(self, name: str) -> Tensor:
        file, key = self._where[name]
        return file.get_tensor(key)

    @torch.no_grad()
    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            self.read_into_one(name, target)

    @torch.no_grad()
    def read_into_one(self, name: str, target: Tensor, dtype: torch.dtype | None = None) -> None:
        """Fill one (sharded) tensor, with values that are rounded to ``dtype``."""
        file, key = self._where[name]
        rows = own_part(target)
        value: Tensor = file.get_tensor(key) if rows is None else file.get_slice(key)[rows]
        local(target).copy_(value.to(dtype) if dtype is not None and value.is_floating_point() else value)


def _opened(path: Any) -> Any:
    """A safetensors file. Raises InputError."""
    from safetensors import SafetensorError, safe_open

    try:
        files.check_plain(Path(path))
        open(path, "rb").close()  # the library's own errors have no number
        return safe_open(path, framework="pt")
    except (*files.GONE, SafetensorError) as error:
        raise InputError(f"{path} is missing or damaged", got=error, fix="put the file back that was there") from error


class Pretrained(Stored):
    """Start values of a network: tensors of files under other names, and made ones.

    Arguments:
        stored: the files.
        origins: parameter → the name in the files; None: it is made.
        made: gives the whole value of a parameter that is in no file, by name and shape; these are small.
        dtype: what is in the files is rounded to this first, as where it is loaded whole.
    """

    def __init__(
        self,
        stored: SafetensorsPart,
        origins: Mapping[str, str | None],
        made: Callable[[str, torch.Size], Tensor],
        dtype: torch.dtype,
    ):
        self.stored, self.origins, self.made, self.dtype = stored, origins, made, dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self.origins)

    def __len__(self) -> int:
        return len(self.origins)

    def described(self) -> dict[str, Tensor]:
        """Of what is in the files."""
        found = self.stored.described()
        return {name: found[origin] for name, origin in self.origins.items() if origin is not None}

    def __getitem__(self, name: str) -> Tensor:
        origin = self.origins[name]
        if origin is None:
            raise KeyError(name)
        return self.stored[origin]

    @torch.no_grad()
    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            if (origin := self.origins[name]) is not None:
                self.stored.read_into_one(origin, target, self.dtype)
                continue
            value, rows = self.made(name, target.shape), own_part(target)
            local(target).copy_(value if rows is None else value[rows])
