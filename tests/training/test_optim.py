"""Optimizers by name; plateau and early stopping: when they act, and that a resumed run acts alike."""

import itertools
import math

import pytest
import torch

from twinrl.config import component
from twinrl.run import names, runlog
from twinrl.training.optim import LR_POLICIES, OPTIMIZERS, ConstantLR, CosineLR, EarlyStop, Plateau, update

NAN = math.nan
QUALITIES = [1.0, 0.5, 0.6, NAN, 0.4999999, 0.3, NAN, NAN, 0.4, 0.31, 0.29, 0.4, 0.4, 0.4, 0.4, 0.4]


def plateau(**settings: float) -> Plateau:
    return Plateau(Plateau.Config(**settings), 100)


def observed(policy: Plateau, qualities: list[float]) -> list[float]:
    """The factor after each validation."""
    factors = []
    for quality in qualities:
        policy.observe(quality)
        factors.append(policy.factor(10**6))
    return factors


def test_an_update_is_measured_over_the_weights() -> None:
    """‖(3, 4)‖ / ‖(6, 8)‖ over two parameters together; the rate is the one that is given."""
    parameters = [torch.nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (6.0, 8.0)]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    for parameter, gradient in zip(parameters, (-3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
    measures = update(optimizer, 1.0, parameters, measure=True)
    assert measures == {names.UPDATE_RATIO: 0.5}
    assert [p.item() for p in parameters] == [9, 4]
    assert update(optimizer, 0.0, parameters, measure=False) == {}


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"adamw8bit"}))  # which needs torchao: test_adam8bit.py
def test_optimizers_take_their_settings_and_leave_frozen_parameters(name: str) -> None:
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    config = OPTIMIZERS[name].Config(lr=0.1, betas=(0.8, 0.9), weight_decay=0.5, eps=1e-3)
    group = OPTIMIZERS[name].build(config, module.parameters()).param_groups[0]
    assert [id(p) for p in group["params"]] == [id(module.weight)]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.1, (0.8, 0.9), 0.5, 1e-3)


def test_only_adamw_decouples_weight_decay() -> None:
    """With no gradient, decoupled decay shrinks by lr·decay; coupled decay makes Adam's sign step instead."""
    left = {}
    for name in ("adam", "adamw"):
        weight = torch.nn.Parameter(torch.tensor([2.0, 0.01]))
        weight.grad = torch.zeros(2)
        OPTIMIZERS[name].build(OPTIMIZERS[name].Config(lr=0.1, weight_decay=0.5), [weight]).step()
        left[name] = weight.detach()
    torch.testing.assert_close(left["adamw"], torch.tensor([2.0, 0.01]) * 0.95)
    torch.testing.assert_close(left["adam"], torch.tensor([1.9, -0.09]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 2.0), (-0.1, 0.9)])
def test_impossible_betas_are_refused_before_torch_sees_them(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="betas"):
        OPTIMIZERS["adamw"].Config(betas=betas)


def test_constant_warms_up_linearly_and_then_stays() -> None:
    policy = ConstantLR(ConstantLR.Config(warmup=3), 100)
    assert [policy.factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert ConstantLR(ConstantLR.Config(), 100).factor(0) == 1
    policy.observe(NAN)
    policy.load(policy.state())
    assert policy.factor(100) == 1


def test_plateau_cuts_after_patience_validations_without_improvement() -> None:
    factors = observed(plateau(patience=2, cut=0.5), [1.0, 0.9, 0.95, 0.95, 0.95, 0.95, 0.8, 0.85])
    assert factors == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25]


def test_plateau_keeps_the_warm_up_and_the_minimum() -> None:
    policy = plateau(patience=1, cut=0.1, minimum=0.05, warmup=1)
    assert observed(policy, [1.0, 1.0, 1.0, 1.0]) == [1, 0.1, 0.05, 0.05]
    assert policy.factor(0) == 0.025


@pytest.mark.parametrize("start", range(len(QUALITIES)))
def test_plateau_and_early_stop_resume_as_if_undisturbed(start: int) -> None:
    whole, stop = plateau(patience=2), EarlyStop(EarlyStop.Config(patience=3))
    factors, stops = observed(whole, QUALITIES), [stop.observe(q) for q in QUALITIES]
    first, second = plateau(patience=2), plateau(patience=2)
    observed(first, QUALITIES[:start])
    second.load(first.state())
    assert observed(second, QUALITIES[start:]) == factors[start:]
    early, later = EarlyStop(EarlyStop.Config(patience=3)), EarlyStop(EarlyStop.Config(patience=3))
    for quality in QUALITIES[:start]:
        early.observe(quality)
    later.load({key: runlog.encode(value) for key, value in early.state().items()})  # infinities travel as strings
    assert [later.observe(q) for q in QUALITIES[start:]] == stops[start:]


def test_nan_is_never_an_improvement_and_never_the_best() -> None:
    policy = plateau(patience=2)
    assert observed(policy, [NAN, NAN, 1.0, NAN, 0.5, NAN, NAN]) == [1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25]
    assert policy.best == 0.5
    stop = EarlyStop(EarlyStop.Config(patience=2))
    assert [stop.observe(q) for q in (1.0, NAN, 0.5, NAN, NAN)] == [False, False, False, False, True]


def test_threshold_is_relative_improvement() -> None:
    def survives(quality: float) -> bool:
        stop = EarlyStop(EarlyStop.Config(patience=1, threshold=0.1))
        stop.observe(2.0)
        return not stop.observe(quality)

    assert survives(1.79)
    assert not survives(1.81)


@pytest.mark.parametrize("threshold", [0.0, 1e-4, 0.1, 1.0])
def test_a_quality_that_stays_below_zero_is_no_improvement(threshold: float) -> None:
    """Unbiased kernel distances fall below zero near the floor: the same value again is not better."""
    stop = EarlyStop(EarlyStop.Config(patience=2, threshold=threshold))
    assert [stop.observe(-0.001) for _ in range(3)] == [False, False, True]
    assert observed(plateau(patience=2, threshold=threshold), [-0.001] * 3) == [1, 1, 0.5]
    deeper = EarlyStop(EarlyStop.Config(patience=1, threshold=0.1))
    assert [deeper.observe(q) for q in (-1.0, -1.11, -1.2)] == [False, False, True]


def test_without_patience_nothing_stops() -> None:
    stop = EarlyStop(EarlyStop.Config())
    assert not any(stop.observe(q) for q in itertools.repeat(1.0, 100))


def test_policies_by_name_and_their_defaults() -> None:
    from pydantic import TypeAdapter

    adapter = TypeAdapter(component(LR_POLICIES))
    assert isinstance(LR_POLICIES.build(adapter.validate_python("constant"), 100), ConstantLR)
    made = LR_POLICIES.build(adapter.validate_python({"kind": "plateau", "patience": 7}), 100)
    assert isinstance(made, Plateau)
    assert made.config.patience == 7


def test_cosine_falls_from_the_full_rate_to_the_final_one() -> None:
    policy = CosineLR(CosineLR.Config(final=0.1), 100)
    factors = [policy.factor(step) for step in range(101)]
    assert factors[0] == 1
    assert factors[50] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)
    assert CosineLR(CosineLR.Config(warmup=9), 100).factor(0) == pytest.approx(0.1)
