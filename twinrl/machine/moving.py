"""From the host to a device without waiting: through pinned memory, whole as it is, and cast there."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_ON_HOST = WeakIdKeyDictionary()


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on ``device``, in ``dtype`` where given."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device=device, dtype=dtype)


def numbers(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """0-dim tensors as numbers, in one transfer from the device of the first."""
    if not scalars:
        return {}
    device = next(iter(scalars.values())).device
    values = torch.stack([scalar.detach().double().to(device) for scalar in scalars.values()]).tolist()
    return dict(zip(scalars, values, strict=True))


def rows_of(tensor: Tensor, keep: Tensor | slice) -> Tensor:
    """``tensor[keep]``, where positions, or a mask over the rows, may lie on the host."""
    if isinstance(keep, slice):
        return tensor[keep]
    if keep.dtype == torch.bool and keep.device.type == "cpu":
        keep = keep.nonzero().flatten()  # whose size a device would have to be asked for
    return tensor[moved(keep, tensor.device)]


def known(tensor: Tensor, host: Tensor) -> Tensor:
    """The tensor; its values are those of ``host`` as long as nobody writes to it."""
    if tensor.device.type != "cpu":
        _ON_HOST[tensor] = host
    return tensor


def is_noted(tensor: Tensor) -> bool:
    """Whether the host knows the values of a tensor on a device."""
    return tensor in _ON_HOST


def on_host(tensor: Tensor) -> Tensor:
    """Its values on the host; of one that is :func:`known` without waiting."""
    found: Tensor = _ON_HOST.get(tensor, tensor)
    return found.cpu()
