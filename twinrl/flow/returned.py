"""What methods of own components return in tensors: checked, so that a mistake is told where it is made."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from twinrl.config.components import ComponentError, Returned, all_of, checked, told, wrong_return
from twinrl.flow.source import Data, Split


def check_condition(value: object, rows: int, owner: object, method: str) -> None:
    """Raises InputError where ``value`` is no condition of so many rows: name → (B, ...)."""
    for name, tensor in checked(value, Mapping, owner, method).items():  # type: ignore[type-abstract]
        if len(checked(tensor, Tensor, owner, method).shape[:1]) == 0 or len(tensor) != rows:
            raise wrong_return(tensor, owner, f"{method}.{name}", f"{rows} rows")


def check_aux(value: object, rows: int, owner: object, method: str) -> None:
    """Raises InputError where ``value`` is not metric name → a number of every row, (B,)."""
    for name, numbers in checked(value, Mapping, owner, method).items():  # type: ignore[type-abstract]
        checked(numbers, Tensor, owner, f"{method}.{name}", (rows,))


# --- a data source of one's own -----------------------------------------------------------------------------

Arguments = tuple[Any, ...]


def _prompts(value: Any, owner: Any, method: str, arguments: Arguments) -> None:
    """One caption for each of the labels."""
    all_of(Sequence, str)(value, owner, method, arguments)
    if len(value) != len(arguments[0]) or isinstance(value, str):
        raise wrong_return(value, owner, method, f"{len(arguments[0])} captions")


def _condition(value: Any, owner: Any, method: str, arguments: Arguments) -> None:
    """Of the prompts; names and shapes as of the empty condition."""
    check_condition(value, len(arguments[0]), owner, method)
    for name, empty in owner.null_condition(1).items():
        if name not in value or value[name].shape[1:] != empty.shape[1:] or value[name].dtype != empty.dtype:
            raise wrong_return(value.get(name), owner, f"{method}.{name}", f"{empty.dtype} (B, {empty.shape[1:]})")


def _null(value: Any, owner: Any, method: str, arguments: Arguments) -> None:
    check_condition(value, arguments[0], owner, method)


def _latents(value: Any, owner: Any, method: str, arguments: Arguments) -> None:
    """Of a picture of the data's size; the latents of a family's data have several."""
    checked(value, Tensor, owner, method)
    if value.ndim != 4 or len(value) != len(arguments[0]):
        raise wrong_return(value, owner, method, f"latents ({len(arguments[0])}, C, h, w)")


def _all_latents(value: Any, owner: Any, method: str, arguments: Arguments) -> None:
    """Of the split that is asked for."""
    checked(value, Tensor, owner, method, (len(getattr(owner, arguments[0])), *owner.latent_shape))


def _pixels(value: Any, owner: Any, method: str, arguments: Arguments) -> None:
    checked(value, Tensor, owner, method)
    if value.ndim != 4 or len(value) != len(arguments[0]) or value.shape[1] not in (1, 3):
        raise wrong_return(value, owner, method, f"pixels ({len(arguments[0])}, 1 or 3, H, W)")


def _itself(value: Any, owner: Any, method: str, arguments: Arguments) -> None:
    checked(value, type(owner), owner, method)


RETURNS: Mapping[str, Returned] = {
    "latents": _all_latents, "encode": _latents, "decode": _pixels, "condition": _condition, "null_condition": _null,
    "to": _itself, "prompts": _prompts, "teacher_weights": all_of(Mapping, Tensor),
}  # fmt: skip
"""Method of a data source → what it returns."""


def check_attributes(source: Data, named: str) -> None:
    """Raises InputError where an attribute of a data source is not what it should be."""
    shape, classes = source.latent_shape, getattr(source, "classes", ("",))
    sizes = isinstance(shape, Sequence) and [size for size in shape if isinstance(size, int) and size > 0]
    right = {
        "latent_shape": (bool(sizes) and len(shape) == len(sizes or ()) == 3, "(C, H, W)"),
        "name": (isinstance(source.name, str), "text"),
        "content_hash": (isinstance(source.content_hash, str), "a hex digest"),
        "scorers": (isinstance(source.scorers, Mapping) and all(map(callable, source.scorers.values())), "functions"),
        "held_out": (isinstance(source.held_out, frozenset | set), "a frozenset of names"),
        "classes": (isinstance(classes, Sequence) and len(classes) > 0 and not isinstance(classes, str), "names"),
    }
    for split in ("train", "validation", "test"):
        right[split] = _is_split(getattr(source, split, None), len(classes)), "a Split of pixels and labels"
    for attribute, (fits, expected) in right.items():
        if not fits and hasattr(source, attribute):
            raise ComponentError(f"{named}: {attribute} is {told(getattr(source, attribute))}", expected=expected)


def _is_split(value: Any, classes: int) -> bool:
    """Whether pixels (N, C, H, W) and labels (N,) of the classes belong together."""
    if not isinstance(value, Split) or not isinstance(value.pixels, Tensor) or not isinstance(value.labels, Tensor):
        return False
    pixels, labels = value.pixels, value.labels
    known = labels.ndim == 1 and not labels.is_floating_point() and bool(((labels >= 0) & (labels < classes)).all())
    return pixels.ndim == 4 and pixels.is_floating_point() and 0 < len(pixels) == len(labels) and known
