"""Families of pretrained models, by name.

``load_family("sd3", FamilyConfig(path=…))`` gives the family; its ``network(config)`` is a student
``F(x, t, r, condition)``. diffusers is imported with the first family, it takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from twinrl.errors import InputError

if TYPE_CHECKING:
    from twinrl.backends.families.family import Family, FamilyConfig

FAMILIES: dict[str, str] = {
    "sd3": "twinrl.backends.families.sd3:SD3",
    "qwen_image": "twinrl.backends.families.qwen_image:QwenImage",
    "z_image": "twinrl.backends.families.z_image:ZImage",
    "sana": "twinrl.backends.families.sana:Sana",
    "flux": "twinrl.backends.families.flux:Flux",
    "stable_diffusion": "twinrl.backends.families.stable_diffusion:StableDiffusion",
}
"""``model.family`` → module and class; a class of your own is added here."""


def family_class(name: str) -> "type[Family]":
    """The class of the family called ``name``.

    Raises:
        InputError: no such family; the message lists the known ones.
    """
    from twinrl.compat import ensure_torchvision

    if name not in FAMILIES:
        raise InputError(f"unknown family {name!r}", expected=f"one of {', '.join(FAMILIES)}")
    ensure_torchvision()
    module, _, attribute = FAMILIES[name].partition(":")
    found: type[Family] = getattr(import_module(module), attribute)
    return found


def load_family(name: str, config: "FamilyConfig") -> "Family":
    """The family ``name`` with the pipeline at ``config.path``; see ``Family.load``."""
    return family_class(name).load(config)
