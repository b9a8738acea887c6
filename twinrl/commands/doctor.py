"""``twinrl doctor``: what this machine has, and what the configuration's keys mean."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from twinrl import config, schema
from twinrl.backends import NETWORKS
from twinrl.data.source import cache_dir
from twinrl.optim import LR_POLICIES, OPTIMIZERS
from twinrl.terms import TERMS
from twinrl.terms.losses import LOSSES
from twinrl.tracking import environment

COMPONENTS: dict[str, Mapping[str, Any]] = {
    "model.network": NETWORKS, "terms.<name>": TERMS, "terms.<name>.loss": LOSSES, "optim": OPTIMIZERS,
    "lr_policy": LR_POLICIES,
}  # fmt: skip


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


def print_schema(console: Console) -> None:
    """Every key with its default and meaning, components by kind."""
    table = Table("key", "default", "meaning", box=None, pad_edge=False)
    for key, default, meaning in keys(schema.RunConfig):
        table.add_row(key, default, meaning)
    for where, registry in COMPONENTS.items():
        for kind, cls in registry.items():
            table.add_section()
            table.add_row(f"[bold]{where}: kind {kind}[/]", "", (cls.__doc__ or "").split("\n")[0])
            for key, default, meaning in keys(cls.Config):
                if key != "kind":
                    table.add_row(f"  {key}", default, meaning)
    console.print(table)


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, default, description) of a settings class, sections unfolded."""
    for name, info in model.model_fields.items():
        section: Any = info.annotation
        if isinstance(section, type) and issubclass(section, BaseModel) and section is not BaseModel:
            yield from keys(section, f"{prefix}{name}.")
        else:
            default = "" if info.is_required() else str(info.get_default(call_default_factory=True))
            yield f"{prefix}{name}", default.replace("[", r"\["), info.description or ""
