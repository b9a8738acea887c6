"""Samplers: UCGM-S for every kind of network here, and the same samples through diffusers.

``from twinrl.sampling.scheduler import TwinFlowScheduler`` for the diffusers scheduler; it is not imported
here because diffusers takes seconds to import.
"""

from twinrl.sampling.sampler import StepNoise, keyed_noise, sample
from twinrl.sampling.settings import (
    SamplerConfig,
    any_step,
    euler,
    few_step,
    multi_step,
    nfe,
    simpletuner_gap_end,
    time_grid,
)
from twinrl.sampling.update import Evaluation, SamplerState, initial_state, plan, update

__all__ = [
    "Evaluation",
    "SamplerConfig",
    "SamplerState",
    "StepNoise",
    "any_step",
    "euler",
    "few_step",
    "initial_state",
    "keyed_noise",
    "multi_step",
    "nfe",
    "plan",
    "sample",
    "simpletuner_gap_end",
    "time_grid",
    "update",
]
