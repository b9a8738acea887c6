"""``twinrl doctor``: what this machine has, and what the configuration's keys mean."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import torch
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.table import Table
from rich.text import Text

from twinrl import config
from twinrl.backends import NETWORKS
from twinrl.data.settings import PrepareConfig
from twinrl.flow.schedules import SCHEDULES
from twinrl.gradients.transforms import TRANSFORMS
from twinrl.machine.files import cache_dir
from twinrl.renoise import RENOISE
from twinrl.rewards import REWARDS
from twinrl.rewards.latent import ESTIMATORS
from twinrl.run import environment
from twinrl.terms import TERMS
from twinrl.terms.losses import LOSSES
from twinrl.training import schema
from twinrl.training.optim import LR_POLICIES, OPTIMIZERS

COMPONENTS: dict[str, Mapping[str, Any]] = {
    "model.network": NETWORKS,
    "terms.<name>  (kind: by default the name)": TERMS,
    "terms.<name>.loss": LOSSES,
    "renoise": RENOISE,
    "reward.model, reward.held_out.<name>, judges.<name>": REWARDS,
    "reward.gradient.estimator": ESTIMATORS,
    "gradients.total.<name>, .each.<name>, .terms.<term>.<name>  (kind: by default the name)": TRANSFORMS,
    "optim": OPTIMIZERS,
    "lr_policy": LR_POLICIES,
    "a schedule  (a number is a constant one; moments: 300 = steps, 30%, after_renoise, after_renoise+10%)": SCHEDULES,
}
"""Where components are configured → their kinds."""
WIDTH, KEY_WIDTH, DEFAULT_WIDTH = 120, 36, 18
"""Columns of the printed keys: in all where there is no terminal, of a key, of its default."""


class Key(NamedTuple):
    """A dotted key of the configuration, its default as YAML (empty for a section), its meaning."""

    name: str
    default: str
    meaning: str


def doctor(show_schema: bool, console: Console) -> int:
    """Print the machine's state, or with ``show_schema`` the configuration's keys; 0."""
    if show_schema:
        print_schema(console)
        return 0
    described = environment.describe()
    console.print(f"python {described['python']}, {described['platform']}")
    console.print("packages: " + ", ".join(f"{name} {version}" for name, version in described["packages"].items()))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    console.print(f"device: {', '.join(gpus) or 'cpu'}, {torch.get_num_threads()} threads")
    console.print(f"cache: {cache_dir()} ({_size(cache_dir())})")
    console.print(f"presets: {', '.join(config.presets())}")
    return 0


def _size(folder: Path) -> str:
    if not folder.is_dir():
        return "empty; the lab is built on first use, in about two minutes"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 2**20:.0f} MiB"


# --- the schema -------------------------------------------------------------------------------------------


def print_schema(console: Console) -> None:
    """Every key with its default and meaning: of a run, of each kind of component, of ``twinrl data prepare``."""
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    _heading("A run: key, default, meaning", console)
    console.print(_table(keys(schema.RunConfig)))
    _heading("Components: a kind by name, or {kind: …} with its keys; a class of one's own by its dotted path", console)
    for where, registry in COMPONENTS.items():
        _heading(where, console)
        console.print(_table(_by_kind(registry)))
    _heading("twinrl data prepare", console)
    console.print(_table(keys(PrepareConfig)))


def _heading(text: str, console: Console) -> None:
    console.print(f"\n{text}", style="bold underline", markup=False, highlight=False)


def _table(shown: Iterable[Key]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(width=KEY_WIDTH, no_wrap=True)
    table.add_column(width=DEFAULT_WIDTH, overflow="fold")
    table.add_column()
    for key in shown:
        table.add_row(*map(Text, key), style=None if key.default else "bold")
    return table


def keys(settings: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """The keys of a settings class, sections unfolded; ``<name>`` stands for names of one's own."""
    for name, info in settings.model_fields.items():
        key, sections = f"{prefix}{name}", list(_sections(info.annotation))
        if sections == [("", info.annotation)]:
            if said := _text(info.description or sections[0][1].__doc__):
                yield Key(key, "", said)
        else:
            yield Key(key, _default(info), _meaning(info))
        for between, section in sections:
            yield from keys(section, f"{key}{between}.")


def kinds(registry: Mapping[str, Any]) -> dict[str, list[Key]]:
    """Kind → its keys."""
    return {kind: [key for key in keys(cls.Config) if key.name != "kind"] for kind, cls in registry.items()}


def _by_kind(registry: Mapping[str, Any]) -> Iterator[Key]:
    """The kinds, each with its keys; those that all have alike come once, before them."""
    known = kinds(registry)
    common = [key for key in next(iter(known.values())) if all(key in own for own in known.values())]
    if common:
        yield Key("every kind", "", "")
        yield from map(_indented, common)
    for kind, own in known.items():
        yield Key(kind, "", _text(registry[kind].__doc__, paragraphs=1))
        yield from (_indented(key) for key in own if key not in common)


def _indented(key: Key) -> Key:
    return key._replace(name=f"  {key.name}")


def _sections(annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    """(what stands between, class) of settings in a type: of ``Lora | None`` ("", Lora), of ``dict[str, Lora]``
    (".<name>", Lora). A component's type is the bare BaseModel, which any kind may fill."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation is not BaseModel:
            yield "", annotation
        return
    own = ".<name>" if get_origin(annotation) is dict else ""
    for part in get_args(annotation):
        yield from ((own + between, section) for between, section in _sections(part))


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = to_jsonable_python(info.get_default(call_default_factory=True))
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=WIDTH).removesuffix("...\n").strip()


def _meaning(info: FieldInfo) -> str:
    """The description, and the choices that it does not name."""
    said, choices = info.description or "", [str(choice) for choice in _choices(info.annotation)]
    if len(choices) < 2 or all(choice in said for choice in choices):
        return said
    return f"{said}; one of {', '.join(choices)}"


def _choices(annotation: Any) -> Iterator[object]:
    for part in get_args(annotation):
        yield from [part] if get_origin(annotation) is Literal else _choices(part)


def _text(doc: str | None, paragraphs: int | None = None) -> str:
    """A docstring's paragraphs, each in one line."""
    parts = inspect.cleandoc(doc or "").replace("``", "`").split("\n\n")
    return "\n".join(" ".join(part.split()) for part in parts[:paragraphs])
