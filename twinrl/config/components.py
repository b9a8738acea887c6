"""Components: registries, what a class must be to stand in one, and whose fault a failure is.

A component is named by its key in a :class:`Registry`, or, if it is a user's own, by the dotted path of its class. What
is wrong with an own one is said in one line that names it: on import, as a class, by what its methods return
(:func:`checked`, :func:`check_returns`), and where it raises (:func:`failures_named`).
"""

import inspect
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, TracebackType
from typing import Any, TypeVar

from twinrl.config.errors import InputError

T = TypeVar("T")
Returned = Callable[[Any, Any, str, tuple[Any, ...]], object]
"""Checks a value that a method has returned, given its owner, the method's name and its arguments; raises InputError
where it is not what it should be."""


class ComponentError(InputError):
    """A user's own component has failed, perhaps in one of several processes alone."""


WAYS = (FunctionType, classmethod, staticmethod, property)
_own: set[str] = set()  # modules of what dotted paths have named, twinrl's own aside
_foreign: ContextVar[Path | None] = ContextVar("foreign", default=None)
_places: list[str] = []  # where dotted paths may begin beside what Python finds by itself


class Registry(dict[str, type[T]]):
    """Name → class of one kind of component, and what any class of that kind must be.

    Arguments:
        what: the kind in words, for messages, e.g. ``"loss term"``.
        bases: a component derives from one of these, overrides its abstract methods, and has a nested ``Config`` that
            derives from the base's and has a field ``kind``. What its methods return is checked by ``RETURNS`` of the
            base, where that has one: method → :data:`Returned`.
        known: the classes that come with twinrl.
    """

    def __init__(self, what: str, bases: type | tuple[type, ...], known: Mapping[str, type[T]] | None = None):
        super().__init__(known or {})
        self.what = what
        self.bases = bases if isinstance(bases, tuple) else (bases,)

    def find(self, kind: str) -> type[T]:
        """The class registered under ``kind``, or the one that the dotted path ``kind`` names.

        Raises:
            InputError: the name is unknown, or the path does not lead to a class of this kind.
        """
        if kind in self:
            return self[kind]
        found: type[T] = own(kind, self.what, self)
        self._check(found, f"{self.what} {kind!r}")
        return found

    def build(self, config: Any, *arguments: Any) -> Any:
        """The component that ``config`` (with its ``kind``) describes, made as ``cls(config, *arguments)``."""
        cls = self.find(config.kind)
        if config.kind not in self:
            check_call(cls, (config, *arguments), f"{self.what} {config.kind!r}")
        return cls(config, *arguments)  # type: ignore[call-arg]

    def _check(self, found: Any, named: str) -> None:
        base = check_class(found, self.bases, self.what, named)
        settings, expected = getattr(found, "Config", None), base.Config  # type: ignore[attr-defined]
        if not isinstance(settings, type) or not issubclass(settings, expected):
            raise InputError(f"{named} has no nested Config class", fix=f"derive it from {_path(expected)}")
        if "kind" not in getattr(settings, "model_fields", {}):
            raise InputError(f"{named} has a Config without `kind`", fix="declare `kind: str` in it")
        check_returns(found, getattr(base, "RETURNS", {}))


def check_class(found: Any, bases: tuple[type, ...], what: str, named: str) -> type:
    """The base that a class derives from.

    Raises:
        InputError: it derives from none, leaves abstract methods open, or takes other arguments than these.
    """
    base = next((b for b in bases if isinstance(found, type) and issubclass(found, b)), None)
    if base is None:
        wanted = " or ".join(map(_path, bases))
        raise InputError(f"{named} is no {what}", got=told(found), fix=f"derive it from {wanted}")
    if left := sorted(found.__abstractmethods__ if inspect.isabstract(found) else ()):
        raise InputError(f"{named} lacks {', '.join(left)}", fix=f"write what {_path(base)} declares abstract")
    check_methods(found, base, [*sorted(getattr(base, "__abstractmethods__", ())), *_written_anew(found, base)], named)
    return base


def _written_anew(found: type, base: type) -> list[str]:
    """Public methods and properties of a base that a class has otherwise; not those that it has from a library."""
    package = base.__module__.partition(".")[0]
    declared = [vars(cls) for cls in base.__mro__ if cls.__module__.partition(".")[0] == package]
    public = [name for names in declared for name, value in names.items() if name[0] != "_" and isinstance(value, WAYS)]
    return [name for name in public if getattr(found, name) is not getattr(base, name)]


def check_methods(found: type, like: type, methods: Iterable[str], named: str) -> None:
    """Raises InputError where a class lacks ``methods`` of another, one for a property, or other arguments."""
    if lacking := [name for name in methods if not hasattr(found, name)]:
        raise InputError(f"{named} lacks {', '.join(lacking)}", fix=f"write what {_path(like)} declares")
    for name in methods:
        if callable(method := getattr(like, name)):
            check_call(getattr(found, name), tuple(inspect.signature(method).parameters), f"{named}: {name}")
        elif callable(method := getattr(found, name)):
            raise InputError(f"{named}: {name} is a method{_place(method)}", fix="write @property above it")


def check_call(function: Any, arguments: tuple[Any, ...], named: str) -> None:
    """Raises InputError where ``function`` does not take these arguments by position."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        taken = ", ".join(inspect.signature(function).parameters) if callable(function) else told(function)
        wanted = ", ".join(a if isinstance(a, str) else type(a).__name__ for a in arguments)
        raise InputError(f"{named} takes ({taken}){_place(function)}", expected=f"({wanted})") from None


def own(path: str, what: str, known: Mapping[str, Any]) -> Any:
    """The user's own object at a dotted path; ``what`` it is to be, and which names are ``known``, for messages.

    Raises:
        InputError: it is no dotted path, or cannot be imported, with the line that fails.
    """
    module, _, name = path.rpartition(".")
    if not module:
        form = "a class of your own by its dotted path, as in kind=my_file.MyClass"
        raise InputError(f"unknown {what} {path!r}", expected=f"one of {', '.join(known)}; or {form}")
    sys.path.extend(place for place in _places if place not in sys.path)
    brought = found = None
    try:
        files = map(_brought, _parents(module))  # from the outermost on: to find a module runs its parent
        brought = next(filter(None, files), None)
        if brought is None:
            found = getattr(import_module(module), name)
    except (Exception, SystemExit) as error:
        fix = "--debug shows the traceback"
        if module in sys.modules or (isinstance(error, ModuleNotFoundError) and error.name in _parents(module)):
            fix = "check the dotted path; it starts in the working directory, or at an installed package"
        raise InputError(f"{what} {path!r} cannot be imported", got=_why(error, _in_module(module)), fix=fix) from error
    if brought is not None:
        raise InputError(
            f"{what} {path!r} would run code that comes with the run", got=brought,
            fix="read it, and copy it out of the run directory to use it",
        )  # fmt: skip
    _own.update(name for name in (module, getattr(found, "__module__", module)) if not name.startswith("twinrl."))
    return found


def look_in(folder: str) -> None:
    """Let dotted paths begin in a folder, too. What is installed goes first, and nothing else is looked for there:
    files of that folder would run in the place of libraries that twinrl imports late."""
    _places[:] = [folder]


@contextmanager
def not_from(folder: Path) -> Iterator[None]:
    """Inside, :func:`own` imports nothing that lies in ``folder``: a run of somebody else's may bring code, and its
    configuration would have it run."""
    token = _foreign.set(folder.resolve())
    try:
        yield
    finally:
        _foreign.reset(token)


def _brought(module: str) -> str | None:
    """The module's file where it lies in the folder that :func:`not_from` says, else None."""
    folder = _foreign.get()
    try:
        origin: str | None = getattr(find_spec(module), "origin", None)
    except ValueError:  # of what has begun as a script
        return None
    return origin if folder is not None and origin and Path(origin).resolve().is_relative_to(folder) else None


def _parents(module: str) -> list[str]:
    """The packages that a module lies in, from the outermost on, and itself."""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


# --- what own components return, and where they fail -------------------------------------------------------


def checked(value: Any, kind: type[T], owner: object, method: str, shape: tuple[int, ...] | None = None) -> T:
    """``value``, which ``owner``'s ``method`` (or a ``method.part`` of it) has returned, if it is what it should be.

    Arguments:
        kind: type that it must have; a whole number passes for a float, which must be finite.
        shape: of a tensor.

    Raises:
        InputError: it is not; the message names the method and its line.
    """
    number = kind is float
    whole = number and isinstance(value, int)  # which may be too large for a float
    fits = whole or (isinstance(value, kind) and not (number and not math.isfinite(value)))  # type: ignore[arg-type]
    if fits and (shape is None or value.shape == shape):
        return value
    expected = "a finite number" if number else "None" if kind is type(None) else _called(kind)
    raise wrong_return(value, owner, method, expected + (f" of shape {tuple(shape)}" if shape is not None else ""))


def _called(kind: type) -> str:
    """A class by its name; by its whole path where others have that name, too."""
    return _path(kind) if kind.__module__.startswith("torch.optim") else kind.__name__


def wrong_return(value: object, owner: object, method: str, expected: str) -> ComponentError:
    """The error for what ``owner``'s ``method`` (or a ``method.part`` of it) has returned."""
    cls = owner if isinstance(owner, type) else type(owner)
    place = _place(getattr(cls, method.partition(".")[0], None))
    return ComponentError(f"{_path(cls)}.{method} returns {told(value)}{place}", expected=expected)


def check_returns(cls: type, contract: Mapping[str, Returned]) -> None:
    """Have the methods and properties of a user's own class check what they return, from now on."""
    for each in (each for each in cls.__mro__ if each.__module__ in _own):
        for name, check in contract.items():
            member = vars(each).get(name)
            if isinstance(member, property):
                setattr(each, name, property(_checking(member.fget, name, check)))
            elif inspect.isfunction(member):
                setattr(each, name, _checking(member, name, check))


def _checking(function: Any, name: str, check: Returned) -> Any:
    """The function, followed by the check."""
    if getattr(function, "is_checked", False):
        return function

    @wraps(function)
    def run(self: Any, *arguments: Any, **named: Any) -> Any:
        value = function(self, *arguments, **named)
        check(value, self, name, arguments)
        return value

    run.is_checked = True  # type: ignore[attr-defined]
    return run


def plain_state(value: Any, owner: Any, method: str, arguments: tuple[Any, ...]) -> None:
    """A :data:`Returned` of states that go to a checkpoint: text → plain values."""
    checked(value, dict, owner, method)
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise wrong_return(value, owner, method, f"plain values ({error})") from error


def all_of(kind: type, value_kind: type) -> Returned:
    """A :data:`Returned` of mappings or sequences (``kind``) whose values have a type."""

    def check(value: Any, owner: Any, method: str, arguments: tuple[Any, ...]) -> None:
        checked(value, kind, owner, method)
        for each in value.values() if isinstance(value, Mapping) else value:
            checked(each, value_kind, owner, method)

    return check


@contextmanager
def failures_named() -> Iterator[None]:
    """What a user's own component raises becomes a :class:`ComponentError` that names it; other failures stay."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        found = [(f, line) for f, line in traceback.walk_tb(error.__traceback__) if _is_own(f.f_globals)]
        if not found:
            raise
        frame = found[-1][0]
        where = f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}"
        raise ComponentError(f"{where} fails", got=_why(error, _is_own), fix="--debug shows the traceback") from error


def told(value: object) -> str:
    """A value in a few words: its type, with the shape or the text where it has one."""
    if value is None or isinstance(value, int | float):
        return str(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape = getattr(value, "shape", None)
    detail = f" of shape {tuple(shape)}" if shape is not None else f" {value[:40]!r}" if isinstance(value, str) else ""
    return type(value).__name__ + detail


def _why(error: BaseException, here: Callable[[Mapping[str, Any]], bool]) -> str:
    """The error with file and line: of a syntax error its own, else the last one ``here``."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({_short(error.filename)}:{error.lineno})"
    lines = [(f.f_code.co_filename, line) for f, line in _frames(error.__traceback__) if here(f.f_globals)]
    place = f" ({_short(lines[-1][0])}:{lines[-1][1]})" if lines else ""
    return f"{type(error).__name__}: {error}{place}"


def _frames(trace: TracebackType | None) -> list[tuple[Any, int]]:
    return list(traceback.walk_tb(trace))


def _is_own(names: Mapping[str, Any]) -> bool:
    return names.get("__name__") in _own


def _in_module(module: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda names: names.get("__name__") == module


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _place(function: Any) -> str:
    """`` at FILE:LINE`` of a function or property; nothing of what has none."""
    function = getattr(function, "fget", function)
    code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
    return f" at {_short(code.co_filename)}:{code.co_firstlineno}" if code else ""


def _short(file: str) -> str:
    """A file relative to the working directory where it lies in it."""
    path = Path(file)
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
