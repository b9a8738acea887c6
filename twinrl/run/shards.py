"""Reading folders of sharded tensors (torch.distributed.checkpoint) from anybody, without running what they say.

The format describes its tensors in a pickle, and torch unpickles it as it is: whoever wrote the folder could run any
code here. This reader takes descriptions of tensors alone, by a list of classes, and files of the folder alone.
"""

import io
import pickle
import re
from functools import cache
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from twinrl.machine import files

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
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _unpickled(description: bytes) -> Any:
    try:
        metadata = _Describing(io.BytesIO(description)).load()
        sound = (
            isinstance(metadata, Metadata)
            and all(isinstance(found, TensorStorageMetadata) for found in metadata.state_dict_metadata.values())
            and all(SHARD_NAME.fullmatch(stored.relative_path) for stored in metadata.storage_data.values())
            and metadata.storage_meta is not None
        )
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # whatever a damaged pickle makes of the allowed classes
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
    if not sound:
        raise pickle.UnpicklingError("it describes something else than tensors in files of the folder")
    return metadata


class _Describing(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in DESCRIBING.get(module, ()) or (module == "torch" and name in _of_torch()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no description of a tensor")


@cache
def _of_torch() -> frozenset[str]:
    import torch

    return frozenset(["Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))])
