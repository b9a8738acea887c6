"""Sharded checkpoints: every rank writes its part, any number of ranks reads them.

A checkpoint is the folder of :mod:`twinrl.run.checkpoints` with ``shards/`` (torch.distributed.checkpoint) in the place
of the safetensors files; ``state.json`` is the same. All ranks write beside the final place; when the last one is done,
rank 0 renames. Both kinds are read by either reader.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from twinrl.fsdp.agreement import on_first
from twinrl.fsdp.initial import META, SafetensorsPart, Stored, described, read_into
from twinrl.machine import files
from twinrl.machine.background import in_background
from twinrl.run import checkpoints, fit, layout, shards
from twinrl.run.checkpoints import SHARDS, Checkpoint
from twinrl.run.shards import ShardReader


def save(directory: Path, step: int, checkpoint: Checkpoint, keep: int) -> None:
    """Write a checkpoint of sharded tensors, all ranks together, and remove all but the ``keep`` newest.

    Raises:
        SaveError: it could not be written; older checkpoints are untouched.
    """
    with _saving(directory), ExitStack() as publication:
        folder = _begin(publication, directory, step, keep)
        dcp.save(_flat(checkpoint.tensors), checkpoint_id=str(folder / SHARDS))
        on_first(lambda: _publish(publication, directory, folder, checkpoint.state))


def save_later(
    directory: Path, step: int, checkpoint: Checkpoint, keep: int, group: dist.ProcessGroup
) -> "Future[None]":
    """As :func:`save`, in the background and from a copy in memory of what each rank holds.

    Rank 0 publishes it when all ranks have written; no other checkpoint may be begun in the directory before. What is
    to be done about a failure must be agreed upon: a rank knows only of its own and of those while writing.

    Arguments:
        directory, step, checkpoint, keep: as for :func:`save`.
        group: of all ranks, for the background's collectives alone.
    """
    publication = ExitStack()
    folder = _begin(publication, directory, step, keep)
    written = dcp.async_save(_flat(checkpoint.tensors), checkpoint_id=str(folder / SHARDS), process_group=group)
    assert isinstance(written, Future)

    def finish() -> None:
        with _saving(directory), publication:
            written.result()
            if dist.get_rank() == 0:
                _publish(publication, directory, folder, checkpoint.state)

    return in_background(finish)


def _begin(publication: ExitStack, directory: Path, step: int, keep: int) -> Path:
    """The folder to write into, made by rank 0, which publishes it at the end."""

    def make() -> None:
        with checkpoints.saving(directory):
            publication.enter_context(checkpoints.publishing(directory, step, keep))

    on_first(make)
    return files.unfinished(directory / layout.of_step(step))


def _publish(publication: ExitStack, directory: Path, folder: Path, state: Mapping[str, Any]) -> None:
    with checkpoints.saving(directory):
        _describe(folder, state)
        publication.close()


@contextmanager
def _saving(directory: Path) -> Iterator[None]:
    """As :func:`twinrl.run.checkpoints.saving`, of what the ranks tell each other when one of them could not write."""
    with checkpoints.saving(directory):
        try:
            yield
        except dcp.CheckpointException as error:
            rank, (reason, _) = next(iter(error.failures.items()))
            if not isinstance(reason, OSError | RuntimeError):  # torch's writer fails with either
                raise
            why = reason if isinstance(reason, OSError) else f"torch's writer of files failed ({reason})"
            raise OSError(f"{why} on rank {rank}") from error


def _describe(folder: Path, state: Mapping[str, Any]) -> None:
    (folder / layout.STATE).write_text(json.dumps({"format": checkpoints.CHECKPOINT_FORMAT, **state}, indent=1))


def _flat(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    return {f"{part}/{name}": tensor.detach() for part, found in tensors.items() for name, tensor in found.items()}


def load(path: Path) -> Checkpoint:
    """The checkpoint in folder ``path``, of either kind; tensors are read where they are put to use."""
    state = checkpoints.load_state(path)
    parts: dict[str, Mapping[str, Tensor]]
    if (path / SHARDS).is_dir():
        parts = {part: ShardedPart(path / SHARDS, part) for part in state["parts"]}
    else:
        parts = {part: SafetensorsPart([path / f"{part}.safetensors"]) for part in state["parts"]}
    checkpoints.check_numbers(path, state, parts)
    return Checkpoint(parts, state)


class ShardedPart(Stored):
    """One part of a checkpoint of torch.distributed.checkpoint, resharded as it is read."""

    def __init__(self, folder: Path, part: str):
        self.reader, self.part = ShardReader(folder), part
        self._metadata = checkpoints.shard_metadata(folder)

    def _of_part(self) -> dict[str, Any]:
        start = f"{self.part}/"
        return {key.removeprefix(start): found for key, found in self._metadata.items() if key.startswith(start)}

    def described(self) -> dict[str, Tensor]:
        parts = self._of_part().items()
        return {name: torch.empty(found.size, dtype=found.properties.dtype, device=META) for name, found in parts}

    def __getitem__(self, name: str) -> Tensor:
        found = self._of_part()[name]
        whole = torch.empty(found.size, dtype=found.properties.dtype)
        self.read_into({name: whole})
        return whole

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        wanted = {f"{self.part}/{name}": tensor.detach() for name, tensor in targets.items()}
        with shards.reading(self.reader.folder):
            dcp.load(wanted, storage_reader=self.reader, no_dist=not dist.is_initialized())


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    origin: str,
    kept: fit.Kept | None = None,
) -> None:
    """As :func:`twinrl.run.fit.load_optimizer`, into state that is sharded as the parameters are."""
    parameters, entries = [p for group in optimizer.param_groups for p in group["params"]], described(tensors)
    fit.check_optimizer(optimizer, entries, origin, kept)
    targets = {key: _target(key, entry, parameters, origin) for key, entry in entries.items()}
    read_into(targets, tensors)
    fit.load_optimizer(optimizer, targets, origin)


def _target(key: str, entry: Tensor, parameters: list[Tensor], origin: str) -> Tensor:
    """An empty tensor for one entry of the state: sharded as its parameter if it has its shape."""
    parameter = fit.parameter_of(key, entry.shape, parameters, origin)
    if isinstance(parameter, DTensor) and parameter.shape == entry.shape:
        return torch.empty_like(parameter.detach(), dtype=entry.dtype)
    return torch.empty(entry.shape, dtype=entry.dtype)
