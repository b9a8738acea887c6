"""What the engine sees of a step: named scalar losses, micro-batch by micro-batch, and how they are back-propagated.

The engine knows no terms and no networks. Who has losses (the trainer's passes, or somebody's own training loop)
gives them as a :class:`MicroBatch`.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scalars:
    """The losses of a micro-batch, for as long as their graphs are kept.

    Attributes:
        total: scalars that sum to the loss.
        named: name → scalars; the gradient of their sum goes by that name. A name without scalars is left out.
        outputs: predictions, at which the output space takes each name's gradient.
        with_graphs: gives the outputs with their graphs; where these were cut, of the same passes once more.
    """

    total: Sequence[Tensor]
    named: Mapping[str, Sequence[Tensor]]
    outputs: Sequence[Tensor]
    with_graphs: Callable[[], AbstractContextManager[Sequence[Tensor]]]


class MicroBatch(Protocol):
    """Named losses of one micro-batch. Several make a step; the same names have their gradients summed."""

    def begin(self) -> None:
        """The step begins; asked of each micro-batch in turn, before any is evaluated."""

    def graphs(self, name: str | None = None) -> Set[str]:
        """The graphs, by names of the owner's choice, that the losses of ``name`` (None: all) go through; empty where
        the micro-batch holds nothing of it. A graph is kept until no later name goes through it."""
        ...

    def evaluated(self, name: str | None = None, cut: bool = False) -> AbstractContextManager[Scalars]:
        """The losses with their graphs, which are let go of on leaving, and made again when asked for.

        Arguments:
            name: only these losses; None: all.
            cut: the graphs may end at the outputs, where gradients with respect to these are all that is wanted.
        """
        ...


class Backward(Protocol):
    """Adds gradients to ``.grad``."""

    def __call__(
        self, name: str | None, tensors: Sequence[Tensor], cotangents: Sequence[Tensor] | None, retain_graph: bool
    ) -> None:
        """As :func:`torch.autograd.backward`.

        Arguments:
            name: whose gradient it is; None: of the sum.
            tensors: a scalar without ``cotangents``, or predictions with theirs.
            cotangents: gradients with respect to ``tensors``.
            retain_graph: whether another backward goes through the same graph.
        """
        ...


def backward(
    name: str | None, tensors: Sequence[Tensor], cotangents: Sequence[Tensor] | None, retain_graph: bool
) -> None:
    """The :class:`Backward` of parameters that need nothing else; works for sharded ones, too."""
    torch.autograd.backward(list(tensors), None if cotangents is None else list(cotangents), retain_graph=retain_graph)


def in_own_memory(gradients: Sequence[Tensor | None]) -> dict[int, Tensor]:
    """Position → gradient, of those that there are, as tensors that can be written to.

    Autograd may give one element for many (of a broadcast) and one tensor twice (of a sum).
    """
    found: dict[int, Tensor] = {}
    taken: set[int] = set()
    for i, gradient in enumerate(gradients):
        if gradient is not None:
            own = gradient.contiguous()
            found[i] = own.clone() if own.data_ptr() in taken else own
            taken.add(own.data_ptr())
    return found
