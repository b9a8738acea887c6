"""Reading folders of sharded tensors (torch.distributed.checkpoint) from anybody, without running what they say.

The format describes its tensors in a pickle, and torch unpickles it as it is: whoever wrote the folder could run any
code here. This reader takes descriptions of tensors alone, by a list of classes, and files of the folder alone.
"""

import io
import math
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from twinrl.config.components import told
from twinrl.machine import files
from twinrl.run.fit import corrupted

DESCRIBING = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}  # fmt: skip
"""Module → names that a description of tensors is made of; of ``torch`` itself its sizes and dtypes."""
DESCRIPTIONS = (
    ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorProperties, TensorStorageMetadata, _StorageInfo,
)  # fmt: skip
"""What has a state of its own among them."""
SHARD_NAME = re.compile(r"[\w.-]+\.distcp")


class ShardReader(FileSystemReader):
    """Reads the tensors of a folder.

    Raises:
        pickle.UnpicklingError: from :meth:`read_metadata`: the description names something else than tensors of files
            in the folder.
    """

    def __init__(self, folder: Path):
        super().__init__(str(folder))
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        files.check_plain(self.folder / ".metadata")
        metadata = _unpickled((self.folder / ".metadata").read_bytes())
        there = sum(path.stat().st_size for path in self.folder.glob("*.distcp"))
        if there < sum(map(_bytes, metadata.state_dict_metadata.values())):
            raise pickle.UnpicklingError(f"its files have {there} bytes, fewer than the tensors that it describes")
        metadata.storage_meta.load_id = self.load_id
        return metadata


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Around torch's reading of a folder. Raises InputError where a shard is not what the description says of it, and
    the system's own error where it is about rights or the machine."""
    try:
        yield
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        if isinstance(reason, OSError) and not isinstance(reason, files.GONE):
            raise reason from error
        raise corrupted(folder, f"{type(reason).__name__}: {str(reason).partition(chr(10))[0]:.200}") from error


def _unpickled(description: bytes) -> Any:
    try:
        metadata = _Describing(io.BytesIO(description)).load()
        sound = (
            isinstance(metadata, Metadata)
            and all(isinstance(key, str) and _is_whole(found) for key, found in metadata.state_dict_metadata.items())
            and all(SHARD_NAME.fullmatch(stored.relative_path) for stored in metadata.storage_data.values())
            and metadata.storage_meta is not None
        )
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # whatever a damaged pickle makes of the allowed classes
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
    if not sound:
        raise pickle.UnpicklingError("it describes something else than whole tensors in files of the folder")
    return metadata


def _is_whole(found: Any) -> bool:
    """Whether this describes a tensor that its chunks make up: what none covers would keep what memory held before."""
    return (
        isinstance(found, TensorStorageMetadata)
        and isinstance(found.properties.dtype, torch.dtype)
        and all(_lies_inside(chunk, found.size) for chunk in found.chunks)
        and not any(_overlap(*pair) for pair in _near(found.chunks))
        and sum(math.prod(chunk.sizes) for chunk in found.chunks) == math.prod(found.size)
    )


def _lies_inside(chunk: ChunkStorageMetadata, size: torch.Size) -> bool:
    places = zip(chunk.offsets, chunk.sizes, size, strict=True)
    return all(0 <= start <= start + length <= whole for start, length, whole in places)


def _near(chunks: Sequence[ChunkStorageMetadata]) -> Iterator[tuple[ChunkStorageMetadata, ChunkStorageMetadata]]:
    """The pairs that can overlap: those that do on the axis along which most of them lie. There may be a chunk for
    each of thousands of ranks."""
    filled = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    axes = range(min((len(chunk.offsets) for chunk in filled), default=0))
    if not axes:
        return
    axis = max(axes, key=lambda axis: len({chunk.offsets[axis] for chunk in filled}))
    filled.sort(key=lambda chunk: chunk.offsets[axis])
    for number, a in enumerate(filled):
        for b in (filled[k] for k in range(number + 1, len(filled))):
            if b.offsets[axis] >= a.offsets[axis] + a.sizes[axis]:
                break
            yield a, b


def _overlap(a: ChunkStorageMetadata, b: ChunkStorageMetadata) -> bool:
    places = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(max(first, second) < min(first + m, second + n) for first, m, second, n in places)


def _bytes(found: TensorStorageMetadata) -> int:
    return math.prod(found.size) * found.properties.dtype.itemsize


class _Describing(pickle._Unpickler):
    """Python's own unpickler, whose instructions can be refused one by one; that in C obeys all.

    BUILD sets attributes of anything: of ``PosixPath``, say, whose methods the whole process uses.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        code: method
        for code, method in pickle._Unpickler.dispatch.items()
        if code != pickle.BYTEARRAY8[0]  # takes as much memory as it says before it reads
    }

    def find_class(self, module: str, name: str) -> Any:
        if name in DESCRIBING.get(module, ()) or (module == "torch" and name in _of_torch()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no description of a tensor")

    def load_build(self) -> None:
        changed = cast(Any, self).stack[-2]  # the last is what is to be set
        if not isinstance(changed, DESCRIPTIONS):
            raise pickle.UnpicklingError(f"it changes {told(changed)}, which is no description of a tensor")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


@cache
def _of_torch() -> frozenset[str]:
    return frozenset(["Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))])
