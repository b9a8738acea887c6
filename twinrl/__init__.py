"""twinrl: an experiment framework for RL-augmented TwinFlow, and the trainer that shows why it diverges."""

from twinrl import compat

__version__ = "0.2.0"

_COMPONENTS = {  # diffusers looks the parts of an exported pipeline up here, with their base classes
    "TwinFlowScheduler": "twinrl.sampling.scheduler",
    "SchedulerMixin": "diffusers",
    "ModelMixin": "diffusers",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _COMPONENTS:
        return getattr(import_module(_COMPONENTS[name]), name)
    if "TwinFlow" in name:  # a family's transformer
        from twinrl.backends.families import FAMILIES, family_class

        for transformer in (family_class(family).TRANSFORMER for family in FAMILIES):
            if transformer.__name__ == name:
                return transformer
    raise AttributeError(f"module 'twinrl' has no attribute {name!r}")


compat.install()
