"""Strict configuration: YAML with ``extends``, dotted overrides, one-line errors, a canonical hash.

Components own their settings: every registered class has a nested ``Config`` (a :class:`Settings`) whose
``kind`` is its name in the registry. :func:`component` turns a registry into a field type, so the schema is
assembled from the registries and a dotted path (``my_package.MyTerm``) works wherever a name does.
"""

import difflib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SerializationInfo,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, to_jsonable_python

from twinrl.config.components import Registry
from twinrl.config.errors import InputError
from twinrl.config.first_keys import CHANGED_DEFAULTS, FIRST_KEYS

PRESETS = Path(__file__).parents[1] / "presets"
LARGEST_FILE = 1_000_000
"""Bytes of a configuration."""
LONGEST_SHOWN = 200
"""Characters of a name or value that are looked at or shown."""
MOST_TOLD = 8
"""Mistakes that one message tells."""
IMPLIED_KINDS = {"optim": "adamw", "lr_policy": "constant", "network": "mlp", "renoise": "beta"}
"""Kinds of components that name none. A loss term's is its own name."""
OWN_KIND = "a class of your own is named by its dotted path, as in kind=my_file.MyClass"
IDENTITY = "identity"
STORED = "stored"
"""Contexts: a dump of what tells two configurations apart; the validation of one that an older version has written."""


class Settings(BaseModel):
    """Base of every configuration section: frozen, typed, and an unknown key names the nearest valid one.

    A new version may add a key with a default that changes nothing. In the identity of a configuration such a later
    key appears only where it has another value, so older hashes stay. What an older version has stored without it
    means the default that the key came with, whatever today's is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, Mapping):
            for key in value:
                if key not in cls.model_fields:
                    raise PydanticCustomError(
                        "unknown_key",
                        "{hint}",
                        {"key": str(key), "hint": _hint(str(key), value[key], cls.model_fields)},
                    )
            if info.context == STORED:
                return cls.later_keys() | dict(value)
        return value

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        plain: dict[str, Any] = dump(self)
        if info.context != IDENTITY:
            return plain
        absent = self.later_keys()
        return {key: value for key, value in plain.items() if key not in absent or value != absent[key]}

    @classmethod
    def later_keys(cls) -> dict[str, Any]:
        """Keys of the package's classes that came after the first ones → what their absence stands for.

        That is the default that they came with, as plain values; of a section ``{}``, as its keys are later ones, too.
        Required keys and a component's kind are none, nor are those of a user's own classes.
        """
        found = {}
        for key, field in cls.model_fields.items():
            owner = next(base for base in reversed(cls.__mro__) if key in getattr(base, "model_fields", ()))
            name = f"{owner.__qualname__}.{key}"
            own = owner.__module__.partition(".")[0] == __name__.partition(".")[0]
            if own and key != "kind" and not field.is_required() and name not in FIRST_KEYS:
                default = CHANGED_DEFAULTS.get(name, field.get_default(call_default_factory=True))
                found[key] = {} if isinstance(default, Settings) else _plain(field, default)
        return found


def _plain(field: FieldInfo, default: Any) -> Any:
    """A default as the identity of a configuration shows it: a component by its kind."""
    if field.validate_default:
        adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, *field.metadata])  # type: ignore[arg-type]
        return adapter.dump_python(adapter.validate_python(default, context=STORED), mode="json", context=IDENTITY)
    return to_jsonable_python(default)


def nearest(key: str, valid: Mapping[str, Any]) -> str:
    """The closest valid key in words, or the list of all of them."""
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"valid keys: {', '.join(valid)}"


# --- components -----------------------------------------------------------------------------------------


def component(registry: Registry[Any]) -> Any:
    """A field type for settings of any class in ``registry``; a bare string is short for ``{kind: string}``."""

    def validate(value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, BaseModel):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping) or "kind" not in value:
            expected = f"expected a name or a mapping with `kind` ({registry.what}); {OWN_KIND}"
            raise PydanticCustomError("component", "{message}", {"message": expected})
        try:
            return registry.find(str(value["kind"])).Config.model_validate(value, context=info.context)
        except InputError as error:
            raise PydanticCustomError("component", "{message}", {"message": str(error)}) from error
        except ValidationError as error:
            raise PydanticCustomError("nested", "{message}", {"errors": error.errors(), "message": ""}) from error

    return Annotated[SerializeAsAny[BaseModel], BeforeValidator(validate)]


def _hint(key: str, under_it: object, valid: Mapping[str, Any]) -> str:
    """What to write instead of an unknown key; a class of one's own is a value and no key of its settings."""
    path = next(iter(named({key: under_it})), key)
    own = "kind" in valid and path.rpartition(".")[2][:1].isupper()
    return f"a class of your own is a value: kind={path}" if own else nearest(key, valid)


def with_kind(component: object, kind: str) -> object:
    """The raw settings of a component, of ``kind`` unless they name one."""
    return {"kind": kind, **component} if isinstance(component, Mapping) and "kind" not in component else component


def named(components: Mapping[str, Any]) -> dict[str, Any]:
    """Raw settings of components by name, each of the kind that its name says unless it names one; null is left out.

    The command line has divided dotted paths at their dots. Where such parts lead to classes, whose names begin with a
    capital letter, they are one name again: ``my_terms: {Smoothness: {…}}`` is ``my_terms.Smoothness: {…}``.
    """
    found: dict[str, Any] = {}
    for name, settings in components.items():
        if _divided(name, settings):
            for path, inner in named({f"{name}.{part}": inner for part, inner in settings.items()}).items():
                found = merge(found, {path: inner})
        elif settings is not None:
            found[name] = with_kind(settings, name)
    return found


def _divided(path: str, settings: object) -> bool:
    """Whether a mapping is no component's, but leads to classes whose paths begin with ``path``."""
    if str(path).rpartition(".")[2][:1].isupper():
        return False
    if not isinstance(settings, Mapping) or not settings:
        return False
    return all(str(part)[:1].isupper() or _divided(part, inner) for part, inner in settings.items())


# --- loading --------------------------------------------------------------------------------------------


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml where PyYAML has it
    """YAML 1.2 floats (``5e-4`` is a number) and no duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(str(self.construct_object(key, deep=deep)) for key, _ in node.value)
        if repeated := [key for key, times in keys.items() if times > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"key {', '.join(repeated)} twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Where a text is none of its tag's values, such as a 13th month, the file is wrong, and not the program."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError) as error:
            tag = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"no {tag}: {error}", node.start_mark) from error

    def construct_yaml_int(self, node: Any) -> int | str:
        """Text where Python takes no number of so many digits; what wanted a number then says so."""
        try:
            return int(super().construct_yaml_int(node))
        except ValueError:
            return str(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping. Raises InputError with file, line and reason where it is not one."""
    try:
        value = parsed_yaml(read_text(path))
    except FileNotFoundError as error:
        raise InputError(f"no configuration at {path}", fix=f"use a preset ({', '.join(presets())})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} is not valid YAML", got=error) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a mapping", got=type(value).__name__, expected="key: value lines")
    return value


def read_text(path: Path) -> str:
    """The text of a YAML file. Raises FileNotFoundError, or InputError where it is none, too long or no text."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is no file", fix=f"name a YAML file, or a preset ({', '.join(presets())})")
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise InputError(f"{path} is no configuration", got=f"{size:,} bytes", expected=f"at most {LARGEST_FILE:,}")
        return path.read_text()
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read", got=error) from error


def parsed_yaml(text: str) -> Any:
    """The value of a YAML text. Raises YAMLError, or RecursionError where it contains itself."""
    value = yaml.load(text, _Loader)
    waiting, most = [value], len(text) + 2  # aliases can make it exponentially larger than its text
    for _ in range(most):
        if not waiting:
            return value
        found = waiting.pop()
        waiting += found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    raise RecursionError("the text refers to itself, or repeats itself beyond measure")


def presets() -> list[str]:
    """Names of the presets that come with twinrl."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def locate(name: str, relative_to: Path | None = None) -> Path:
    """The file of a preset name or a path; paths are relative to the extending file, then to the working folder."""
    if os.path.isfile(PRESETS / f"{name}.yaml"):  # of pathlib's, one fails where a name is too long for a file
        return PRESETS / f"{name}.yaml"
    if relative_to and os.path.isfile(relative_to / name):
        return relative_to / name
    if len(name) > LONGEST_SHOWN or (not name.endswith((".yaml", ".yml")) and not os.path.isfile(name)):
        close = difflib.get_close_matches(name, presets(), n=1)
        fix = f"did you mean {close[0]}?" if close else f"presets: {', '.join(presets())}"
        raise InputError(f"no preset or file {name[:LONGEST_SHOWN]!r}", fix=fix)
    return Path(name)


def merge(base: Mapping[str, Any], over: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """``over`` laid over ``base``, key by key; ``null`` removes a mapping, another ``kind`` replaces it whole.

    A section of the whole configuration is not removed but null, for its schema to judge.

    Arguments:
        base, over: nested mappings.
        inside: dotted path of the section that they are; empty for the whole configuration.

    Raises:
        InputError: a section is laid over a list.

    A mapping without ``kind`` has the one of ``IMPLIED_KINDS``, else its own key; a name laid under a mapping is
    short for ``{kind: name}``.
    """
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, str) and isinstance(value, Mapping):
            old = {"kind": old}
        if isinstance(old, list) and isinstance(value, Mapping):
            raise InputError(
                f"{inside}{key} is a list and no section", got=f"{old!r:.100}", expected="key: value lines"
            )
        if value is None and isinstance(old, Mapping) and inside:
            del result[key]
        elif isinstance(value, Mapping) and isinstance(old, Mapping) and _same_kind(key, old, value):
            result[key] = merge(old, value, f"{inside}{key}.")
        else:
            result[key] = value
    return result


def _same_kind(key: str, old: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    kind = old.get("kind", IMPLIED_KINDS.get(key, key))
    return value.get("kind", kind) == kind


def load_mapping(name: str, relative_to: Path | None = None, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The raw mapping of a preset or file with everything that it ``extends``."""
    path = Path(os.path.realpath(locate(name, relative_to)))  # of pathlib's, one fails where a link leads to itself
    if path in _seen:
        raise InputError("configurations extend each other in a circle", got=" → ".join(p.stem for p in (*_seen, path)))
    value = read_yaml(path)
    parent = value.pop("extends", None)
    if parent is None:
        return value
    return merge(load_mapping(str(parent), path.parent, (*_seen, path)), value)


def override(value: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """``key.path=value`` assignments laid over a raw mapping; values are read as YAML."""
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise InputError(f"override {assignment!r} is not an assignment", expected="key.path=value")
        try:
            leaf = parsed_yaml(text)
        except (yaml.YAMLError, RecursionError) as error:
            raise InputError(f"override {assignment!r} has a malformed value", got=error) from error
        for key in reversed(path.split(".")):
            leaf = {key: leaf}
        value = merge(value, leaf)
    return value


def validate(schema: type[BaseModel], value: Mapping[str, Any], context: str | None = None) -> Any:
    """``value`` as ``schema``. Raises InputError in one line: the key, what was got, what is expected."""
    try:
        return schema.model_validate(value, context=context)
    except ValidationError as error:
        raise InputError(one_line(error.errors())) from error


def one_line(errors: Any, prefix: tuple[Any, ...] = ()) -> str:
    """What is wrong with a configuration, the first few things of it."""
    said = [_told(error, prefix) for error in errors[:MOST_TOLD]]
    more = f"and {len(errors) - MOST_TOLD} more" if len(errors) > MOST_TOLD else ""
    return "; ".join([*said, *filter(None, [more])])


def _told(error: Any, prefix: tuple[Any, ...]) -> str:
    location = prefix + tuple(error["loc"])
    if error["type"] == "nested":
        return one_line(error["ctx"]["errors"], location)
    if error["type"] == "unknown_key":
        return f"unknown key {'.'.join(map(str, (*location, error['ctx']['key'])))}; {error['msg']}"
    where = ".".join(map(str, location))
    message = error["msg"].removeprefix("Value error, ")
    got = error["input"]
    told = repr(got)
    told = told if len(told) <= LONGEST_SHOWN else f"{told[:LONGEST_SHOWN]}…"
    shown = (
        "" if isinstance(got, Mapping) or error["type"] in ("value_error", "missing", "component") else f", got {told}"
    )
    if isinstance(got, Mapping) and error["type"] == "string_type":
        shown = f", without keys below it; fix: {where}=…"
    return f"{where}: {message[0].lower() + message[1:]}{shown}" if where else message


# --- identity -------------------------------------------------------------------------------------------


def canonical_hash(settings: Mapping[str, Any]) -> str:
    """First 8 hex digits of the SHA-256 over the sorted JSON of plain values."""
    content = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested mappings."""
    different = []
    for key in sorted(set(a) | set(b)):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            different += differing_keys(left, right, f"{prefix}{key}.")
        elif left != right:
            different.append(f"{prefix}{key}")
    return different
