"""What decides a trial's numbers besides its configuration and seed, as a hash.

The sources of twinrl's numeric packages, of a user's own components and start weights, the content of the data and
frozen models, precision, threads, device and the version of torch. The git revision is not in it, nor are comments,
docstrings and formatting: sources are compared as syntax trees. So a commit that touches documentation repeats no
trial, and an edit of a loss term repeats all of them. Parts of the package that a configuration cannot reach do not
count for it: a new family of models repeats no trial that trains without one. Releases that are known to give the
same numbers (``releases.yaml``) count as one: an update that adds a feature repeats no trial. Does not import torch.
"""

import ast
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import twinrl
from twinrl.run import layout

if TYPE_CHECKING:
    from twinrl.training.schema import RunConfig

PACKAGE = Path(twinrl.__file__).parent
NOT_NUMERIC_FILES = (
    "tracking", "run/environment.py", "run/layout.py", "run/names.py", "run/runlog.py", "commands",
    "machine/cluster.py", "machine/forks.py", "cli.py", "__main__.py", "presets",
    "training/opened.py", "training/pictures.py", "training/watching",
)  # fmt: skip
"""Parts of twinrl that change no number of a trained run; a preset's content is in the configuration's hash."""
WITHOUT_FAMILY = ("backends/families", "data", "training/pretrained.py", "training/described.py")
"""Of no use without ``model.family``: pretrained models, and the data that only they can be trained on."""
WITHOUT_RANKS = tuple(
    f"fsdp/{name}.py" for name in ("agreement", "checkpoint", "frozen", "sharded", "watchdog", "wrap")
)
"""Of no use to a single process; the rest of ``fsdp`` is what one process does, too."""
RELEASES = Path(__file__).parent / "releases.yaml"
HEX_DIGITS = 16


def fingerprint(settings: "RunConfig", content_hash: str, processes: int = 1) -> str:
    """16 hex digits for a trial with ``settings`` on data of ``content_hash`` (``Source.content_hash``).

    ``machine.threads`` and ``machine.device`` must be resolved: null and auto differ between machines. Several
    ``processes`` sum in another order than one.
    """
    parts: dict[str, object] = {
        "sources": first_with_its_numbers(planned(unused(settings, processes))),
        "components": {module: source_hash(path) for module, path in sorted(own_modules(settings.numeric()))},
        "content": content_hash,
        "start": start_weights(settings.train.init),
        "precision": settings.train.precision,
        "threads": settings.machine.threads,
        "processes": processes,
        "device": settings.machine.device.partition(":")[0],
        "torch": metadata.version("torch").partition("+")[0],
    }
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:HEX_DIGITS]


def unused(settings: "RunConfig", processes: int = 1) -> tuple[str, ...]:
    """Files and folders of the package, relative to it, that a trial with ``settings`` runs nothing of."""
    return (() if settings.model.is_pretrained else WITHOUT_FAMILY) + (WITHOUT_RANKS if processes == 1 else ())


@cache
def planned(unused: tuple[str, ...]) -> str:
    """:func:`sources` as this process found them first: what it plans is of one version of the code."""
    return sources(unused=unused)


def sources(package: Path = PACKAGE, unused: Sequence[str] = ()) -> str:
    """Hash of the package's numeric sources as they are on disk now, but for what is ``unused``."""
    left_out = (*NOT_NUMERIC_FILES, *unused)
    modules = {path.relative_to(package).as_posix(): path for path in sorted(package.rglob("*.py"))}
    return _digest(
        f"{name} {source_hash(path)}" for name, path in modules.items()
        if not any(name == part or name.startswith(f"{part}/") for part in left_out)
    )  # fmt: skip


def digests() -> list[str]:
    """:func:`sources` for every set of parts that a trial may leave unused, in one order for all releases."""
    return [sources(unused=family + alone) for family in ((), WITHOUT_FAMILY) for alone in ((), WITHOUT_RANKS)]


def first_with_its_numbers(digest: str) -> str:
    """The sources' digest of the first release whose numbers are those of ``digest``; of no release's: itself."""
    for releases in releases_by_numbers():
        for known in releases.values():
            if digest in known:
                return next(iter(releases.values()))[known.index(digest)]
    return digest


def releases_by_numbers() -> list[dict[str, list[str]]]:
    """Releases that give the same numbers together, oldest first: version → its :func:`digests`."""
    return _releases(RELEASES, RELEASES.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _releases(path: Path, modified: int) -> list[dict[str, list[str]]]:
    return yaml.safe_load(path.read_text())


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
    """Hash of the checkpoint that ``train.init`` names; empty for the source's teacher and random weights.

    All its tensors, in safetensors files or in ``shards/``; its ``state.json`` says how to go on, which no start does.
    """
    newest = None if init in ("teacher", "random") else layout.newest(Path(init, layout.CHECKPOINTS))
    if newest is None:
        return ""
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.name != layout.STATE)
    return _digest(_content(path, path.stat().st_mtime_ns, path.stat().st_size) for path in files)


@lru_cache(maxsize=1024)
def _content(path: Path, modified: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
