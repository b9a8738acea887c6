"""twinrl: an experiment framework for RL-augmented TwinFlow, and the trainer that shows why it diverges."""

from twinrl.machine import compat

__version__ = "0.2.0"

_COMPONENTS = {  # diffusers looks the parts of an exported pipeline up here, with their base classes
    "TwinFlowScheduler": "twinrl.sampling.scheduler",
    "SchedulerMixin": "diffusers",
    "ModelMixin": "diffusers",
}


def register(cls: type) -> None:
    """Let diffusers find a class in an exported pipeline, once its module is imported."""
    _COMPONENTS[cls.__name__] = cls.__module__


def __getattr__(name: str) -> object:
    from importlib import import_module

    if "TwinFlow" in name:  # a transformer, which its family's module registers
        families = import_module("twinrl.backends.families")
        for family in families.FAMILIES:
            if name not in _COMPONENTS:
                families.family_class(family)
    if name not in _COMPONENTS:
        raise AttributeError(f"module 'twinrl' has no attribute {name!r}")
    return getattr(import_module(_COMPONENTS[name]), name)


compat.install()
