"""twinrl: an experiment framework for RL-augmented TwinFlow, and the trainer that shows why it diverges."""

from typing import TYPE_CHECKING, Any

from twinrl.machine import compat

if TYPE_CHECKING:  # when asked for, each is imported by __getattr__
    from twinrl.commands.interactive import Run as Run
    from twinrl.commands.interactive import load as load
    from twinrl.commands.interactive import train as train
    from twinrl.training.watching import Stopped as Stopped
    from twinrl.training.watching import Watch as Watch
    from twinrl.training.watching import watch as watch

__version__ = "0.2.0"

_COMPONENTS = {  # diffusers looks the parts of an exported pipeline up here, with their base classes
    "TwinFlowScheduler": "twinrl.sampling.scheduler",
    "SchedulerMixin": "diffusers",
    "ModelMixin": "diffusers",
}
_FACE = {  # what a program of one's own calls; other packages offer more by entry points
    "Run": "twinrl.commands.interactive",
    "load": "twinrl.commands.interactive",
    "train": "twinrl.commands.interactive",
    "Stopped": "twinrl.training.watching",
    "Watch": "twinrl.training.watching",
    "watch": "twinrl.training.watching",
}


def _offered(name: str) -> list[object]:
    """What another package offers by this name."""
    from importlib.metadata import entry_points

    found = () if name.startswith("_") else entry_points(group="twinrl.python", name=name)
    return [entry.load() for entry in found]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    home = _COMPONENTS.get(name) or _FACE.get(name)
    if home is None and "TwinFlow" in name:
        home = import_module("twinrl.backends.families").transformer_home(name)
    if home is None:
        for offered in _offered(name):
            return offered
        raise AttributeError(f"module 'twinrl' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FACE})


compat.install()
