"""The engine against plain back-propagation: the same gradient, taken apart, measured and changed exactly."""

import itertools
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fake_source import register, small
from tests.gradients.steps import BATCH, PRESETS, Perceptron, Step, assert_close, flat, step_of
from tests.rounding import bound
from tests.training.trainers import assert_same, finish, kill, rows
from twinrl.flow.branches import Rows
from twinrl.gradients import Engine
from twinrl.run import names
from twinrl.terms import Ascent, Context, Query, Target, Term, TermConfig
from twinrl.terms.objective import Objective
from twinrl.terms.term import instant
from twinrl.training import schema

SPACES = ("none", "parameter", "output")
LAST = {"twinflow": "rectify", "lab": "rectify", "tutorial": "one_step_consistency", "simpletuner": "rectify"}
NO_LIMIT = "clip: {max_norm: .inf}, zclip: {z: .inf, warmup: 2}"
IN_PARAMETERS = ", agc: {ratio: .inf}"
TAKEN_APART = ("parameter", "output")
ALL = "gradients.telemetry={shares_every: 1, cosines_every: 1}"
CLIPPED = [("twinflow", 5), ("lab", 5), ("tutorial", BATCH), ("simpletuner", BATCH)]


def no_limits(preset: str, space: str) -> list[str]:
    """Every rule that can be without effect, in the space given."""
    total = [f"gradients.total={{{NO_LIMIT}{IN_PARAMETERS}}}", f"gradients.space={space}"]
    if space == "none":
        return total
    extra = IN_PARAMETERS if space == "parameter" else ""
    relative = f"gradients.terms.{LAST[preset]}={{relative: {{ratio: .inf}}, scale: {{factor: 1}}}}"
    return [*total, f"gradients.each={{{NO_LIMIT}{extra}}}", relative]


def apart(space: str, *overrides: str) -> list[str]:
    return [f"gradients.space={space}", "gradients.telemetry={shares_every: 1, cosines_every: 1}", *overrides]


# --- the plain gradient -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("micro", "dropout"), [(BATCH, 0.0), (5, 0.4)])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("preset", PRESETS)
def test_infinite_thresholds_give_the_plain_gradient(preset: str, space: str, micro: int, dropout: float) -> None:
    """Also with dropout, whose masks must not depend on how many forward passes a space makes."""
    step = step_of(preset, *no_limits(preset, space), student=Perceptron(dropout), micro=micro)
    engine, expected = step.engine(), step.plain()
    for _ in range(3):  # past the warm-up
        gradient, _, measures = step.run(engine)
        assert_close(gradient, expected)
    assert measures[names.GRAD_TOTAL_RAW] == measures[names.GRAD_TOTAL_CLIPPED]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("preset", PRESETS)
def test_losses_are_those_of_the_plain_step(preset: str, space: str) -> None:
    for micro in (BATCH, 5):
        step = step_of(preset, *no_limits(preset, space), micro=micro)
        expected = [one.losses() for one in step.passes()]
        _, losses, _ = step.run()
        for before, after in zip(expected, losses, strict=True):
            assert set(before) == set(after)
            for name, part in before.items():
                torch.testing.assert_close(after[name].per_row, part.per_row, rtol=1e-10, atol=1e-12)
                torch.testing.assert_close(after[name].unweighted, part.unweighted, rtol=1e-10, atol=1e-12)
                assert not after[name].loss.requires_grad
                assert set(after[name].aux) == set(part.aux)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("preset", PRESETS)
def test_under_autocast(preset: str, space: str) -> None:
    """Passes divided otherwise round otherwise. The gradients stay float32.

    Half of the time for a first step, where the recursion's Δ = 0.01 would multiply a rounding of the network by 100.
    Seen over presets, spaces and instruction sets: cosines above 1 − 6e-6, norms within 7e-4.
    """
    student = Perceptron(dtype=torch.float32)
    terms = schema.load(preset).terms
    rules = *no_limits(preset, space), *(f"terms.{name}.delta=0.5" for name in terms if hasattr(terms[name], "delta"))
    step = step_of(preset, *rules, student=student, dtype=torch.float32, autocast=torch.bfloat16)
    gradient, _, _ = step.run()
    assert gradient.dtype == torch.float32
    assert torch.cosine_similarity(gradient, step.plain(), dim=0) > 0.9995
    assert gradient.norm().item() == pytest.approx(step.plain().norm().item(), rel=bound(5, dtype=torch.bfloat16))


class Casts(TorchDispatchMode):
    """Counts the casts of one tensor."""

    def __init__(self, tensor: Tensor):
        super().__init__()
        self.tensor, self.number = tensor, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cast = func is torch.ops.aten._to_copy.default
        self.number += cast and args[0].data_ptr() == self.tensor.data_ptr() and args[0].shape == self.tensor.shape
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("micro", [BATCH, 5])
@pytest.mark.parametrize("space", SPACES)
def test_passes_without_gradient_share_one_cast(space: str, micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A live teacher's weights are cast once for guidance, recursion, fake samples and rectify; no number changes."""

    def gradient() -> tuple[Tensor, int]:
        live = "teacher={kind: live, allow_live: true}", f"gradients.space={space}"
        student = Perceptron(dtype=torch.float32)
        step = step_of("twinflow", *live, student=student, micro=micro, dtype=torch.float32, autocast=torch.bfloat16)
        with Casts(student.enter.weight) as casts:
            found, _, _ = step.run()
        return found, casts.number

    once, few = gradient()
    monkeypatch.setattr(Objective, "casting_once", lambda self, device: nullcontext())
    every, many = gradient()
    assert once.abs().max() > 0
    assert torch.equal(once, every)
    assert few < many


@pytest.mark.parametrize("space", TAKEN_APART)
@pytest.mark.parametrize("rests", [True, False])
def test_a_force_that_rests_is_not_back_propagated(space: str, rests: bool) -> None:
    """The reward's term before its schedule starts: the same gradient and measures as from zeros."""
    reward = "terms.reward={branches: [e2e]}", "reward.model=brightness"
    step = step_of("lab", *reward, ALL, f"gradients.space={space}")
    zeros = Ascent(torch.zeros(BATCH // 4, 2, 3, 3, dtype=torch.float64), rests=rests)
    step.made = replace(step.made, reward=lambda samples, rows, apart: zeros)
    found, losses, measures = step.run()
    assert losses[0]["reward"].loss == 0
    without = step_of("lab", f"gradients.space={space}").run()[0]
    assert torch.equal(found, without) if rests else torch.allclose(found, without, rtol=1e-12, atol=0)
    told = {name: float(value) for name, value in measures.items() if "reward" in name}
    assert {told[names.grad("reward", kind)] for kind in ("norm_raw", "norm_clipped", "share")} == {0.0}
    assert told[names.grad("reward", "clip_coef")] == 1


@pytest.mark.parametrize("micro", [BATCH, 5])
@pytest.mark.parametrize("space", SPACES)
def test_frozen_parameters_get_no_gradient(space: str, micro: int) -> None:
    student = Perceptron()
    student.enter.weight.requires_grad_(False)
    student.leave.bias.requires_grad_(False)
    step = step_of("twinflow", *no_limits("twinflow", space), student=student, micro=micro)
    gradient, _, measures = step.run()
    assert student.enter.weight.grad is None
    assert student.leave.bias.grad is None
    assert_close(gradient, step.plain())
    assert measures[names.GRAD_TOTAL_RAW].item() == pytest.approx(gradient.norm().item(), rel=1e-10)


@pytest.mark.parametrize("space", SPACES)
def test_old_gradients_do_not_count(space: str) -> None:
    step = step_of("lab", *no_limits("lab", space))
    first, _, _ = step.run()
    engine = step.engine()
    step.run(engine)
    again, _, _ = step.run(engine)
    assert torch.equal(again, first)


# --- taken apart ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [BATCH, 5])
@pytest.mark.parametrize("preset", PRESETS)
def test_norms_shares_and_cosines_in_parameter_space(preset: str, micro: int) -> None:
    """Against every term's gradient by itself."""
    step = step_of(preset, *apart("parameter"), micro=micro)
    gradient, _, measures = step.run()
    parts = {name: step.plain(name) for name in step.made.terms}
    total = torch.stack(list(parts.values())).sum(0)
    assert_close(gradient, total)
    check_geometry(measures, parts)


@pytest.mark.parametrize("micro", [BATCH, 5])
@pytest.mark.parametrize("preset", PRESETS)
def test_norms_shares_and_cosines_in_output_space(preset: str, micro: int) -> None:
    """Against the gradients with respect to what the student returned, row by row and pass by pass."""
    step = step_of(preset, *apart("output"), micro=micro)
    _, _, measures = step.run()
    check_geometry(measures, cotangents(step))


def cotangents(step: Step) -> dict[str, Tensor]:
    """Every term's gradient at the predictions of the whole batch, by ``backward`` into them."""
    parts: dict[str, list[Tensor]] = {name: [] for name in step.made.terms}
    for one in step.passes():
        losses = one.losses()
        for F in one.outputs:
            F.retain_grad()
        for name in parts:
            for F in one.outputs:
                F.grad = None
            if name in losses:
                losses[name].loss.backward(retain_graph=True)
            parts[name] += [torch.zeros_like(F) if F.grad is None else F.grad for F in one.outputs]
    return {name: torch.cat([part.flatten() for part in found]) for name, found in parts.items()}


def check_geometry(measures: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
    total = torch.stack(list(parts.values())).sum(0)
    shares = []
    for name, part in parts.items():
        raw, clipped, coefficient, share = (
            measures[names.grad(name, quantity)].item()
            for quantity in ("norm_raw", "norm_clipped", "clip_coef", "share")
        )
        assert raw == clipped == pytest.approx(part.norm().item(), rel=1e-10)
        assert coefficient == 1
        assert share == pytest.approx(float(part @ total / (total @ total)), abs=1e-10)
        shares.append(share)
    assert sum(shares) == pytest.approx(1, abs=1e-10)
    for a, b in itertools.combinations(parts, 2):
        found = [measures[name].item() for name in (names.cosine(a, b), names.cosine(b, a)) if name in measures]
        expected = float(torch.cosine_similarity(parts[a], parts[b], dim=0))
        assert found == [pytest.approx(expected, abs=1e-10)]  # each pair once
        assert -1 <= found[0] <= 1


@pytest.mark.parametrize("micro", [BATCH, 5])
def test_the_gradient_of_changed_outputs(micro: int) -> None:
    """Output space: weights of the terms after all, so the gradient is the sum of the scaled ones."""
    factors = {"base": 2.0, "adversarial": 0.0, "rectify": 0.5}
    chains = [f"gradients.terms.{name}={{scale: {{factor: {factor}}}}}" for name, factor in factors.items()]
    step = step_of("twinflow", *apart("output", *chains), micro=micro)
    gradient, _, _ = step.run()
    assert_close(gradient, torch.stack([factors[name] * step.plain(name) for name in factors]).sum(0))


# --- changed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "micro"), CLIPPED)
def test_a_clipped_term_has_the_threshold_for_norm(preset: str, micro: int) -> None:
    """What is left of the total without the others' gradients is the clipped one."""
    plain = step_of(preset, micro=micro)
    parts = {name: plain.plain(name) for name in plain.made.terms}
    for name, part in parts.items():
        limit = 0.3 * part.norm().item()
        step = step_of(preset, *apart("parameter", f"gradients.terms.{name}.clip.max_norm={limit}"), micro=micro)
        gradient, _, measures = step.run()
        clipped = gradient - torch.stack([parts[other] for other in parts if other != name]).sum(0)
        assert clipped.norm().item() == pytest.approx(limit, rel=1e-9)
        assert_close(clipped, 0.3 * part, 1e-9)
        assert measures[names.grad(name, "norm_clipped")].item() == pytest.approx(limit, rel=1e-10)
        assert measures[names.grad(name, "clip_coef")].item() == pytest.approx(0.3, rel=1e-10)
        assert measures[names.GRAD_TOTAL_RAW].item() == pytest.approx(gradient.norm().item(), rel=1e-10)


@pytest.mark.parametrize(("preset", "micro"), CLIPPED)
def test_clipping_at_the_outputs(preset: str, micro: int) -> None:
    """A clip there is a factor of the term's whole gradient."""
    plain = step_of(preset, micro=micro)
    limits = {name: 0.5 * part.norm().item() for name, part in cotangents(plain).items()}
    clips = [f"gradients.terms.{name}.clip.max_norm={limit}" for name, limit in limits.items()]
    gradient, _, measures = step_of(preset, *apart("output", *clips), micro=micro).run()
    assert_close(gradient, 0.5 * plain.plain(), 1e-10)
    for name, limit in limits.items():
        assert measures[names.grad(name, "norm_clipped")].item() == pytest.approx(limit, rel=1e-10)


@pytest.mark.parametrize("space", SPACES)
def test_the_clipped_total_has_the_threshold_for_norm(space: str) -> None:
    step = step_of("tutorial", f"gradients.space={space}", "gradients.total.clip.max_norm=0.01")
    gradient, _, measures = step.run()
    assert gradient.norm().item() == pytest.approx(0.01, rel=1e-10)
    assert measures[names.GRAD_TOTAL_CLIPPED].item() == pytest.approx(0.01, rel=1e-10)
    assert measures[names.GRAD_TOTAL_RAW].item() == pytest.approx(step.plain().norm().item(), rel=1e-10)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("micro", [BATCH, 5])
def test_relative_and_project_see_the_terms_without_such_a_rule(micro: int, keep: int) -> None:
    """rectify ≤ 0.1 of the others, then nothing against them; the same whether buffers are kept for shares or not."""
    every = f"gradients.telemetry={{shares_every: {keep}, cosines_every: {keep}}}"
    chain = "gradients.terms.rectify={relative: {ratio: 0.1}, project: {}}"
    step = step_of("twinflow", every, chain, micro=micro)
    gradient, _, measures = step.run()
    others, own = step.plain("base") + step.plain("adversarial"), step.plain("rectify")
    limited = own * min(1.0, 0.1 * float(others.norm() / own.norm()))
    limited = limited - min(0.0, float(limited @ others)) / float(others @ others) * others
    assert_close(gradient, others + limited, 1e-10)
    assert measures[names.grad("rectify", "norm_clipped")].item() == pytest.approx(limited.norm().item(), rel=1e-10)
    assert (names.grad("rectify", "share") in measures) == bool(keep)


@pytest.mark.parametrize("space", TAKEN_APART)
def test_two_that_wait_see_the_same_others(space: str) -> None:
    """Neither sees what the other added, whatever their order."""
    chains = [f"gradients.terms.{name}={{relative: {{ratio: 0.01}}}}" for name in ("rectify", "base")]
    step = step_of("lab", *apart(space, *chains))
    others = (step.plain("adversarial") if space == "parameter" else cotangents(step)["adversarial"]).norm().item()
    _, _, measures = step.run()
    for name in ("base", "rectify"):
        assert measures[names.grad(name, "norm_clipped")].item() == pytest.approx(0.01 * others, rel=1e-10)


def test_agc_in_parameter_space() -> None:
    step = step_of("lab", *apart("parameter", "gradients.each.agc={ratio: 0.05, eps: 0.001}"), student=Perceptron())
    gradient, _, _ = step.run()
    expected = []
    for name in step.made.terms:
        step.plain(name)
        for p in step.student.parameters():
            unit = tuple(range(1, p.ndim)) if p.ndim > 1 else (0,)
            limit = 0.05 * p.detach().norm(dim=unit, keepdim=True).clamp(min=0.001)
            p.grad *= (limit / p.grad.norm(dim=unit, keepdim=True)).clamp(max=1)
        expected.append(flat(step.student))
    assert_close(gradient, torch.stack(expected).sum(0), 1e-10)


# --- what is not finite -----------------------------------------------------------------------------------------


class Broken(Term):
    """A loss that is nan."""

    class Config(TermConfig):
        kind: str

    def query(self, rows: Rows, ctx: Context) -> Query:
        return instant(rows)

    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Context) -> Target:
        return Target(torch.full_like(F, torch.nan))


@pytest.mark.parametrize("space", TAKEN_APART)
def test_a_term_that_is_not_finite_is_recorded_and_not_masked(space: str) -> None:
    """Its norm, share and cosines are nan; the other terms' norms are as ever; the gradient is nan for the policy."""
    broken = f"terms.broken={{kind: {__name__}.Broken, branches: [mul]}}"
    rules = "gradients.each={clip: {max_norm: 0.5}, zclip: {}}", "gradients.terms.rectify={relative: {}, project: {}}"
    _, _, healthy = step_of("lab", *apart(space, *rules)).run()
    gradient, _, measures = step_of("lab", *apart(space, broken, *rules)).run()
    for quantity in ("norm_raw", "norm_clipped", "clip_coef", "share"):
        assert measures[names.grad("broken", quantity)].isnan()
    assert measures[names.cosine("base", "broken")].isnan()
    assert measures[names.GRAD_TOTAL_RAW].isnan()
    assert gradient.isnan().any()
    for name in ("base", "adversarial", "rectify"):
        raw = names.grad(name, "norm_raw")
        assert measures[raw].item() == pytest.approx(healthy[raw].item(), rel=1e-10)
        assert measures[names.grad(name, "norm_clipped")].isfinite()


# --- a force inside a term's target, and odd losses -----------------------------------------------------------------


class Forced(Term):
    """Velocity regression with a constant force in the target, which is a part of its own under the name ``force``."""

    class Config(TermConfig):
        kind: str
        strength: float = 0.5

    def query(self, rows: Rows, ctx: Context) -> Query:
        return instant(rows)

    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Context) -> Target:
        return Target(rows.v + self.config.strength)

    def loss_parts(self, rows: Rows, query: Query, F: Tensor, target: Target) -> Mapping[str, Tensor]:
        return {"force": -2 * self.config.strength * F.flatten(1).mean(1).sum()}

    @classmethod
    def part_names(cls, config: Any) -> tuple[str, ...]:
        return ("force",)


class Flat(Forced):
    """A loss linear in the prediction, whose gradient at the outputs is one broadcast number; no force."""

    def loss(self, rows: Rows, query: Query, F: Tensor, target: Tensor) -> Tensor:
        return F.flatten(1).sum(1)

    def loss_parts(self, rows: Rows, query: Query, F: Tensor, target: Target) -> Mapping[str, Tensor]:
        return {}


def forced(*overrides: str, micro: int = BATCH) -> Step:
    return step_of(
        "twinflow", f"terms.first={{kind: {__name__}.Forced, branches: [mul, any]}}",
        f"terms.second={{kind: {__name__}.Forced, strength: 2, branches: [any], weight: 3}}", *overrides, micro=micro,
    )  # fmt: skip


@pytest.mark.parametrize("micro", [BATCH, 5])
@pytest.mark.parametrize("space", TAKEN_APART)
def test_a_part_of_several_terms_is_one_gradient(space: str, micro: int) -> None:
    """Both terms' forces together are ``force``; without it the terms are as if there were no force."""
    calm = forced("terms.first.strength=0", "terms.second.strength=0", micro=micro)
    step = forced(*apart(space, "gradients.terms.force={scale: {factor: 0}}"), micro=micro)
    gradient, _, measures = step.run()
    assert_close(gradient, calm.plain(), 1e-10)
    whole, _, apart_measures = forced(*apart(space), micro=micro).run()
    assert_close(whole, step.plain(), 1e-10)
    force = measures[names.grad("force", "norm_raw")].item()
    if space == "parameter":
        assert force == pytest.approx((step.plain() - calm.plain()).norm().item(), rel=1e-10)
        assert measures[names.grad("first", "norm_raw")].item() == pytest.approx(
            calm.plain("first").norm().item(), rel=1e-10
        )
    shares = [value.item() for name, value in apart_measures.items() if name.endswith("/share")]
    assert len(shares) == 6
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("space", TAKEN_APART)
def test_a_term_of_the_same_name_joins_the_part(space: str) -> None:
    step = forced(*apart(space), "terms.force={kind: real_velocity, branches: [mul]}")
    gradient, _, measures = step.run()
    assert_close(gradient, step.plain(), 1e-10)
    assert measures[names.grad("force", "norm_raw")] > 0


@pytest.mark.parametrize("micro", [BATCH, 5])
@pytest.mark.parametrize("space", TAKEN_APART)
def test_a_loss_linear_in_the_prediction(space: str, micro: int) -> None:
    clip = "gradients.terms.flat.clip.max_norm=1e-3"
    step = step_of(
        "flow_matching", f"terms.flat={{kind: {__name__}.Flat, branches: [mul]}}", *apart(space, clip), micro=micro
    )
    gradient, _, measures = step.run()
    left = gradient - step.plain("base")
    coefficient = measures[names.grad("flat", "clip_coef")].item()
    assert coefficient < 0.1
    assert_close(left, coefficient * step.plain("flat"), 1e-9)


@pytest.mark.parametrize("space", SPACES)
def test_micro_batches_that_no_term_sees(space: str) -> None:
    """One row each; the rows of ``any`` are no term's."""
    step = step_of(
        "rcgm", "branches={mul: 1, any: 1}", "terms.base.branches=[mul]", f"gradients.space={space}", micro=1
    )
    gradient, losses, _ = step.run()
    assert losses.count({}) == BATCH // 2
    assert_close(gradient, step.plain())


# --- telemetry and state ----------------------------------------------------------------------------------------


def test_periodic_measures_come_when_they_are_due() -> None:
    step = step_of("lab", "gradients.telemetry={shares_every: 2, cosines_every: 3}")
    engine = step.engine()
    due = {at: set(step.run(engine, at)[2]) for at in range(4)}
    share, cosine = names.grad("base", "share"), names.cosine("base", "rectify")
    assert [share in due[at] for at in range(4)] == [True, False, True, False]
    assert [cosine in due[at] for at in range(4)] == [True, False, False, True]
    assert all(names.grad("base", "norm_raw") in found for found in due.values())


@pytest.mark.parametrize("space", TAKEN_APART)
def test_state_continues_bit_for_bit(space: str) -> None:
    rules = f"gradients.space={space}", "gradients.each.zclip={warmup: 2, z: 0.01}", "gradients.total.zclip={warmup: 2}"
    batches = [step_of("lab", *rules, f"time.alpha={1 + i}") for i in range(6)]

    def run(engine: Engine, at: int) -> Tensor:
        return batches[at].run(engine)[0]

    for step in batches[1:]:  # one student for all
        step.student.load_state_dict(batches[0].student.state_dict())
    student = batches[0].student
    for step in batches:
        object.__setattr__(step.made.teacher, "student", student)
    whole, first, second = (batches[0].engine() for _ in range(3))
    undisturbed = [run(whole, at) for at in range(6)]
    begun = [run(first, at) for at in range(4)]
    second.load(first.state())
    gone_on = [run(second, at) for at in (4, 5)]
    assert all(torch.equal(a, b) for a, b in zip(undisturbed, begun + gone_on, strict=True))
    assert whole.state() == second.state()
    assert set(whole.state()["terms"]) == {"base", "adversarial", "rectify"}


ZCLIP = (
    "gradients.each={zclip: {warmup: 2, z: 0.1}}",
    "gradients.total={zclip: {warmup: 3, z: 0.1}, clip: {max_norm: .inf}}",
    "gradients.terms.rectify={relative: {ratio: 0.5}, project: {}}",
)


@pytest.mark.slow
def test_a_killed_run_with_zclip_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two checkpoints, and after the last."""
    register(monkeypatch)
    rules = (*ZCLIP, "model.network={kind: dropping}", "train.micro_batch=9")
    undisturbed = finish(small(tmp_path / "a", *rules))
    clipped = [row[names.grad("base", "clip_coef")] for row in rows(undisturbed)]
    assert min(clipped) < 1
    settings = small(tmp_path / "b", *rules)
    for step in (8, 11):
        kill(settings, step)
    assert_same(finish(settings), undisturbed)
