"""What decides a trial's numbers besides its configuration and seed, as a hash.

The sources of twinrl's numeric packages, of a user's own components and start weights, the content of the data and
frozen models, precision, threads, device and the version of torch. The git revision is not in it, nor are comments,
docstrings and formatting: sources are compared as syntax trees. So a commit that touches documentation repeats no
trial, and an edit of a loss term repeats all of them. Does not import torch.
"""

import ast
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import twinrl

if TYPE_CHECKING:
    from twinrl.schema import RunConfig

PACKAGE = Path(twinrl.__file__).parent
NOT_NUMERIC = ("tracking", "commands", "cli.py", "__main__.py", "presets")
"""Parts of twinrl that change no number of a trained run; a preset's content is in the configuration's hash."""
DIGITS = 16


def fingerprint(settings: "RunConfig", content_hash: str) -> str:
    """16 hex digits for a trial with ``settings`` on data of ``content_hash`` (``Source.content_hash``).

    ``machine.threads`` and ``machine.device`` must be resolved: null and auto differ between machines.
    """
    parts = {
        "sources": sources(),
        "components": {module: source_hash(path) for module, path in sorted(own_modules(settings.numeric()))},
        "content": content_hash,
        "start": start_weights(settings.train.init),
        "precision": settings.train.precision,
        "threads": settings.machine.threads,
        "device": settings.machine.device.partition(":")[0],
        "torch": metadata.version("torch").partition("+")[0],
    }
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:DIGITS]


def sources(package: Path = PACKAGE) -> str:
    """Hash of the package's numeric sources as they are on disk now."""
    paths = [path for path in sorted(package.rglob("*.py")) if _relative(path, package).parts[0] not in NOT_NUMERIC]
    return _digest(f"{_relative(path, package).as_posix()} {source_hash(path)}" for path in paths)


def _relative(path: Path, package: Path) -> Path:
    return path.relative_to(package)


def source_hash(path: Path) -> str:
    """Hash of a module's syntax tree without docstrings, the same for every Python version that parses it alike."""
    stat = path.stat()
    return _source_hash(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1024)
def _source_hash(path: Path, modified: int, size: int) -> str:
    return _digest(_tokens(ast.parse(path.read_bytes(), filename=str(path))))


def _tokens(node: ast.AST) -> Iterator[str]:
    """The tree as text, depth first; fields that are empty are left out, as versions differ in having them."""
    yield type(node).__name__
    for name, value in ast.iter_fields(node):
        items = _without_docstring(node, value) if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, ast.AST):
                yield name
                yield from _tokens(item)
            elif item is not None:
                yield f"{name}={item!r}"
    yield "end"


def _without_docstring(node: ast.AST, body: list[Any]) -> list[Any]:
    documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    if documented and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        return body[1:] if isinstance(body[0].value.value, str) else body
    return body


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def own_modules(settings: Any) -> set[tuple[str, Path]]:
    """Modules (name, file) of components that the configuration names by a dotted path outside twinrl."""
    found: set[tuple[str, Path]] = set()
    if isinstance(settings, Mapping):
        kind = settings.get("kind")
        if isinstance(kind, str) and "." in kind:
            spec = importlib.util.find_spec(kind.rpartition(".")[0])
            if spec and spec.origin and not Path(spec.origin).is_relative_to(PACKAGE):
                found.add((spec.name, Path(spec.origin)))
        for value in settings.values():
            found |= own_modules(value)
    return found


def start_weights(init: str) -> str:
    """Hash of the checkpoint that ``train.init`` names; empty for the source's teacher and random weights."""
    found = [] if init in ("teacher", "random") else sorted(Path(init, "checkpoints").glob("step-*"))
    if not found:
        return ""
    return _digest(hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found[-1].glob("*.safetensors")))
