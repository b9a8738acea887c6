"""Loss terms: one file each, and this registry. A new term is a class with a ``Config`` and one line here."""

from collections.abc import Mapping
from typing import Any

from twinrl.config.components import Registry
from twinrl.terms.adversarial import Adversarial
from twinrl.terms.dmd import DMD
from twinrl.terms.mean_flow import MeanFlow
from twinrl.terms.rcgm import Base, OneStepConsistency
from twinrl.terms.real_velocity import RealVelocity
from twinrl.terms.rectify import Rectify
from twinrl.terms.reward_ascent import RewardAscent
from twinrl.terms.simpletuner import SimpleTunerBase
from twinrl.terms.term import Ascent, Context, NetworkOwner, Query, Target, Term, TermConfig

TERMS = Registry(
    "term",
    (NetworkOwner, Term),
    {
        "base": Base,
        "real_velocity": RealVelocity,
        "adversarial": Adversarial,
        "rectify": Rectify,
        "one_step_consistency": OneStepConsistency,
        "simpletuner_base": SimpleTunerBase,
        "reward": RewardAscent,
        "mean_flow": MeanFlow,
        "dmd": DMD,
    },
)

__all__ = ["TERMS", "Ascent", "Context", "NetworkOwner", "Query", "Target", "Term", "TermConfig", "gradient_owners"]


def gradient_owners(terms: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Name of every gradient that is taken apart → the terms in whose losses it is: a term's own, and any that
    has a part of that name.

    Arguments:
        terms: settings by name.
    """
    owners: dict[str, tuple[str, ...]] = {name: (name,) for name in terms}
    for name, config in terms.items():
        for other in TERMS.find(config.kind).part_names(config):
            if other != name:
                owners[other] = (*owners.get(other, ()), name)
    return owners
