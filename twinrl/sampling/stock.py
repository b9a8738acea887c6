"""Schedulers of diffusers itself that give a ``TwinFlowScheduler``'s samples, for who has no twinrl."""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from twinrl.config.errors import InputError
from twinrl.sampling.scheduler import TwinFlowScheduler
from twinrl.sampling.update import Evaluation

STOCK = FlowMatchEulerDiscreteScheduler.__name__


def stock_scheduler(scheduler: TwinFlowScheduler, num_inference_steps: int) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' own scheduler (0.34 and later) that gives ``scheduler``'s samples in so many steps.

    ``save_pretrained`` writes its ``scheduler_config.json``. With another number of steps it has another grid. Its
    noise between steps comes from torch's global generator, as ours does with ``seed=None``.

    Arguments:
        scheduler: its settings count, not where it stands.
        num_inference_steps: what the pipeline will be told; at least 1.

    Raises:
        InputError: the sampler does what that class cannot, or has a grid that no configuration of it has.

    *When to use*: a pipeline for others. In one's own, ``TwinFlowScheduler`` serves every number of steps.
    """
    if scheduler.config["use_dynamic_shifting"]:
        raise _refusal("use_dynamic_shifting", "a grid that each picture's size moves")
    ours = TwinFlowScheduler.from_config(scheduler.config)
    ours.set_timesteps(num_inference_steps)
    stochastic = _stochastic(ours.evaluations)
    for settings in _candidates(ours):
        stock = FlowMatchEulerDiscreteScheduler.from_config(settings | {"stochastic_sampling": stochastic})
        if all(_equal(grid, ours.sigmas) for grid in _grids(stock, num_inference_steps)):
            return stock
    sigmas = [round(float(t), 6) for t in ours.sigmas[:-1]]
    raise InputError(
        f"no configuration of {STOCK} has this grid", got=sigmas,
        fix=f"pass sigmas={sigmas} to a pipeline with {STOCK}(stochastic_sampling={stochastic}), or set gap_start=0",
    )  # fmt: skip


def _stochastic(evaluations: tuple[Evaluation, ...]) -> bool:
    """Whether all noise is fresh. Raises InputError for steps that are neither Euler's nor that."""
    if any(evaluation.corrects for evaluation in evaluations):
        raise _refusal("order 2", "corrections")
    if any(evaluation.extrapolation for evaluation in evaluations):
        raise _refusal("extrapolation", "predictions that go on")
    ratios = {evaluation.stochastic_ratio for evaluation in evaluations if evaluation.stop > 0}
    if not ratios <= {0.0} and not ratios <= {1.0}:
        raise _refusal("stochastic_ratio", "a share of fresh noise", "0 or 1")
    return ratios == {1.0}


def _refusal(setting: str, what: str, expected: str | None = None) -> InputError:
    return InputError(f"{STOCK} has no {what} ({setting})", expected=expected, fix="use TwinFlowScheduler")


def _candidates(ours: TwinFlowScheduler) -> Iterator[dict[str, Any]]:
    """Configurations with the first and the last time of the grid, the plainest first."""
    first, last = float(ours.evaluations[0].time), float(ours.evaluations[-1].time)
    own = {name: ours.config[name] for name in ("num_train_timesteps", "shift")}
    yield own
    if len(ours.evaluations) > 1:
        yield own | {"shift_terminal": last}
    # The class reads the ends from its configuration, which keeps them; that it would ignore them is said in vain.
    ends = own | {"shift": 1.0, "sigma_min": last, "sigma_max": first}
    yield ends | {"use_exponential_sigmas": True}  # any two times
    yield ends | {"use_beta_sigmas": True}  # three times of equal distance


def _grids(stock: Any, steps: int) -> Iterator[Tensor]:
    """With and without the ramp that some pipelines pass by default."""
    stock.set_timesteps(steps)
    yield stock.sigmas
    stock.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    yield stock.sigmas


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-6)
