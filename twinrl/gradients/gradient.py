"""A gradient as one vector that happens to lie in several tensors."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from twinrl.machine.sharding import local

T = TypeVar("T")


def over_ranks(value: Tensor) -> Tensor:
    """A 0-dim result of sharded tensors as the plain number that every rank sees."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def all_over_ranks(sums: Sequence[Tensor]) -> list[Tensor]:
    """Of 0-dim sums of sharded tensors the plain numbers that every rank sees, in one message for all."""
    sharded: list[Tensor] = [value for value in sums if isinstance(value, DTensor)]
    whole = iter(over_ranks(torch.stack(sharded)).unbind()) if sharded else iter(())
    return [next(whole) if isinstance(value, DTensor) else value for value in sums]


def share_of_sum(own: Tensor, tensor: Tensor) -> Tensor:
    """A 0-dim sum over what this rank holds of ``tensor``, as its share of the sum over all ranks."""
    if not isinstance(tensor, DTensor):
        return own
    placements = [Partial() if placement.is_shard() else placement for placement in tensor.placements]
    return DTensor.from_local(own, tensor.device_mesh, placements)


class Gradient:
    """One term's gradient: a tensor for each parameter (or forward pass) that the term reaches.

    Operations are in place and make no copy of the whole. Sharded tensors (DTensor) give global norms and
    products, equal on every rank. Norms and products are 0-dim and in float64, where squares neither overflow nor
    lose what the parts had.

    Arguments:
        tensors: position of the parameter or forward pass → its gradient.
        total: sums a 0-dim tensor over the ranks; for plain tensors of which every rank holds its own part, as
            cotangents of its rows are. Called by every norm and product, also of a rank that holds nothing.
            Default: nothing to sum.
        device: where norms are of a gradient without tensors; those with tensors are on theirs.
    """

    def __init__(
        self,
        tensors: Mapping[int, Tensor],
        total: Callable[[Tensor], Tensor] = lambda value: value,
        device: torch.device | None = None,
    ):
        self.tensors = dict(tensors)
        self.total, self.device = total, device
        self._norm: Tensor | None = None

    @classmethod
    def take(cls, parameters: Sequence[Tensor]) -> "Gradient":
        """The gradients that lie in ``.grad``, which is emptied."""
        taken = {}
        for i, parameter in enumerate(parameters):
            if parameter.grad is not None:
                taken[i], parameter.grad = parameter.grad, None
        return cls(taken, device=parameters[0].device if parameters else None)

    def put(self, parameters: Iterable[Tensor]) -> None:
        """Let the tensors be the ``.grad`` of the parameters."""
        for i, parameter in enumerate(parameters):
            parameter.grad = self.tensors.get(i)

    @property
    def norm(self) -> Tensor:
        """0-dim L2 norm over all tensors; computed once until the gradient is changed."""
        if self._norm is None:
            self._norm = self._measure()
        return self._norm

    def _measure(self) -> Tensor:
        squares = []
        for group in _apart(self.tensors.values()):
            norms = torch.stack(torch._foreach_norm([local(tensor) for tensor in group])).double()
            squares.append(share_of_sum(norms.square().sum(), group[0]))
        return self._sum(squares).sqrt()

    def dot(self, other: "Gradient") -> Tensor:
        """0-dim inner product; parameters that only one of both reaches contribute nothing."""
        return dots([self, other], [(0, 1)], other)[0]

    def aside(self) -> "Gradient":
        """The same gradient, to be looked at later, where it takes none of a GPU's memory: in the host's, pinned, so
        that nothing waits for the copy. On a CPU it is itself."""
        if all(tensor.device.type == "cpu" for tensor in self.tensors.values()):
            return self
        kept = Gradient({i: _on_host(local(tensor)) for i, tensor in self.tensors.items()}, self.total, self.device)
        kept._norm = self.norm
        return kept

    def _sum(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum of 0-dim tensors and over the ranks."""
        if not parts:
            return self.total(torch.zeros((), dtype=torch.double, device=self.device))
        return self.total(torch.stack([over_ranks(part) for part in parts]).sum())

    def scale_(self, factor: Tensor | float) -> "Gradient":
        """Multiply by a number; the norm follows without being measured again."""
        norm = self.norm
        alone = not isinstance(factor, Tensor) or factor.device.type == "cpu"  # a number that can be looked at
        for group in _apart(self.tensors.values()) if not alone or factor != 1 else ():
            torch._foreach_mul_(group, factor.to(group[0].device) if isinstance(factor, Tensor) else factor)
        self._norm = norm * (factor.abs() if isinstance(factor, Tensor) else abs(factor))
        return self

    def add_(self, other: "Gradient") -> "Gradient":
        """Add another; parameters that only the other reaches are taken over as copies."""
        alone = other._copies_beside(self)
        for _, own, more in self._shared(other):
            torch._foreach_add_(own, more)
        self.tensors |= alone
        self._norm = None
        return self

    def plus(self, other: "Gradient") -> "Gradient":
        """The sum with another, in tensors of its own."""
        tensors = self._copies_beside(other) | other._copies_beside(self)
        for places, own, more in self._shared(other):
            tensors |= zip(places, torch._foreach_add(own, more), strict=True)
        return Gradient(tensors, self.total, self.device)

    def _shared(self, other: "Gradient") -> Iterator[tuple[list[int], list[Tensor], list[Tensor]]]:
        """Positions that both reach, with the tensors of both; sharded and plain ones apart."""
        shared = [i for i in self.tensors if i in other.tensors]
        for places in _apart(shared, self.tensors.__getitem__):
            yield places, [self.tensors[i] for i in places], [other.tensors[i] for i in places]

    def _copies_beside(self, other: "Gradient") -> dict[int, Tensor]:
        """Copies of the tensors that the other lacks."""
        return {i: tensor.clone() for i, tensor in self.tensors.items() if i not in other.tensors}

    def changed(self) -> None:
        """To be called after writing to ``tensors``."""
        self._norm = None

    def unmeasured(self) -> "Gradient":
        """The same tensors as a gradient whose norm is not known."""
        return Gradient(self.tensors, self.total, self.device)

    def clone(self) -> "Gradient":
        """A copy with tensors of its own."""
        return Gradient({i: tensor.clone() for i, tensor in self.tensors.items()}, self.total, self.device)


def dots(parts: Sequence[Gradient], pairs: Sequence[tuple[int, int]], like: Gradient) -> list[Tensor]:
    """0-dim inner products of ``pairs`` of ``parts``, by their numbers; parameters that only one of both reaches
    contribute nothing. Parameter by parameter: a cache that holds one serves all pairs, and of what is
    :meth:`Gradient.aside` the device has one parameter's tensors at a time.

    Arguments:
        like: reaches every parameter that two parts reach; its tensors say on which device, and how they are sharded.
    """
    products: list[list[Tensor]] = [[] for _ in pairs]
    for i, tensor in like.tensors.items():
        own = local(tensor)
        here = [_near(part.tensors[i], own) if i in part.tensors else None for part in parts]
        for found, (a, b) in zip(products, pairs, strict=True):
            if (one := here[a]) is not None and (other := here[b]) is not None:
                found.append(share_of_sum(torch.dot(one, other), tensor))
    return [
        parts[a]._sum([torch.stack(group).double().sum() for group in _apart(found)])
        for found, (a, _) in zip(products, pairs, strict=True)
    ]


def _near(tensor: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of a tensor, flat, on the device of another."""
    return local(tensor).to(like.device, non_blocking=True).flatten()


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, which is not waited for."""
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return kept.copy_(tensor, non_blocking=True)


def _apart(items: Iterable[T], tensor_of: Callable[[T], object] = lambda item: item) -> list[list[T]]:
    """Items of plain tensors, and of those that are sharded alike, in groups of their own: torch does not mix them."""
    groups: dict[object, list[T]] = {}
    for item in items:
        tensor = tensor_of(item)
        groups.setdefault(tensor.placements if isinstance(tensor, DTensor) else None, []).append(item)
    return list(groups.values())
