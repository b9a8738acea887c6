"""Whether tensors fit: weights of a module and the state of an optimizer, loaded strictly or refused in one line."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from twinrl.config.components import ComponentError, told
from twinrl.config.errors import InputError

RUN_FIX = "use the model.network settings that they were trained with"
TENSORS_SHOWN = 3
"""Names of tensors in a message."""
Formats: TypeAlias = Mapping[str, torch.dtype]
SCALE = "_scale"
"""Ends the name of what an optimizer keeps of each block of a parameter's numbers."""


def corrupted(path: Path, reason: object) -> InputError:
    """The refusal of a file of a checkpoint."""
    return InputError(
        f"{path} is corrupted or not a twinrl checkpoint",
        got=reason,
        fix="delete the checkpoint's folder to resume from the one before it",
    )


def load_module(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    origin: str | Path,
    fix: str = RUN_FIX,
    assign: bool = False,
    formats: Formats | None = None,
) -> None:
    """Load weights strictly, or let the module take these very tensors.

    Arguments:
        formats: as for :func:`check_fit`.

    Raises:
        InputError: names, shapes or formats differ; says which, where they came from, and ``fix``.
    """
    check_fit(module.state_dict(), tensors, origin, fix, formats)
    module.load_state_dict(dict(tensors), assign=assign)


def check_fit(
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    origin: str | Path,
    fix: str = RUN_FIX,
    formats: Formats | None = None,
) -> None:
    """Raises InputError where names, shapes or formats of a module's tensors differ from those given.

    Arguments:
        own: of the module. given: may be without values.
        formats: the format that a tensor may have beside its own; None: numbers of 16 bits and more are as good as
            each other.
    """
    missing, unexpected = (sorted(one.keys() - other.keys()) for one, other in ((own, given), (given, own)))
    both = [(name, tensor, given[name]) for name, tensor in own.items() if name in given]
    reshaped = [(name, tensor.shape, other.shape) for name, tensor, other in both if tensor.shape != other.shape]
    refuse_misfit(missing, unexpected, reshaped, origin, fix)
    retyped = [
        f"{name} {_called(other.dtype)} instead of {_called(tensor.dtype)}"
        for name, tensor, other in both
        if not _may_be(tensor.dtype, other.dtype, None if formats is None else formats.get(name, tensor.dtype))
    ]
    if retyped:
        raise corrupted(Path(origin), f"{len(retyped)} of another format ({few(retyped)})")


def _may_be(own: torch.dtype, given: torch.dtype, other: torch.dtype | None) -> bool:
    wide = own.is_floating_point and given.is_floating_point and given.itemsize >= 2
    return given in (own, other) if other is not None else given == own or wide


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def refuse_misfit(
    missing: Sequence[str],
    unexpected: Sequence[str],
    reshaped: Iterable[tuple[str, Iterable[int], Iterable[int]]],
    origin: str | Path,
    fix: str,
) -> None:
    """Raises InputError in one line unless all three are empty; ``reshaped``: name, a module's own shape, the other."""
    shapes = [f"{name} {tuple(given)} instead of {tuple(own)}" for name, own, given in reshaped]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    found = [f"{len(names)} {kind} ({few(names)})" for kind, names in kinds.items() if names]
    if found:
        raise InputError(f"the weights of {origin} belong to another network", got=f"keys {'; '.join(found)}", fix=fix)


def few(names: Iterable[str]) -> str:
    """The first names, for a message."""
    names = list(names)
    return ", ".join(map(str, names[:TENSORS_SHOWN])) + (", …" if len(names) > TENSORS_SHOWN else "")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``"<parameter index>.<name>"`` → tensor.

    Raises:
        ComponentError: one's own keeps something that is no tensor and no number.
    """
    state = optimizer.state_dict()["state"]
    flat = {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}
    try:
        return {key: torch.as_tensor(value) for key, value in flat.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        key, value = next((key, value) for key, value in flat.items() if not isinstance(value, Tensor | int | float))
        what = f"{type(optimizer).__module__}.{type(optimizer).__qualname__} keeps what no checkpoint takes"
        raise ComponentError(what, got=f"{told(value)} as {key}", expected="tensors and numbers") from error


Kept: TypeAlias = Callable[[Tensor], Mapping[str, Tensor]]
"""Parameter → what the optimizer keeps of such a one after a step, by name."""


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], origin: str, kept: Kept | None = None
) -> None:
    """The inverse of :func:`optimizer_tensors`; learning rates stay as configured.

    Arguments:
        kept: as for :func:`check_optimizer`.

    Raises:
        InputError: the state belongs to other parameters or another optimizer; names the first key and where it came
            from.
    """
    check_optimizer(optimizer, tensors, origin, kept)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def check_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], origin: str, kept: Kept | None = None
) -> None:
    """Raises InputError where a state, maybe without values, is not one of this optimizer over its parameters.

    Arguments:
        kept: what it keeps of a parameter; None where that is not known.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        parameter_of(key, value.shape, parameters, origin)
        index, _, name = key.partition(".")
        found.setdefault(int(index), {})[name] = value
    if kept is None:
        return
    for number, entries in found.items():
        expected = kept(parameters[number])
        if entries.keys() != expected.keys():
            got, right = (", ".join(sorted(each)) for each in (entries, expected))
            raise _another_optimizer(origin, f"of parameter {number} {got}", right)
        for name, entry in entries.items():
            if entry.dtype != expected[name].dtype or (entry.ndim == 0) != (expected[name].ndim == 0):
                got, right = (f"{_called(t.dtype)} of {t.ndim} dimensions" for t in (entry, expected[name]))
                raise _another_optimizer(origin, f"key {number}.{name}, {got}", right)


def check_steps(optimizer: torch.optim.Optimizer, step: int, origin: str) -> None:
    """Raises InputError where the optimizer counts other steps of a parameter than a run of ``step`` has made."""
    for number, state in enumerate(optimizer.state.values()):
        if "step" in state and not 1 <= (counted := float(state["step"])) <= step:
            raise corrupted(Path(origin), f"{counted:g} steps of parameter {number} at step {step} of the run")


def parameter_of(key: str, shape: torch.Size, parameters: Sequence[Tensor], origin: str) -> Tensor:
    """The parameter to which an entry of an optimizer's state belongs. Raises InputError where there is none."""
    index, _, _ = key.partition(".")
    known = index.isdecimal() and int(index) < len(parameters)
    if not known or (shape and not _fits(key, shape, parameters[int(index)])):
        raise InputError(
            f"the optimizer's state in {origin} belongs to another network",
            got=f"key {key} of shape {tuple(shape)}",
            fix=RUN_FIX,
        )
    return parameters[int(index)]


def _fits(key: str, shape: torch.Size, parameter: Tensor) -> bool:
    of_blocks = key.endswith(SCALE) and len(shape) == 1 and shape[0] > 0 and parameter.numel() % shape[0] == 0
    return of_blocks or shape == parameter.shape


def _another_optimizer(origin: str, got: str, expected: str) -> InputError:
    return InputError(
        f"the optimizer's state in {origin} is damaged or another optimizer's", got=got, expected=expected,
        fix="use the optim settings of the checkpoint, or delete its folder to resume from the one before it",
    )  # fmt: skip
