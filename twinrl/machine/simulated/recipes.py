"""What operations of fake tensors give, inferred once for each kind of arguments.

A step of a large model runs the same few thousand operations on equal shapes again and again. torch's own cache of them
knows more than is needed here, and takes half of a simulation's time.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import in_kernel_invocation_manager


class Recipe(NamedTuple):
    """How a tensor that an operation gives is made.

    Attributes:
        same: position of the input that it is; −1: it is none. base: of the one whose memory it shows.
        size, stride, offset, dtype, device: of the tensor.
    """

    same: int
    base: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class Recipes:
    """Runs operations.

    Arguments:
        fake: mode that infers what is not known yet.
    """

    def __init__(self, fake: FakeTensorMode):
        self.fake = fake
        self._known: dict[Any, tuple[type | None, list[Recipe]] | None] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __call__(self, func: Any, types: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        """What ``func`` gives of tensors that are all on the device, or in part on the host."""
        if not all(isinstance(tensor, FakeTensor) for tensor in tensors):
            return self.fake.dispatch(func, types, args, kwargs)
        try:
            key = func, _key(args), _key(tuple(kwargs.items()))
            known = self._known.get(key, self)
        except TypeError:  # an argument that is no key
            return self.fake.dispatch(func, types, args, kwargs)
        if known is self:
            out = self.fake.dispatch(func, types, args, kwargs)
            self._known[key] = _recipes(out, tensors)
            return out
        if known is None:
            return self.fake.dispatch(func, types, args, kwargs)
        form, recipes = known  # type: ignore[misc]
        made = [self._made(recipe, tensors) for recipe in recipes]
        return made[0] if form is None and made else None if form is None else form(made)

    def _made(self, recipe: Recipe, tensors: Sequence[Tensor]) -> Tensor:
        if recipe.same >= 0:
            return tensors[recipe.same]
        storage = tensors[recipe.base].untyped_storage() if recipe.base >= 0 else None
        with in_kernel_invocation_manager(self.fake):
            if storage is None:
                made = torch.empty_strided(recipe.size, recipe.stride, dtype=recipe.dtype, device="meta")
            else:
                made = torch.empty(0, dtype=recipe.dtype, device="meta")
                made.set_(storage, recipe.offset, recipe.size, recipe.stride)
        return FakeTensor(self.fake, made, recipe.device)


def _key(value: Any) -> Any:
    """Equal for arguments of which an operation gives alike. Raises TypeError where there is none."""
    if isinstance(value, FakeTensor):
        if value.dtype.is_complex and value.is_conj():
            raise TypeError("a conjugate view")
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device
    if isinstance(value, tuple | list):
        return tuple(map(_key, value))
    if isinstance(value, torch.Generator):
        raise TypeError("a generator")
    return type(value), value


def _recipes(out: Any, tensors: Sequence[Tensor]) -> tuple[type | None, list[Recipe]] | None:
    """How what an operation gave is made of its inputs; None: it cannot be said."""
    if out is None:
        return None, []
    several: Callable[[Any], bool] = lambda found: type(found) in (tuple, list)  # noqa: E731
    made = list(out) if several(out) else [out]
    if not all(isinstance(tensor, FakeTensor) for tensor in made):
        return None
    storages = {tensor.untyped_storage()._cdata: place for place, tensor in reversed(list(enumerate(tensors)))}
    identities = {id(tensor): place for place, tensor in reversed(list(enumerate(tensors)))}
    recipes, fresh = [], set()
    for tensor in made:
        storage = tensor.untyped_storage()._cdata
        if (tensor.dtype.is_complex and tensor.is_conj()) or storage in fresh:
            return None
        same, base = identities.get(id(tensor), -1), storages.get(storage, -1)
        fresh |= {storage} if base < 0 else set()
        recipes.append(
            Recipe(same, base, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.fake_device)
        )
    return type(out) if several(out) else None, recipes
