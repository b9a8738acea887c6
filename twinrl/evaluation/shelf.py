"""Judgements that are the same for every run of a laboratory, kept beside it: of real images, and of the teacher.

An entry is found by a digest of all that decides its bits: data and models, settings, the code in between, libraries,
device and threads. What no digest covers (a class of one's own, weights in a file) is never kept.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from twinrl.flow.source import Scorer, Source
from twinrl.lab.storage import content_hash, publish
from twinrl.machine import files
from twinrl.machine.files import cache_dir

CODE = ("backends", "evaluation", "flow", "lab", "rewards", "sampling")
"""Rooms whose sources decide what a judge says of a network's samples."""
PACKAGES = ("torch", "scipy", "diffusers", "open_clip_torch")
STATELESS = ("twinrl.rewards.analytic", "twinrl.rewards.lab")
"""Modules of the rewards that the source and their settings decide."""

_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """What is kept: named tensors, and plain values as JSON has them (nan and infinity included)."""

    tensors: Mapping[str, Tensor]
    plain: Any = None


@dataclass(frozen=True)
class Shelf:
    """The entries of one laboratory. Made by :meth:`of`.

    Attributes:
        folder: of its files.
        decides: what decides every entry.
    """

    folder: Path
    decides: Mapping[str, Any]

    @classmethod
    def of(cls, source: Source, judges: Mapping[str, Scorer], device: torch.device) -> "Shelf | None":
        """The shelf of a source under further judges; None where something that has no digest takes part."""
        parts = [source, source.judge, *source.scorers.values(), *judges.values()]
        stateless = all(type(judge).__module__ in STATELESS for judge in judges.values())
        if not (stateless and all(map(has_digest, parts))):
            return None
        configs = {name: getattr(judge, "config").model_dump(mode="json") for name, judge in judges.items()}  # noqa: B009
        decides = {"content": source.content_hash, "judges": configs, "code": _code(), "machine": _machine(device)}
        return cls(cache_dir() / "judged" / source.content_hash[:12], decides)

    def get(self, name: str, make: Callable[[], Entry], **decides: Any) -> Entry:
        """The entry ``name`` under further circumstances: read, or made and kept.

        A damaged or foreign file is replaced, and a line says so.
        """
        text = json.dumps({"name": name, **self.decides, **decides}, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        path = self.folder / f"{name}-{key[:16]}.safetensors"
        if path.exists():
            try:
                return _read(path, key)
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                _log.warning("twinrl: %s cannot be used (%s); it is made again", path, error)
        entry = make()
        with suppress(OSError):  # a cache that cannot be written: the next run judges again
            files.remove(path)
            publish(path, lambda file: _write(file, entry, key))
        return entry


def weights(network: nn.Module) -> str:
    """A digest of a network's class, structure and weights."""
    return content_hash({"weights": network.state_dict()}, [type(network).__qualname__, str(network)])


def has_digest(part: object) -> bool:
    """Whether the code of ``part`` is twinrl's own, so that :data:`CODE` covers it."""
    return type(part).__module__.startswith("twinrl.")


def _read(path: Path, key: str) -> Entry:
    """The entry. Raises ValueError, SafetensorError, … where the file is not what was written under ``key``."""
    files.check_plain(path)
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if about.get("key") != key:
        raise ValueError("it is of something else")
    if about["content"] != content_hash({"": tensors}, about["plain"]):
        raise ValueError("its content is not what was written")
    return Entry(tensors, json.loads(about["plain"]))


def _write(path: Path, entry: Entry, key: str) -> None:
    tensors, plain = {name: value.contiguous() for name, value in entry.tensors.items()}, json.dumps(entry.plain)
    save_file(tensors, path, {"key": key, "plain": plain, "content": content_hash({"": tensors}, plain)})


@cache
def _code() -> str:
    """A digest of the sources in :data:`CODE`."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in _sources(root):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _sources(root: Path) -> Iterator[Path]:
    for room in CODE:
        yield from sorted((root / room).rglob("*.py"))


def _machine(device: torch.device) -> list[str]:
    """What the last bits depend on beside the code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    precision = torch.get_float32_matmul_precision()
    return [*map(version, PACKAGES), device.type, name, precision, str(torch.get_num_threads())]
