"""Checkpoints of published reward models: found, read without running code from them, loaded strictly.

Every failure is one line: where it looked and how to name a local file, a damaged file, or the first keys in which
a checkpoint of another architecture differs.
"""

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinrl.config.errors import InputError
from twinrl.run.fit import few

PUBLISHED = "use the published file, or the architecture that it belongs to"
"""What to do about weights that do not fit."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the Hugging Face hub."""

    repo: str
    filename: str


def located(path: Path | None, hub: HubFile, setting: str) -> Path:
    """The local file ``path``, else the hub's, downloaded on first use.

    Arguments:
        path: the user's own file.
        hub: where the published file is.
        setting: dotted key of the setting that names a local file, for the message.

    Raises:
        InputError: no such file, or it is neither cached nor can it be downloaded.
    """
    if path is not None:
        if not path.is_file():
            raise InputError(f"{setting} is no file", got=path, fix=f"put {hub.filename} (hub: {hub.repo}) there")
        return path
    from huggingface_hub import hf_hub_download

    with _reported(f"{hub.filename} of {hub.repo}", setting, "the file"):
        return Path(hf_hub_download(hub.repo, hub.filename))


def located_folder(path: Path | None, repo: str, setting: str) -> Path:
    """The local folder ``path`` in transformers' format, else the hub repository's configuration and weights.

    Raises:
        InputError: no such folder, or it is neither cached nor can it be downloaded.
    """
    if path is not None:
        if not (path / "config.json").is_file():
            raise InputError(f"{setting} has no config.json", got=path, fix=f"put the files of {repo} (hub) there")
        return path
    from huggingface_hub import snapshot_download

    with _reported(f"repository {repo}", setting, "its folder"):
        folder = Path(snapshot_download(repo, allow_patterns=["config.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):  # older repositories
            snapshot_download(repo, allow_patterns=["pytorch_model.bin"])
    return folder


class _reported:  # noqa: N801  reads as a statement
    """Turns the hub client's errors into one line."""

    def __init__(self, what: str, setting: str, thing: str):
        self.what, self.setting, self.thing = what, setting, thing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from huggingface_hub import constants
        from huggingface_hub.errors import HfHubHTTPError

        if isinstance(error, OSError | HfHubHTTPError):
            raise InputError(
                f"{self.what} is neither in the cache ({constants.HF_HUB_CACHE}) nor can it be downloaded",
                got=str(error).strip().splitlines()[0],
                fix=f"fetch {self.thing} elsewhere and set {self.setting}=PATH",
            ) from error


def read_weights(path: Path, inside: str | None = None) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or torch file, on the CPU; no code of the file is run.

    Arguments:
        path: the file.
        inside: key under which the file keeps the state dict, if it does.

    Raises:
        InputError: the file is damaged, holds other objects than tensors, or has no ``inside``.
    """
    content = _read(path)
    if inside is not None:
        if inside not in content:
            raise InputError(f"{path} has no entry {inside!r}", got=few(content), fix="use the published file")
        content = content[inside]
    if not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path} is no state dict", got=few(content), expected="names and tensors")
    return dict(content)


def _read(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError

    from twinrl.machine import tensors

    try:
        if path.suffix == ".safetensors":
            return tensors.load(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} cannot be read as weights ({path.stat().st_size} bytes)",
            got=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            fix="download it again: it is truncated or no checkpoint",
        ) from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path} is no state dict", got=type(content).__name__, expected="names and tensors")
    return content
