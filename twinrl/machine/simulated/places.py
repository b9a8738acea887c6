"""Where the program is: the line that an operation comes from, the phase of the work, and whose memory it makes."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import nn

HERE = str(Path(__file__).parent)
INSTALLED = "/site-packages/"
LIBRARIES = ("diffusers", "transformers", "open_clip", "peft", "torch/optim", "torch/distributed", "torchvision")
"""Parts of paths: their innermost line is named beside the program's."""


class Rule(NamedTuple):
    """What a function that is being run says.

    Attributes:
        path: a part of its file's path. function: its name; None: any.
        says: the phase, or the owner.
    """

    path: str
    function: str | None
    says: str


class Place(NamedTuple):
    """Where an operation was asked for.

    Attributes:
        phase: of the work. owner: of memory that it makes; "" = nobody in particular.
        file, number: of the program's innermost line. library: the innermost line of a library inside, or "".
    """

    phase: str
    owner: str
    file: str
    number: int
    library: str

    @property
    def line(self) -> str:
        """For people."""
        own = f"{self.file}:{self.number}" if self.file else ""
        return " ← ".join(filter(None, (own, self.library))) or "?"


class _Said(NamedTuple):
    file: str
    library: str
    phase: str
    owner: str


@dataclass
class Places:
    """Reads places off the stack.

    Arguments:
        programs: folders whose lines are the program's.
        helpers: parts of paths of files in them whose callers are named instead.
        phases: the outermost function that matches one decides; none: ``otherwise``.
        owners: the innermost function that matches one decides; none: the module that runs (:meth:`watched`).
    """

    programs: Sequence[Path]
    helpers: Sequence[str] = ()
    phases: Sequence[Rule] = ()
    owners: Sequence[Rule] = ()
    otherwise: str = "forward"
    running: list[str] = field(default_factory=list)
    _known: dict[CodeType, _Said | None] = field(default_factory=dict)

    def here(self, frame: FrameType | None = None) -> Place:
        """The place of the caller, or of a frame."""
        found: FrameType | None = frame or sys._getframe(1)
        phase, owner, file, number, library = "", "", "", 0, ""
        while found is not None:
            code = found.f_code
            said = self._known[code] if code in self._known else self._look(code)
            if said is not None:
                owner, phase = owner or said.owner, said.phase or phase
                if said.file and not file:
                    file, number = said.file, found.f_lineno
                elif said.library and not library and not file:
                    library = f"{said.library}:{found.f_lineno}"
            found = found.f_back
        return Place(phase or self.otherwise, owner or self._module, file, number, library)

    @property
    def _module(self) -> str:
        return self.running[-1] if self.running else ""

    def _look(self, code: CodeType) -> _Said | None:
        path, said = code.co_filename, None
        if not path.startswith(HERE):
            phase, owner = (_first(rules, path, code.co_name) for rules in (self.phases, self.owners))
            root = next((root for root in self.programs if _inside(path, root)), None)
            own = root is not None and not any(helper in path for helper in self.helpers)
            file = f"{root.name}{path[len(str(root)) :]}" if own else ""  # type: ignore[union-attr]
            mark = next((name for name in LIBRARIES if f"/{name}/" in path), "")
            library = f"{mark}/…/{path.rpartition('/')[2]}" if mark and not file else ""
            if file or library or phase or owner:
                said = _Said(file, library, phase, owner)
        self._known[code] = said
        return said

    @contextmanager
    def watched(self, role: str, network: nn.Module) -> Iterator[None]:
        """Inside, memory that a block of the network makes, or one of its parts, is under their name."""
        hooks: list[Any] = []
        for name, module in network.named_modules():
            if label := _label(name):
                said = f"{role}: {label}"
                hooks.append(module.register_forward_pre_hook(lambda *_, said=said: self.running.append(said)))
                hooks.append(module.register_forward_hook(lambda *_: self._left(), always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _left(self) -> None:
        self.running.pop()


def _inside(path: str, root: Path) -> bool:
    """Whether a file is a folder's own, and not of packages that are installed below it."""
    return path.startswith(f"{root}/") and INSTALLED not in path[len(str(root)) :]


def _first(rules: Sequence[Rule], path: str, function: str) -> str:
    return next((rule.says for rule in rules if rule.path in path and rule.function in (None, function)), "")


def _label(name: str) -> str:
    """``transformer_blocks.*.attn`` for a block and what is directly in it; "" for what is deeper, or around them."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers or len(parts) > numbers[0] + 2:
        return ""
    return ".".join([parts[numbers[0] - 1], "*", *parts[numbers[0] + 1 :]])
