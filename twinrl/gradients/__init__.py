"""Gradients term by term: the engine, the rules that change them, telemetry.

A new rule is one class in :mod:`twinrl.gradients.transforms` and a line in its registry ``TRANSFORMS``.
"""

from twinrl.gradients.chain import GradientsConfig
from twinrl.gradients.engine import Engine
from twinrl.gradients.gradient import Gradient
from twinrl.gradients.transforms import TRANSFORMS, RuleContext, Transform

__all__ = ["TRANSFORMS", "Engine", "Gradient", "GradientsConfig", "RuleContext", "Transform"]
