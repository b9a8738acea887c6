"""Checkpoints: everything that a run needs to go on, in safetensors and one JSON file, published atomically.

A checkpoint is a folder ``step-00000500/`` with one ``<part>.safetensors`` for each part (student, ema, …,
optimizer) and ``state.json``. It is written beside its final place and renamed, so a kill during a save never
leaves a half one under its name. No pickle anywhere.

Where several processes train one model, the tensors lie in ``shards/`` instead (:mod:`twinrl.fsdp.checkpoint`); they
are read here too.
"""

import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from twinrl.config import one_line
from twinrl.config.components import ComponentError, told
from twinrl.config.errors import InputError
from twinrl.machine import files
from twinrl.machine import tensors as safetensors
from twinrl.machine.background import in_background
from twinrl.run.layout import SHARDS, STATE, STEP, available, of_step

CHECKPOINT_FORMAT = 2
RUN_FIX = "use the model.network settings that they were trained with"
TENSORS_SHOWN = 3
"""Names of tensors in a message."""
Formats: TypeAlias = Mapping[str, torch.dtype]


class CheckpointState(BaseModel):
    """What ``state.json`` of this format holds; the parts of the run that it is handed to check the rest."""

    model_config = ConfigDict(strict=True, extra="forbid")
    format: Annotated[int, Field(ge=CHECKPOINT_FORMAT, le=CHECKPOINT_FORMAT)]
    step: NonNegativeInt
    iteration: NonNegativeInt
    attempt: NonNegativeInt
    event_count: NonNegativeInt
    log_offset: NonNegativeInt
    events_offset: NonNegativeInt
    teacher_decay: Annotated[float, Field(ge=0, le=1)]
    lr_policy: dict[str, Any]
    early_stop: dict[str, Any]
    gradients: dict[str, Any]
    monitor: dict[str, Any]
    reward: dict[str, Any]
    content_hash: str
    config: dict[str, Any]
    parts: list[Annotated[str, Field(pattern=r"^\w+$")]]
    tensors: dict[str, NonNegativeInt] = {}  # in each part; older checkpoints do not say it


class SaveError(Exception):
    """A checkpoint could not be written; the message is one line with the reason and the remedy."""


@contextmanager
def saving(directory: Path) -> Iterator[None]:
    """Raises SaveError where the disk under ``directory`` is full, read-only or away."""
    try:
        yield
    except OSError as error:
        raise SaveError(
            f"no checkpoint can be written to {directory}; got {' '.join(str(error).split())}; those before are whole; "
            f"fix: make room or mend the rights and resume, or set checkpoint.on_error=continue to go on without"
        ) from error


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        tensors: part → name → tensor.
        state: plain JSON values: step, log offsets, policies' state, configuration.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]

    def part(self, name: str) -> Mapping[str, Tensor]:
        """The tensors of a part. Raises InputError where the checkpoint has none."""
        if name not in self.tensors:
            raise InputError(
                f"the checkpoint of step {self.state['step']} has no part {name}",
                got=f"parts {', '.join(sorted(self.tensors))}",
                fix="use the configuration that it was made with",
            )
        return self.tensors[name]

    @property
    def judged(self) -> Mapping[str, Tensor]:
        """The weights to judge and to start from: the EMA where there is one, else the student."""
        return self.tensors["ema"] if "ema" in self.tensors else self.part("student")


def save(directory: Path, step: int, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint under ``directory`` and remove all but the ``keep`` newest.

    Raises:
        SaveError: the disk is full or read-only; older checkpoints are untouched.
    """
    with saving(directory), publishing(directory, step, keep) as new:
        write(new, checkpoint)
    return directory / of_step(step)


def save_later(directory: Path, step: int, checkpoint: Checkpoint, keep: int) -> "Future[None]":
    """As :func:`save`, in the background and from a copy in memory; the result raises what it would raise."""
    copied = {
        part: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        for part, tensors in checkpoint.tensors.items()
    }

    def write_copy() -> None:
        save(directory, step, Checkpoint(copied, checkpoint.state), keep)

    return in_background(write_copy)


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint's files into ``folder``, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, tensors in checkpoint.tensors.items():
        safetensors.write(folder / f"{part}.safetensors", tensors)
    (folder / STATE).write_text(json.dumps({"format": CHECKPOINT_FORMAT, **checkpoint.state}, indent=1))


@contextmanager
def publishing(directory: Path, step: int, keep: int) -> Iterator[Path]:
    """A folder to write a checkpoint into; at the end of the block it takes its place at once and old ones go."""
    for leftover in directory.glob(f".{STEP}*"):  # of a process that was killed while saving
        files.remove(leftover)
    with files.publishing(directory / of_step(step)) as new:
        new.mkdir(parents=True)
        yield new
    for old in available(directory)[:-keep]:
        shutil.rmtree(old)


def drop_after(directory: Path, step: int) -> None:
    """Remove the checkpoints of steps after ``step``."""
    for path in available(directory):
        if path.name > of_step(step):
            shutil.rmtree(path)


def load(path: Path) -> Checkpoint:
    """The checkpoint in folder ``path``.

    Raises:
        InputError: a file is missing, truncated or not of a checkpoint; names it and the remedy.
    """
    state = load_state(path)
    if (path / SHARDS).is_dir():
        tensors = _load_shards(path / SHARDS)
    else:
        tensors = {file.stem: _load_tensors(file) for file in sorted(path.glob("*.safetensors"))}
    missing = sorted(set(state["parts"]) - set(tensors))
    if missing:
        raise _corrupted(path, f"{missing[0]}.safetensors is missing")
    check_numbers(path, state, tensors)
    return Checkpoint(tensors, state)


def load_state(path: Path) -> dict[str, Any]:
    """The JSON part of the checkpoint in folder ``path``; errors as for :func:`load`."""
    try:
        files.check_plain(path / STATE)
        state = json.loads((path / STATE).read_text())
    except (*files.GONE, ValueError, RecursionError) as error:
        raise _corrupted(path / STATE, error) from error
    try:
        CheckpointState.model_validate(state)
    except ValidationError as error:
        raise _corrupted(path / STATE, one_line(error.errors())) from error
    return state


def check_place(path: Path, state: Mapping[str, Any], steps: int) -> None:
    """Raises InputError where the checkpoint in ``path`` is not the one that a run of so many steps wrote there."""
    if of_step(state["step"]) != path.name or state["step"] > steps:
        raise _corrupted(path / STATE, f"step {state['step']} in the folder {path.name} of a run of {steps} steps")


def check_numbers(path: Path, state: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raises InputError where a part has not as many tensors as the state says."""
    for part, number in state.get("tensors", {}).items():
        if (found := len(parts.get(part, ()))) != number:
            raise _corrupted(path / f"{part}.safetensors", f"{found} tensors instead of {number}")


def check_finite(
    values: Iterable[Tensor],
    state: Mapping[str, Any],
    origin: str | Path,
    whole: Callable[[Tensor], Tensor] = lambda value: value,
) -> None:
    """Raises InputError where numbers are not finite although the run had recorded no event: they are damage.

    Arguments:
        values: parts of the checkpoint. state: of it. origin: where they are from.
        whole: gives the plain number of a result of sharded tensors.
    """
    if state["event_count"] == 0 and not all(bool(whole(value.isfinite().all())) for value in values):
        raise _corrupted(Path(origin), "numbers that are not finite, of a run without an event")


@contextmanager
def entry(origin: str, name: str) -> Iterator[None]:
    """For handing on an entry of a state: raises InputError that names it where its content is not as it was written.

    Arguments:
        origin: the checkpoint. name: of the entry.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise _corrupted(Path(origin) / STATE, f"{name}: {type(error).__name__} {error}") from error


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.load(path)
    except (*files.GONE, SafetensorError) as error:
        raise _corrupted(path, error) from error


def shard_metadata(folder: Path) -> dict[str, Any]:
    """Key (``<part>/<name>``) → what is known of a tensor in a folder of shards.

    Raises:
        InputError: there is none, or it is damaged.
    """
    from twinrl.run.shards import ShardReader

    try:
        return ShardReader(folder).read_metadata().state_dict_metadata
    except (*files.GONE, EOFError, pickle.UnpicklingError) as error:
        raise _corrupted(folder, error) from error


def _load_shards(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The whole tensors of a folder of shards, in this process alone, by part and name."""
    from torch.distributed import checkpoint

    from twinrl.run.shards import ShardReader

    flat = {key: torch.empty(m.size, dtype=m.properties.dtype) for key, m in shard_metadata(folder).items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # this process alone is meant
            checkpoint.load(flat, storage_reader=ShardReader(folder), no_dist=True)
    except (*files.GONE, checkpoint.CheckpointException) as error:
        raise _corrupted(folder, str(error).splitlines()[0]) from error
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        part, _, name = key.partition("/")
        tensors.setdefault(part, {})[name] = value
    return tensors


def _corrupted(path: Path, reason: object) -> InputError:
    return InputError(
        f"{path} is corrupted or not a twinrl checkpoint",
        got=reason,
        fix="delete the checkpoint's folder to resume from the one before it",
    )


# --- modules and optimizers -------------------------------------------------------------------------------


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
        raise _corrupted(Path(origin), f"{len(retyped)} of another format ({few(retyped)})")


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
            raise _corrupted(Path(origin), f"{counted:g} steps of parameter {number} at step {step} of the run")


def parameter_of(key: str, shape: torch.Size, parameters: Sequence[Tensor], origin: str) -> Tensor:
    """The parameter to which an entry of an optimizer's state belongs. Raises InputError where there is none."""
    index, _, _ = key.partition(".")
    known = index.isdecimal() and int(index) < len(parameters)
    if not known or (shape and shape != parameters[int(index)].shape):
        raise InputError(
            f"the optimizer's state in {origin} belongs to another network",
            got=f"key {key} of shape {tuple(shape)}",
            fix=RUN_FIX,
        )
    return parameters[int(index)]


def _another_optimizer(origin: str, got: str, expected: str) -> InputError:
    return InputError(
        f"the optimizer's state in {origin} is damaged or another optimizer's", got=got, expected=expected,
        fix="use the optim settings of the checkpoint, or delete its folder to resume from the one before it",
    )  # fmt: skip
