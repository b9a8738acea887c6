"""twinrl: an experiment framework for RL-augmented TwinFlow, and the trainer that shows why it diverges."""

from twinrl import compat

__version__ = "0.2.0"

_COMPONENTS = {  # diffusers looks the parts of an exported pipeline up here, with their base classes
    "TwinFlowScheduler": "twinrl.sampling.scheduler",
    "SchedulerMixin": "diffusers",
    "ModelMixin": "diffusers",
    "SD3TwinFlowTransformer": "twinrl.backends.families.sd3",
    "QwenImageTwinFlowTransformer": "twinrl.backends.families.qwen_image",
    "ZImageTwinFlowTransformer": "twinrl.backends.families.z_image",
    "SanaTwinFlowTransformer": "twinrl.backends.families.sana",
    "FluxTwinFlowTransformer": "twinrl.backends.families.flux",
    "StableDiffusionTwinFlowUNet": "twinrl.backends.families.stable_diffusion",
}


def register(cls: type) -> None:
    """Let diffusers find a class of one's own in an exported pipeline, once its module is imported."""
    _COMPONENTS[cls.__name__] = cls.__module__


def __getattr__(name: str) -> object:
    if name not in _COMPONENTS:
        raise AttributeError(f"module 'twinrl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_COMPONENTS[name]), name)


compat.install()
