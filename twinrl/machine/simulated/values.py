"""Values of small tensors on the fake device, as long as they are known: times, masks, row numbers.

A fake tensor has no values. What was copied from the host has some all the same, and so has what is computed from
such tensors alone. They are kept beside the fake tensor, so that the program's branches on them are the real ones.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

SMALL = 1 << 17
"""Numbers of the largest tensors that are followed."""
EMPTY = frozenset({"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty"})


class Values:
    """Follows them through operations.

    Arguments:
        fake: mode that makes fake tensors.
    """

    def __init__(self, fake: FakeTensorMode):
        self.fake = fake

    def known(self, tensor: Tensor) -> Tensor | None:
        """The values of a tensor, if there are any."""
        if isinstance(tensor, FakeTensor):
            return getattr(tensor, "_simulated", None)
        return tensor.detach() if tensor.device.type == "cpu" else None

    def remember(self, tensor: Tensor, values: Tensor | None) -> None:
        """These are the values of a fake tensor; None: they are not known."""
        tensor._simulated = values  # type: ignore[attr-defined]

    def lifted(self, tree: Any) -> Any:
        """Real tensors as fake ones on the device whose values are known."""

        def lift(value: Tensor) -> Tensor:
            with self.fake:
                made = torch.empty(value.shape, dtype=value.dtype, device="cuda")
            self.remember(made, value)
            return made

        return tree_map_only(Tensor, lift, tree)

    def follow(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], made: list[Any]) -> None:
        """An operation of ``tensors`` has given ``made``: keep their values where those of all inputs are known."""
        results = [t for t in made if isinstance(t, FakeTensor)]
        if all(t.numel() <= SMALL for t in (*tensors, *results)):
            known = [self.known(t) for t in tensors]
            if all(value is not None for value in known):
                self._compute(func, args, kwargs, results)
                return
        if func._schema.is_mutable:
            for tensor in (*tensors[:1], *results):
                if isinstance(tensor, FakeTensor):
                    self.remember(tensor, None)

    def _compute(self, func: Any, args: Any, kwargs: Any, results: list[FakeTensor]) -> None:
        name = func._schema.name
        if name in EMPTY:
            for tensor in results:
                self.remember(tensor, torch.zeros(tensor.shape, dtype=tensor.dtype))
            return
        if "c10d" in name and not any(kind in name for kind in ("gather", "scatter")):
            return  # other ranks have the same
        if torch.Tag.nondeterministic_seeded in func.tags or "c10d" in name:
            for written in (*results, *_first(args)):
                self.remember(written, None)
            return
        told = {name: "cpu" if name == "device" else value for name, value in kwargs.items() if name != "pin_memory"}
        try:
            real = func(*tree_map_only(Tensor, self.known, args), **tree_map_only(Tensor, self.known, told))
        except (RuntimeError, NotImplementedError):  # an operation without a kernel for the CPU
            return
        values = [t for t in tree_leaves(real) if isinstance(t, Tensor)]
        for tensor, value in zip(results, values, strict=False):
            if tensor.shape == value.shape:
                self.remember(tensor, value)


def _first(args: Any) -> list[Tensor]:
    """The tensors of an operation's first argument, into which a collective writes."""
    return [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, FakeTensor)] if args else []
