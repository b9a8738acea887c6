"""Loss terms: one file each, and this registry. A new term is a class with a ``Config`` and one line here."""

from twinrl.components import Registry
from twinrl.terms.adversarial import Adversarial
from twinrl.terms.rcgm import Base, OneStepConsistency
from twinrl.terms.real_velocity import RealVelocity
from twinrl.terms.rectify import Rectify
from twinrl.terms.reward import Reward
from twinrl.terms.simpletuner import SimpleTunerBase
from twinrl.terms.term import Context, Pull, Query, Target, Term, TermConfig

TERMS = Registry(
    "term",
    Term,
    {
        "base": Base,
        "real_velocity": RealVelocity,
        "adversarial": Adversarial,
        "rectify": Rectify,
        "one_step_consistency": OneStepConsistency,
        "simpletuner_base": SimpleTunerBase,
        "reward": Reward,
    },
)

__all__ = ["TERMS", "Context", "Pull", "Query", "Target", "Term", "TermConfig"]
