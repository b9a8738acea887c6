"""Folders of shards are read, whoever wrote them, and nothing that they say is run."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata

from tests.disk import another_user, open_folder
from tests.states import STATE
from twinrl.config.errors import InputError
from twinrl.fsdp import checkpoint as sharded
from twinrl.run import checkpoints
from twinrl.run.checkpoints import SHARDS, Checkpoint

TENSORS = {"student": {"weight": torch.arange(6.0).view(2, 3), "half": torch.ones(4, dtype=torch.bfloat16)}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint with shards."""
    whole = Checkpoint(TENSORS, {**STATE, "parts": ["student"]})
    checkpoints.write(tmp_path / "whole", whole)
    folder = tmp_path / "step-00000000"
    folder.mkdir()
    (tmp_path / "whole" / "state.json").rename(folder / "state.json")
    flat = {f"student/{name}": value for name, value in TENSORS["student"].items()}
    dcp.save(flat, checkpoint_id=str(folder / SHARDS), no_dist=True)
    return folder


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def changed(folder: Path, change: Callable[[Any], object]) -> None:
    """Change the description of the shards."""
    path = folder / SHARDS / ".metadata"
    described = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(described) or described))


READERS = {"alone": lambda path: checkpoints.load(path), "in parts": lambda path: sharded.load(path)}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_tensors_are_read(saved: Path, reader: Callable[[Path], Checkpoint]) -> None:
    found = reader(saved).part("student")
    for name, value in TENSORS["student"].items():
        assert torch.equal(found[name], value)
        assert found[name].dtype == value.dtype


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("inside", [False, True])
def test_a_description_is_not_run(
    saved: Path, tmp_path: Path, reader: Callable[[Path], Checkpoint], inside: bool
) -> None:
    attack = Attack(tmp_path / "proof")
    changed(saved, lambda described: setattr(described, "planner_data", attack) if inside else attack)
    with pytest.raises(InputError, match=r"shards is corrupted.*names posix\.mkdir, which is no description"):
        reader(saved)
    assert not attack.proof.exists()


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_description_changes_no_class(saved: Path, reader: Callable[[Path], Checkpoint]) -> None:
    """BUILD sets attributes of whatever it is given: here of the class whose methods everybody uses."""
    state = b"N}X\x04\x00\x00\x00evilI1\ns\x86"  # (None, {"evil": 1}): attributes that are no state
    (saved / SHARDS / ".metadata").write_bytes(b"\x80\x02cpathlib\nPosixPath\n" + state + b"b.")
    with pytest.raises(InputError, match="it changes the class PosixPath, which is no description"):
        reader(saved)
    assert not hasattr(Path, "evil")


def test_a_description_takes_no_memory_that_it_does_not_fill(saved: Path) -> None:
    (saved / SHARDS / ".metadata").write_bytes(b"\x80\x05" + pickle.BYTEARRAY8 + (2**50).to_bytes(8, "little") + b".")
    with pytest.raises(InputError, match="shards is corrupted"):
        checkpoints.load(saved)


def _elsewhere(described: Any) -> None:
    for stored in described.storage_data.values():
        stored.relative_path = "../../secret"


def _of_bytes(described: Any) -> None:  # torch would unpickle their content
    described.state_dict_metadata["student/weight"] = BytesStorageMetadata()


def _other(**values: Any) -> Callable[[Any], None]:
    """A change of what is said of one tensor."""

    def change(described: Any) -> None:
        for name, value in values.items():
            setattr(described.state_dict_metadata["student/weight"], name, value)

    return change


def _huge(described: Any) -> None:
    weight = described.state_dict_metadata["student/weight"]
    weight.size = weight.chunks[0].sizes = torch.Size([10**13, 3])


INCOMPLETE = {
    "no chunk": _other(chunks=[]),
    "a chunk too little": _other(size=torch.Size([3, 3])),
    "beyond the edge": _other(chunks=[ChunkStorageMetadata(torch.Size([1, 0]), torch.Size([2, 3]))]),
    "twice the same": _other(
        size=torch.Size([4, 3]), chunks=[ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))] * 2
    ),
    "one over the other": _other(
        size=torch.Size([4, 3]),
        chunks=[ChunkStorageMetadata(torch.Size([first, 0]), torch.Size([2, 3])) for first in (0, 1)],
    ),
    "one over the other, on the second axis": _other(
        size=torch.Size([2, 6]),
        chunks=[ChunkStorageMetadata(torch.Size([0, first]), torch.Size([2, 3])) for first in (0, 2)],
    ),
    "one over the other, in a grid": _other(
        size=torch.Size([4, 4]),
        chunks=[ChunkStorageMetadata(torch.Size(at), torch.Size([2, 2])) for at in ([0, 0], [0, 2], [2, 0], [1, 2])],
    ),
    "negative": _other(size=torch.Size([-2, -3])),
    "no size": _other(size="text"),
    "no dtype": lambda described: setattr(described.state_dict_metadata["student/weight"].properties, "dtype", None),
    "no name": lambda described: described.state_dict_metadata.update({5: None}),
    "more than there is": _huge,
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("change", INCOMPLETE.values(), ids=INCOMPLETE)
def test_a_tensor_that_is_not_whole_is_refused(
    saved: Path, reader: Callable[[Path], Checkpoint], change: Callable[[Any], None]
) -> None:
    """Or what memory held before would be its values."""
    changed(saved, change)
    with pytest.raises(InputError, match="shards is corrupted"):
        reader(saved)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_damaged_shard_is_named(saved: Path, reader: Callable[[Path], Checkpoint]) -> None:
    (shard,) = (saved / SHARDS).glob("*.distcp")
    content = shard.read_bytes()
    shard.write_bytes(bytes(200) + content[200:])
    with pytest.raises(InputError, match=r"shards is corrupted .*; got \w*Error: "):
        reader(saved).part("student")["weight"]


def test_a_shard_that_may_not_be_read_is_not_called_corrupted(saved: Path) -> None:
    with open_folder() as folder:
        moved = shutil.copytree(saved, folder / saved.name)
        (shard,) = (moved / SHARDS).glob("*.distcp")
        shard.chmod(0o000)
        with another_user(), pytest.raises(PermissionError):
            checkpoints.load(moved)


@pytest.mark.parametrize("change", [_elsewhere, _of_bytes, lambda described: setattr(described, "storage_data", 7)])
def test_a_description_of_something_else_is_refused(saved: Path, change: Callable[[Any], None]) -> None:
    changed(saved, change)
    with pytest.raises(InputError, match="shards is corrupted"):
        checkpoints.load(saved)


def test_a_shard_is_not_run(saved: Path, tmp_path: Path) -> None:
    (shard,) = (saved / SHARDS).glob("*.distcp")
    torch.save({"weight": Attack(tmp_path / "proof")}, tmp_path / "bad")
    content = (tmp_path / "bad").read_bytes()
    shard.write_bytes(content)

    def all_of_it(described: Any) -> None:
        for stored in described.storage_data.values():
            stored.offset, stored.length = 0, len(content)

    changed(saved, all_of_it)
    with pytest.raises(InputError, match="shards is corrupted"):
        checkpoints.load(saved)
    assert not (tmp_path / "proof").exists()
