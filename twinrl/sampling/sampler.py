"""UCGM-S: one sampler for few-step, any-step and multi-step networks (arXiv:2505.07447)."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from twinrl.config.components import checked
from twinrl.config.errors import InputError
from twinrl.flow import draws
from twinrl.flow.conditions import Condition, Network
from twinrl.sampling.settings import SamplerConfig
from twinrl.sampling.update import Evaluation, SamplerState, initial_state, plan, update

# (x (B, C, H, W), t (B,), r (B,), condition) -> F (B, C, H, W)
# step -> ε (B, C, H, W)
StepNoise: TypeAlias = Callable[[int], Tensor]

NOISE_PURPOSE = "sampler noise"


@torch.no_grad()
def sample(
    network: Network,
    z: Tensor,
    condition: Condition,
    config: SamplerConfig,
    *,
    noise: StepNoise | None = None,
    seed: int = 0,
    guidance: float = 0.0,
    null: Condition | None = None,
) -> Tensor:
    """Turns noise into data; the state is kept in float64, the network sees ``z``'s dtype.

    Arguments:
        network: ``(x, t, r, condition) → F``; times (B,) in ``z``'s dtype, float32 where that is coarser.
        z: starting noise (B, C, H, W), floating point.
        condition: what the network is told beside x and the times, B rows.
        config: the settings, e.g. ``few_step(2)``.
        noise: step → ε (B, C, H, W), the fresh noise of the steps that inject some. By default ε is keyed by
            ``(seed, "sampler noise", step)``, so that equal seeds give equal samples on every device.
        seed: of the injected noise; unused where ``noise`` is given or nothing is injected.
        guidance: g of ``F(c) + g·(F(c) − F(∅))``; 0 is the conditional prediction and costs one call.
        null: the empty condition ∅ with B rows; needed where ``guidance`` is not 0.

    Returns:
        The last prediction x̂ (B, C, H, W) in ``z``'s dtype.

    Raises:
        InputError: ``z`` is not floating point, ``null`` is missing, a shape is wrong.

    *When to use*: ``few_step`` for TwinFlow students, with guidance 0 because it is in their training target;
    ``euler`` with guidance for teachers.
    """
    _check(z, guidance, null)
    state = initial_state(z)
    for evaluation in plan(config):
        F = _velocity(network, state, z.dtype, evaluation, condition, guidance, null)
        state = update(evaluation, state, F, _noise(evaluation, z, noise, seed))
    return state.x.to(z.dtype)


def _check(z: Tensor, guidance: float, null: Condition | None) -> None:
    if not z.is_floating_point():
        raise InputError("the starting noise must be floating point", got=z.dtype)
    if guidance and null is None:
        raise InputError(
            "guidance needs the empty condition",
            got=f"guidance {guidance:g} and no null",
            fix="pass null=... or guidance=0",
        )


def _velocity(
    network: Network,
    state: SamplerState,
    dtype: torch.dtype,
    evaluation: Evaluation,
    condition: Condition,
    guidance: float,
    null: Condition | None,
) -> Tensor:
    """``F(c) + g·(F(c) − F(∅))`` in the state's dtype, at the evaluation's times."""
    x = state.x.to(dtype)
    times = torch.promote_types(dtype, torch.float32)
    t = torch.full((len(x),), evaluation.time, dtype=times, device=x.device)
    r = torch.full((len(x),), evaluation.target_time, dtype=times, device=x.device)
    F = _called(network, x, t, r, condition).to(state.x)
    if guidance and null is not None:
        F = F + guidance * (F - _called(network, x, t, r, null).to(state.x))
    return F


def _called(network: Network, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
    return checked(network(x, t, r, condition), Tensor, network, "forward", x.shape)


def _noise(evaluation: Evaluation, z: Tensor, noise: StepNoise | None, seed: int) -> Tensor | None:
    """The step's ε, or None where the step injects none."""
    if not evaluation.needs_noise:
        return None
    if noise is None:
        return keyed_noise(z.shape, seed, evaluation.step).to(z.device)
    epsilon = noise(evaluation.step)
    if epsilon.shape != z.shape:
        raise InputError(
            f"the injected noise of step {evaluation.step} has the wrong shape",
            got=tuple(epsilon.shape),
            expected=tuple(z.shape),
        )
    return epsilon


def keyed_noise(shape: tuple[int, ...], seed: int, step: int) -> Tensor:
    """The ε that ``sample`` injects at ``step``: keyed N(0, 1) in float32, on the CPU."""
    return draws.normal(tuple(shape), seed, NOISE_PURPOSE, step)
