"""Losses, terms and gradients against values that the public code gives (tests/golden, float64).

The components are those of training: presets give terms and settings, ``divide`` builds the batch,
``Objective`` calls networks and terms.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from tests.reference import case, cases, flat_gradient, network, relative_error
from twinrl.backends.wrappers import WithoutTargetTime
from twinrl.flow.branches import Batch, TimeLaw, divide
from twinrl.flow.teacher import Teacher
from twinrl.terms import TERMS, Ascent
from twinrl.terms.objective import Objective, Pass, TermLoss
from twinrl.training import schema

TOLERANCE = 1e-6
EACH = pytest.mark.parametrize("regime", ["big", "small"])


class Given:
    """Draws of a global batch given by purpose; rows that a purpose does not concern are filled with zeros."""

    def __init__(self, numbers: Mapping[str, Tensor]):
        self.numbers = numbers

    def normal(self, purpose: str, rows: Sequence[int]) -> Tensor:
        return self.numbers[purpose][list(rows)]

    def uniform(self, purpose: str) -> Tensor:
        return self.numbers[purpose]


def at_rows(value: Tensor, first: int, total: int = 8) -> Tensor:
    """``value`` placed at rows ``first``… of a tensor of ``total`` rows."""
    full = torch.zeros(total, *value.shape[1:], dtype=value.dtype)
    full[first : first + len(value)] = value
    return full


def objective(preset: str, regime: str, overrides: list[str]) -> tuple[Objective, schema.RunConfig]:
    """The preset's objective on the reference networks; the teacher's weights are net_teacher's."""
    config = schema.load(preset, overrides)
    wrap = (lambda net: net) if config.model.target_time else WithoutTargetTime
    teacher = Teacher(wrap(network("net_student", regime)), config.teacher)
    for copied in (teacher.ema, teacher.frozen):
        if copied is not None:
            copied.load_state_dict(wrap(network("net_teacher", regime)).state_dict())
    terms = {name: TERMS.build(term) for name, term in config.terms.items()}
    return Objective(terms, teacher, config.guidance), config


def evaluate(made: Objective, batch: Batch) -> dict[str, TermLoss]:
    counts = {name: len(rows) for name, rows in batch.branch.items()}
    losses = Pass(made, batch, counts).losses()
    sum(part.loss for part in losses.values()).backward()
    return losses


def total(losses: dict[str, TermLoss]) -> Tensor:
    return sum(part.loss.detach() for part in losses.values())


@EACH
@pytest.mark.parametrize("name", cases("big", "tutorial"))
def test_tutorial(name: str, regime: str) -> None:
    v = case(name, regime)
    order, strength = name.split("_")[1][1:], name.split("_w")[1]
    made, config = objective(
        "tutorial",
        regime,
        [f"guidance.strength={strength}", f"terms.base.order={order}", f"terms.one_step_consistency.order={order}"],
    )
    drawn = Given({"t": v["t"], "r any": v["u"], "noise": v["z"], "renoise noise": v["z2"], "renoise time": v["tau"]})
    batch = divide(config.branches, config.time, v["x"], {"c": v["c"]}, {"c": v["e"]}, drawn)
    losses = evaluate(made, batch)
    public = {"base": "base", "real_velocity": "real", "adversarial": "adv", "rectify": "rectify"}
    for ours, theirs in (public | {"one_step_consistency": "onestep"}).items():
        assert relative_error(losses[ours].unweighted, v[f"term_{theirs}"]) < TOLERANCE, ours
    assert relative_error(total(losses), v["loss"]) < TOLERANCE
    assert relative_error(flat_gradient(made.teacher.student), v["grad"]) < TOLERANCE


LARGE = {
    "large_ema": ["guidance.strength=0.8"],
    "large_l2": ["guidance.strength=0.5", *(f"terms.{t}.loss=l2" for t in ("base", "adversarial", "rectify"))],
    "large_lam.5": ["guidance.strength=0.8", "time.consistency_ratio=0.5", "terms.rectify=null"],
    "large_frozen_w4_N1": [
        "guidance.strength=4", "terms.base.order=1", "teacher.kind=live", "teacher.guidance=frozen",
        "teacher.allow_live=true",
    ],
}  # fmt: skip


def large_batch(v: dict[str, Tensor], mix: Mapping[str, float], law: TimeLaw) -> Batch:
    drawn = Given(
        {
            "t": v["t"], "r any": v["u_any"], "r mul": v["u_mul"], "r e2e": v["t"], "r adv": v["t"], "noise": v["z"],
            "fake sample": at_rows(v["z_adv"], 6),
            "renoise noise": at_rows(v["z2"], 0), "renoise time": at_rows(v["tau"], 0),
        }
    )  # fmt: skip
    return divide(mix, law, v["x"], {"c": v["c"]}, {"c": v["e"]}, drawn)


@EACH
@pytest.mark.parametrize("name", LARGE)
def test_twinflow(name: str, regime: str) -> None:
    v = case(name, regime)
    made, config = objective("twinflow", regime, LARGE[name])
    batch = large_batch(v, config.branches, config.time)
    losses = evaluate(made, batch)
    signed = torch.cat([torch.ones(6), -torch.ones(2)])
    assert relative_error(batch.rows.t * signed, v["in_t"].flatten()) < TOLERANCE
    assert relative_error(batch.rows.r * signed, v["in_r"].flatten()) < TOLERANCE
    assert relative_error(batch.rows.x_t[:6], v["in_x_t"][:6]) < TOLERANCE
    assert relative_error(total(losses), v["loss"]) < TOLERANCE
    assert relative_error(flat_gradient(made.teacher.student), v["grad"]) < TOLERANCE


PUBLISHED = [
    "guidance.strength=0.8", "reward.model=lab_hps", "terms.adversarial.reward=fake_row",
    "terms.adversarial.reward_constant=0.05",
    *(f"terms.{t}.loss={{kind: barron, max_ratio: 1e6}}" for t in ("base", "adversarial", "rectify")),
    "terms.base.time_weight=clamped",
]  # fmt: skip
"""The published RL run's switches that change the loss of one batch, over `twinflow`."""


@EACH
def test_published(regime: str) -> None:
    v = case("published", regime)
    made, config = objective("twinflow", regime, PUBLISHED)
    made = dataclasses.replace(made, reward=lambda samples, rows, apart: Ascent(v["g"]))
    batch = large_batch(v, config.branches, config.time)
    losses = evaluate(made, batch)
    assert relative_error(total(losses), v["loss"]) < TOLERANCE
    assert relative_error(flat_gradient(made.teacher.student), v["grad"]) < TOLERANCE


@EACH
@pytest.mark.parametrize("adversarial", [0, 1])
def test_simpletuner(adversarial: int, regime: str) -> None:
    v = case(f"simpletuner_adv{adversarial}", regime)
    off = [] if adversarial else ["terms.adversarial=null", "terms.rectify=null"]
    made, config = objective("simpletuner", regime, ["terms.flow_matching=null", *off])
    drawn = Given(
        {
            "t": v["t"], "r any": 1 - v["r"] / v["t"], "noise": v["z"], "fake sample": v["zf"], "fake time": v["ta"],
        }
    )  # fmt: skip
    batch = divide(config.branches, config.time, v["x"], {"c": v["c"]}, {"c": v["e"]}, drawn)
    losses = evaluate(made, batch)
    public = {"base": "base", "real_velocity": "realvel", "adversarial": "adv", "rectify": "rectify"}
    for ours in losses:
        assert relative_error(losses[ours].unweighted, v[f"term_twinflow_{public[ours]}"]) < TOLERANCE, ours
    assert relative_error(total(losses), v["loss"]) < TOLERANCE
    assert relative_error(flat_gradient(made.teacher.student.network), v["grad"]) < TOLERANCE
