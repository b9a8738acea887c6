"""Reference pages that are made from the code: configuration, commands, metrics, and the interface of each part."""

import ast
import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from typer.main import get_command

from twinrl import cli
from twinrl.commands import doctor
from twinrl.data.settings import PrepareConfig
from twinrl.run import names
from twinrl.training import schema

INTERFACES: dict[str, tuple[str, ...]] = {
    "terms": ("twinrl.terms",),
    "rewards": ("twinrl.rewards",),
    "gradients": ("twinrl.gradients",),
    "renoise": ("twinrl.renoise", "twinrl.flow.schedules"),
    "sampling": ("twinrl.sampling",),
    "flow": ("twinrl.flow.transport", "twinrl.flow.branches", "twinrl.flow.guidance", "twinrl.flow.teacher"),
    "networks": ("twinrl.backends.mlp", "twinrl.backends.dit", "twinrl.backends.unet", "twinrl.backends.embedding"),
    "stability": ("twinrl.stability",),
    "training": ("twinrl.training.optim", "twinrl.training.trainer", "twinrl.training.opened"),
    "studies": ("ablations.study", "ablations.design", "ablations.ledger"),
    "analysis": ("analysis",),
}
"""Page below ``api/`` → modules and packages that it documents; of a package every module."""


def pages() -> dict[str, str]:
    """Place on the site → Markdown."""
    made = {"configuration.md": configuration(), "commands.md": commands(), "metrics.md": metrics()}
    return made | {f"api/{title}.md": interface(title, modules) for title, modules in INTERFACES.items()}


# --- configuration --------------------------------------------------------------------------------------------------


def configuration() -> str:
    """Every key with its default and meaning, as ``twinrl doctor --schema`` prints them."""
    parts = [
        "# Configuration",
        "After this page you know every key of a run, its default and its meaning. `twinrl doctor --schema` prints the "
        "same. Set keys in YAML, or on the command line: `twinrl train lab train.steps=2000`.",
        *_sections(doctor.keys(schema.RunConfig)),
        "## Components",
        "A kind is a name, or `{kind: name, …}` with its keys. A class of your own is named by its dotted path "
        "([Extending](extending.md)).",
    ]
    for where, registry in doctor.COMPONENTS.items():
        path, _, note = where.partition("  ")
        parts += [f"### `{path}`", note.strip(" ()").capitalize()]
        for kind, keys in doctor.kinds(registry).items():
            parts += [f"#### `{kind}`", _first(inspect.getdoc(registry[kind])), _table(keys)]
    parts += ["## Preparation of data", "Keys of `twinrl data prepare`.", _table(doctor.keys(PrepareConfig))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _sections(keys: Iterable[doctor.Key]) -> Iterator[str]:
    """A heading and a table for each top-level key, in their order."""
    by_section: dict[str, list[doctor.Key]] = {}
    for key in keys:
        by_section.setdefault(key.name.partition(".")[0], []).append(key)
    for section, of_section in by_section.items():
        yield f"## `{section}`"
        yield from (key.meaning for key in of_section if key.name == section and not key.default)
        yield _table(key for key in of_section if key.default)


def _table(keys: Iterable[doctor.Key]) -> str:
    rows = [f"| `{key.name}` | {_code(key.default)} | {_cell(key.meaning)} |" for key in keys]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows]) if rows else ""


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _cell(text: str) -> str:
    """Text in a table's cell."""
    return _plain(" ".join(text.split())).replace("|", "\\|")


def _plain(text: str) -> str:
    """A docstring's text as Markdown: outside of code ``<name>`` is no tag."""
    parts = text.replace("``", "`").split("`")
    return "`".join(part if k % 2 else part.replace("<", "&lt;") for k, part in enumerate(parts))


# --- commands -------------------------------------------------------------------------------------------------------


def commands() -> str:
    """Every command with its arguments and options, from the parser itself."""
    app = get_command(_registered())
    parts = [
        "# Commands",
        "After this page you know every command and what it takes. `--help` behind a command says the same. "
        "`--debug` shows the traceback behind a one-line error. Exit codes: 0 is success. 1 says that a run failed or "
        "diverged under a stop policy. 2 is wrong input. 130 is an interruption with a checkpoint written.",
    ]
    for name, command in _leaves("twinrl", app):
        usage = " ".join(_called(one) for one in command.params if one.param_type_name == "argument")
        parts += [f"## `{name}`", f"    {name} {usage} [OPTIONS]", _prose(command.help), _parameters(command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _registered():  # type: ignore[no-untyped-def]  # a Typer, which mypy need not see here
    """The command line with the commands of the packages beside twinrl."""
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    if "analyze" not in known:
        cli._register_subcommands()
    return cli.app


def _leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", {})
    for word, one in inner.items():
        yield from _leaves(f"{name} {word}", one)
    if not inner:
        yield name, command


def _prose(text: str | None) -> str:
    return _plain("\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n")))


def _first(text: str | None) -> str:
    """The first paragraph of a docstring."""
    return _prose(text).partition("\n\n")[0]


def _parameters(command: Any) -> str:
    rows = [f"| {_code(_called(one))} | {_shown(one)} | {_cell(one.help or '')} |" for one in command.params]
    return "\n".join(["| what | default | meaning |", "|---|---|---|", *rows]) if rows else ""


def _called(parameter: Any) -> str:
    """An option by its flags, an argument by its name in the usage."""
    if parameter.param_type_name == "option":
        return ", ".join(parameter.opts)
    return parameter.metavar or parameter.name.upper()


def _shown(parameter: Any) -> str:
    if parameter.required:
        return "required"
    default = parameter.default
    return "" if default is None or default is False or callable(default) else _code(str(default))


# --- metrics --------------------------------------------------------------------------------------------------------


def metrics() -> str:
    """Every name in ``twinrl/run/names.py`` with what its module says of it."""
    rows = [f"| `{name}` | {_cell(meaning)} |" for name, meaning in metric_names()]
    head = [
        "# Metrics",
        "",
        "After this page you can read a log row. `log.jsonl` has one row a step, and MLflow shows the same names. "
        "Words in `<…>` stand for a term, a model or a number of network evaluations.",
        "",
        "| name | meaning |",
        "|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"


def metric_names() -> Iterator[tuple[str, str]]:
    """(name, meaning) of the module's constants and functions, in their order."""
    body = ast.parse(Path(names.__file__).read_text()).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            said = after.value if isinstance(after, ast.Expr) else None
            yield str(node.value.value), str(said.value) if isinstance(said, ast.Constant) else ""
        elif isinstance(node, ast.FunctionDef) and node.name not in ("is_outcome",):
            yield _pattern(node), ast.get_docstring(node) or ""


def _pattern(node: ast.FunctionDef) -> str:
    """What a function of names makes, with its arguments' names in the place of values."""
    required = node.args.args[: len(node.args.args) - len(node.args.defaults)]
    placeholders = [f"<{argument.arg}>" for argument in required]
    return str(getattr(names, node.name)(*placeholders))


# --- interfaces -----------------------------------------------------------------------------------------------------


def interface(title: str, modules: Iterable[str]) -> str:
    """A page that documents modules; the text is made by mkdocstrings. Of a package's own file it is the docstring."""
    shown = [module for given in modules for module in _modules(given)]
    return "\n".join([f"# {title.capitalize()}\n", *(f"::: {module}\n{_options(module)}" for module in shown)])


def _options(module: str) -> str:
    return "    options: {members: false}\n" if hasattr(import_module(module), "__path__") else ""


def _modules(name: str) -> Iterator[str]:
    yield name
    found = import_module(name)
    for one in pkgutil.iter_modules(getattr(found, "__path__", ())):
        if not one.name.startswith("_"):
            yield from _modules(f"{name}.{one.name}")
