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
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from twinrl.config import one_line
from twinrl.config.errors import InputError
from twinrl.machine import files
from twinrl.machine import tensors as safetensors
from twinrl.machine.background import in_background
from twinrl.run.fit import corrupted
from twinrl.run.layout import SHARDS, STATE, STEP, available, of_step

CHECKPOINT_FORMAT = 2


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
        raise corrupted(path, f"{missing[0]}.safetensors is missing")
    check_numbers(path, state, tensors)
    return Checkpoint(tensors, state)


def load_state(path: Path) -> dict[str, Any]:
    """The JSON part of the checkpoint in folder ``path``; errors as for :func:`load`."""
    try:
        files.check_plain(path / STATE)
        state = json.loads((path / STATE).read_text())
    except (*files.GONE, ValueError, RecursionError) as error:
        raise corrupted(path / STATE, error) from error
    try:
        CheckpointState.model_validate(state)
    except ValidationError as error:
        raise corrupted(path / STATE, one_line(error.errors())) from error
    return state


def check_place(path: Path, state: Mapping[str, Any], steps: int) -> None:
    """Raises InputError where the checkpoint in ``path`` is not the one that a run of so many steps wrote there."""
    if of_step(state["step"]) != path.name or state["step"] > steps:
        raise corrupted(path / STATE, f"step {state['step']} in the folder {path.name} of a run of {steps} steps")


def check_numbers(path: Path, state: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raises InputError where a part has not as many tensors as the state says."""
    for part, number in state.get("tensors", {}).items():
        if (found := len(parts.get(part, ()))) != number:
            raise corrupted(path / f"{part}.safetensors", f"{found} tensors instead of {number}")


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
        raise corrupted(Path(origin), "numbers that are not finite, of a run without an event")


@contextmanager
def entry(origin: str, name: str) -> Iterator[None]:
    """For handing on an entry of a state: raises InputError that names it where its content is not as it was written.

    Arguments:
        origin: the checkpoint. name: of the entry.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise corrupted(Path(origin) / STATE, f"{name}: {type(error).__name__} {error}") from error


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.load(path)
    except (*files.GONE, SafetensorError) as error:
        raise corrupted(path, error) from error


def shard_metadata(folder: Path) -> dict[str, Any]:
    """Key (``<part>/<name>``) → what is known of a tensor in a folder of shards.

    Raises:
        InputError: there is none, or it is damaged.
    """
    from twinrl.run.shards import ShardReader

    try:
        return ShardReader(folder).read_metadata().state_dict_metadata
    except (*files.GONE, EOFError, pickle.UnpicklingError) as error:
        raise corrupted(folder, error) from error


def _load_shards(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The whole tensors of a folder of shards, in this process alone, by part and name."""
    from torch.distributed import checkpoint

    from twinrl.run import shards

    flat = {key: torch.empty(m.size, dtype=m.properties.dtype) for key, m in shard_metadata(folder).items()}
    with warnings.catch_warnings(), shards.reading(folder):
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # this process alone is meant
        checkpoint.load(flat, storage_reader=shards.ShardReader(folder), no_dist=True)
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        part, _, name = key.partition("/")
        tensors.setdefault(part, {})[name] = value
    return tensors
