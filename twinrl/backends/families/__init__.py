"""Families of pretrained models, by name.

``load_family("sd3", FamilyConfig(path=…))`` gives the family; its ``network(config)`` is a student
``F(x, t, r, condition)``. diffusers is imported with the first family, it takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from twinrl.config.components import check_class, check_returns, own
from twinrl.config.errors import InputError

if TYPE_CHECKING:
    from twinrl.backends.families.family import Family, FamilyConfig

FAMILIES: dict[str, str] = {
    "sd3": "twinrl.backends.families.sd3:SD3",
    "qwen_image": "twinrl.backends.families.qwen_image:QwenImage",
    "z_image": "twinrl.backends.families.z_image:ZImage",
    "sana": "twinrl.backends.families.sana:Sana",
    "flux": "twinrl.backends.families.flux:Flux",
    "flux2_klein": "twinrl.backends.families.flux2:Flux2Klein",
    "flux2": "twinrl.backends.families.flux2:Flux2",
    "stable_diffusion": "twinrl.backends.families.stable_diffusion:StableDiffusion",
}
"""``model.family`` → module and class."""


def family_class(name: str) -> "type[Family]":
    """The class of the family called ``name``, or of a user's own at that dotted path.

    Raises:
        InputError: no such family, or a class that is none.
    """
    from twinrl.machine.compat import ensure_torchvision

    ensure_torchvision()
    if name not in FAMILIES:
        return _own_class(name)
    module, _, attribute = FAMILIES[name].partition(":")
    found: type[Family] = getattr(import_module(module), attribute)
    return found


def transformer_home(name: str) -> str | None:
    """The module of the transformer called ``name``, where a family or a module that is imported has one."""
    from twinrl.backends.families.twin_times import TRANSFORMERS

    for family in FAMILIES:
        if name not in TRANSFORMERS:
            family_class(family)
    return TRANSFORMERS.get(name)


def _own_class(path: str) -> "type[Family]":
    from twinrl.backends.families.family import Family, FamilyNetwork

    found: type[Family] = own(path, "family", FAMILIES)
    named = f"family {path!r}"
    check_class(found, (Family,), "family", named)
    if lacking := [name for name in Family.__annotations__ if not hasattr(found, name)]:
        raise InputError(
            f"{named} lacks {', '.join(lacking)}", fix="set what twinrl.backends.families.family.Family lists"
        )
    check_class(found.NETWORK, (FamilyNetwork,), "network of a family", f"{named}: NETWORK")
    check_returns(found, Family.RETURNS)
    return found


def load_family(name: str, config: "FamilyConfig") -> "Family":
    """The family ``name`` with the pipeline at ``config.path``; see ``Family.load``."""
    return family_class(name).load(config)
