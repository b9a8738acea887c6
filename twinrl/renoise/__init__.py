"""Renoise: families of time distributions with moving parameters. A new family is a class and one line here."""

from twinrl.config.components import Registry
from twinrl.renoise.distributions import TimeDistribution
from twinrl.renoise.families import (
    BetaRenoise,
    LogitNormalRenoise,
    Placement,
    Renoise,
    RenoiseConfig,
    UniformRenoise,
)

RENOISE = Registry(
    "renoise", Renoise, {"beta": BetaRenoise, "uniform": UniformRenoise, "logit_normal": LogitNormalRenoise}
)

__all__ = ["RENOISE", "Placement", "Renoise", "RenoiseConfig", "TimeDistribution"]
