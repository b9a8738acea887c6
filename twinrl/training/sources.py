"""Data sources by name, or a user's own by dotted path. What a source loads is imported when it is asked for."""

from collections.abc import Callable, Mapping
from inspect import isfunction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinrl.config.components import ComponentError, check_call, check_methods, check_returns, own
from twinrl.config.errors import InputError
from twinrl.flow import returned
from twinrl.flow.source import Data, Source

if TYPE_CHECKING:
    from twinrl.backends.families.family import Family
    from twinrl.data.prepared import FolderSource


def _digits(root: Path | None) -> Source:
    from twinrl.lab import load_lab

    return load_lab()


def _lab(name: Path | None) -> Source:
    from twinrl.lab import open_lab

    return open_lab(str(name))


def _mnist(root: Path | None) -> Source:
    from twinrl.lab.mnist import MNISTSource

    return MNISTSource(root)


def _folder(root: Path | None, family: "Family") -> "FolderSource":
    from twinrl.data.prepared import FolderSource

    return FolderSource(root, family)


def _prompts(root: Path | None, family: "Family") -> "FolderSource":
    from twinrl.data.prepared import FolderSource

    return FolderSource(root, family, images=False)


SOURCES: dict[str, Callable[[Path | None], Source]] = {"digits": _digits, "lab": _lab, "mnist": _mnist}
"""``data.source`` → function of ``data.place`` that loads it (building what is not cached, with a progress bar)."""
WITHOUT_ROOT = ("digits", "lab")
"""Sources for which ``data.root`` means nothing."""

FAMILY_SOURCES: dict[str, Callable[[Path | None, "Family"], "FolderSource"]] = {"folder": _folder, "prompts": _prompts}
"""``data.source`` of a run with ``model.family`` → function of ``data.place`` and the family."""


def find(name: str, trains_family: bool) -> Callable[..., Any]:
    """What loads the source called ``name``: a function of ``data.place``, and of the family where one is trained.

    A class of one's own is named by its dotted path.

    Raises:
        InputError: no such source, or a class without a source's methods.
    """
    known: Mapping[str, Callable[..., Any]] = FAMILY_SOURCES if trains_family else SOURCES
    if name in known:
        return known[name]
    found: Callable[..., Any] = own(name, "data source", SOURCES | FAMILY_SOURCES)
    if isinstance(found, type):
        contract = Data if trains_family else Source
        methods = [method for kind in contract.__mro__ for method, value in vars(kind).items() if isfunction(value)]
        check_methods(found, contract, [name for name in methods if name[0] != "_"], f"data source {name!r}")
        check_returns(found, returned.RETURNS)
    return found


def load(name: str, place: Path | None, *family: "Family") -> Any:
    """The source called ``name`` that lies at ``place``; with the family that is trained, if one is.

    Raises:
        InputError: see :func:`find`; one's own lacks something that a source has.
    """
    found = find(name, bool(family))
    if name not in SOURCES | FAMILY_SOURCES:
        check_call(found, ("place", "family")[: 1 + len(family)], f"data source {name!r}")
    source = found(place, *family)
    if name in SOURCES | FAMILY_SOURCES:
        return source
    if lacking := [each for each in _attributes(Data if family else Source) if not hasattr(source, each)]:
        raise ComponentError(
            f"data source {name!r} has no {', '.join(lacking)}", expected="what docs/extending.md lists"
        )
    returned.check_attributes(source, f"data source {name!r}")
    return source


def _attributes(contract: type) -> list[str]:
    """What a source has beside its methods."""
    members = [member for kind in contract.__mro__ for member in vars(kind).items()]
    properties = [name for name, value in members if isinstance(value, property)]
    return [*properties, *(name for kind in contract.__mro__ for name in vars(kind).get("__annotations__", ()))]


# --- configurations ---------------------------------------------------------------------------------------------


def check_root(source: str, root: Path | None) -> None:
    """Raises InputError where ``data.root`` means nothing to the source: a run would not be on what lies there."""
    if root is not None and source in WITHOUT_ROOT:
        raise InputError(
            f"data.root has no effect with data.source={source}", got=root,
            fix="leave it out; to train on pictures of your own: twinrl lab build FOLDER --to NAME, then "
            "data={source: lab, lab: NAME}",
        )  # fmt: skip


def with_network(mapping: dict[str, Any]) -> dict[str, Any]:
    """A configuration on a laboratory of one's own, which names no network, with the one that has its teacher.

    Raises:
        InputError: there is no such laboratory.
    """
    data, model = mapping.get("data"), mapping.get("model", {})
    named = isinstance(data, dict) and data.get("source") == "lab" and isinstance(data.get("lab"), str)
    if not named or not isinstance(model, dict) or {"network", "family"} & set(model):
        return mapping
    from twinrl.lab.load import network_of

    return mapping | {"model": {**model, "network": network_of(mapping["data"]["lab"])}}
