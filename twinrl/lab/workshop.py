"""A build that may be killed: its finished parts, and where its trainings stand, in a folder of their own."""

import glob
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from twinrl.lab.storage import load_tensors, save_tensors
from twinrl.machine import files

SECONDS = 60.0
"""Between two savings of a training: what a kill may cost."""


@dataclass(frozen=True)
class Workshop:
    """The folder of an unfinished build. What is in it goes into the same build again, bit for bit.

    Attributes:
        built: the folder that is to be built.
        folder: made when something is kept first.
        seconds: between two savings of a training.
    """

    built: Path
    folder: Path
    seconds: float = SECONDS

    @classmethod
    def of(cls, built: Path, key: str, seconds: float = SECONDS) -> "Workshop":
        """Beside the folder to be built; ``key`` tells contents and recipes apart."""
        return cls(built, built.with_name(f".{built.name}.{key[:12]}.parts"), seconds)

    def begin(self) -> None:
        """Remove what builds of another content or recipe have left here."""
        self._remove(but=self.folder)

    def has(self, name: str) -> bool:
        """Whether a part is finished."""
        return self._path(name).exists()

    def part(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """A finished part, by name: read, or made and kept."""
        if self.has(name):
            return load_tensors(self._path(name), self.folder)
        made = make()
        self.write(self._path(name), made)
        files.remove(self._state(name))
        return made

    def keeper(self, name: str) -> "Kept":
        """Keeps the training of a part."""
        return Kept(self, self._state(name))

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a file of the folder, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with files.publishing(path) as new:
            save_tensors(new, tensors)

    def close(self) -> None:
        """Remove the folder: the build is finished."""
        self._remove()

    def _remove(self, but: Path | None = None) -> None:
        for left in self.built.parent.glob(f".{glob.escape(self.built.name)}.*.parts"):
            if left != but:
                files.remove(left)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _state(self, name: str) -> Path:
        return self.folder / f"{name}-training.safetensors"


@dataclass
class Kept:
    """One training's state, as ``twinrl.lab.fitting.Keeper``."""

    workshop: Workshop
    path: Path
    saved: float = field(default_factory=time.monotonic)

    def kept(self) -> Mapping[str, Tensor] | None:
        return load_tensors(self.path, self.workshop.folder) if self.path.exists() else None

    def offer(self, state: Callable[[], Mapping[str, Tensor]]) -> None:
        if time.monotonic() - self.saved >= self.workshop.seconds:
            self.workshop.write(self.path, state())
            self.saved = time.monotonic()
