"""Each rule against numbers made by hand, and what it leaves alone."""

import json
import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from twinrl.gradients import TRANSFORMS, Gradient, RuleContext, Transform

NOTHING = RuleContext()


def rule(kind: str, **settings: float) -> Transform:
    cls = TRANSFORMS[kind]
    return cls(cls.Config(**settings))


def vector(*parts: list[float]) -> Gradient:
    return Gradient({i: torch.tensor(part, dtype=torch.float64) for i, part in enumerate(parts)})


def numbers(gradient: Gradient) -> list[float]:
    return [value for tensor in gradient.tensors.values() for value in tensor.flatten().tolist()]


def beside(*parts: list[float]) -> RuleContext:
    return RuleContext(others=vector(*parts))


# --- clip, scale ------------------------------------------------------------------------------------------------


def test_clip_is_exact_beyond_its_threshold_and_nothing_within() -> None:
    gradient = vector([3.0, 0.0], [4.0])
    rule("clip", max_norm=1)(gradient, NOTHING)
    assert numbers(gradient) == pytest.approx([0.6, 0, 0.8], rel=1e-12)
    assert Gradient(gradient.tensors).norm.item() == pytest.approx(1, rel=1e-12)  # measured, not remembered
    rule("clip", max_norm=1.1)(gradient, NOTHING)
    assert numbers(gradient) == pytest.approx([0.6, 0, 0.8], rel=1e-12)


def test_scale() -> None:
    gradient = vector([3.0], [4.0])
    rule("scale", factor=0.25)(gradient, NOTHING)
    assert numbers(gradient) == [0.75, 1]


# --- relative, project ------------------------------------------------------------------------------------------


def test_relative_measures_the_others() -> None:
    """‖g‖ = 5 against 0.5·‖(0, 6, 8)‖ = 5 stays, against 0.2·10 = 2 becomes 2."""
    gradient, others = vector([3.0, 0.0], [4.0]), beside([0.0, 6.0], [8.0])
    rule("relative", ratio=0.5)(gradient, others)
    assert numbers(gradient) == [3, 0, 4]
    rule("relative", ratio=0.2)(gradient, others)
    assert numbers(gradient) == pytest.approx([1.2, 0, 1.6], rel=1e-12)


def test_relative_to_nothing_is_nothing() -> None:
    gradient = vector([3.0])
    rule("relative", ratio=2)(gradient, beside([0.0]))
    assert numbers(gradient) == [0]


def test_project_removes_what_works_against_the_others() -> None:
    """g = (1, −2), s = (0, 4): g·s = −8, g + 8/16·s = (1, 0). The others are as they were."""
    gradient, others = vector([1.0], [-2.0]), beside([0.0], [4.0])
    rule("project")(gradient, others)
    assert numbers(gradient) == [1, 0]
    assert gradient.norm == 1
    assert numbers(others.others) == [0, 4]


def test_project_leaves_alone_what_works_along_or_across() -> None:
    for parts in ([1.0], [2.0]), ([1.0], [0.0]):
        gradient = vector(*parts)
        rule("project")(gradient, beside([0.0], [4.0]))
        assert numbers(gradient) == [value for part in parts for value in part]


def test_project_at_random_never_works_against_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        g, s = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
        gradient, others = Gradient({0: g[:2].clone(), 1: g[2:].clone()}), Gradient({0: s[:2], 1: s[2:]})
        rule("project")(gradient, RuleContext(others=others))
        expected = g - min(0.0, float(g @ s)) / float(s @ s) * s
        assert numbers(gradient) == pytest.approx(expected.tolist(), abs=1e-12)
        assert gradient.dot(others) > -1e-12


def test_project_where_the_others_reach_other_parameters() -> None:
    gradient = Gradient({0: torch.tensor([-1.0]), 2: torch.tensor([5.0])})
    rule("project")(gradient, RuleContext(others=Gradient({0: torch.tensor([1.0]), 1: torch.tensor([1.0])})))
    assert numbers(gradient) == [-0.5, 5]  # g·s = −1, ‖s‖² = 2; parameter 1 is none of this term's


# --- agc --------------------------------------------------------------------------------------------------------


def test_agc_of_a_matrix_and_a_vector() -> None:
    """λ = 0.1. Rows of W have norms 5, 10 and 0 (→ ε = 1): limits 0.5, 1, 0.1. The bias's norm is 2: limit 0.2."""
    weight = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 0.0]], dtype=torch.float64)
    bias = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
    gradient = Gradient({0: torch.tensor([[3.0, 4.0], [0.6, 0.8], [0.0, 2.0]], dtype=torch.float64), 1: bias.flip(0)})
    rule("agc", ratio=0.1, eps=1)(gradient, RuleContext([weight, bias]))
    assert numbers(gradient) == pytest.approx([0.3, 0.4, 0.6, 0.8, 0, 0.1, 0, 0, 0.2], rel=1e-12)
    assert gradient.norm.item() == pytest.approx(math.sqrt(0.25 + 1 + 0.01 + 0.04), rel=1e-12)


def test_agc_of_a_convolution_looks_at_output_channels() -> None:
    weight = torch.ones(2, 3, 2, 2).double()  # norm √12 per channel
    gradient = Gradient({0: weight * torch.tensor([1.0, 0.001]).double()[:, None, None, None]})
    rule("agc", ratio=0.1)(gradient, RuleContext([weight]))
    assert gradient.tensors[0].flatten(1).norm(dim=1).tolist() == pytest.approx([0.1 * 12**0.5, 0.001 * 12**0.5])


def test_agc_leaves_a_broken_unit_to_the_policy() -> None:
    gradient = vector([math.inf, 1.0], [5.0])
    gradient.tensors[0] = gradient.tensors[0][:, None]
    rule("agc", ratio=0.1)(gradient, RuleContext([torch.ones(2, 1).double(), torch.ones(1).double()]))
    assert numbers(gradient) == pytest.approx([math.inf, 0.1, 0.1])


# --- zclip ------------------------------------------------------------------------------------------------------


def feed(zclip: Transform, norm: float) -> float:
    """The norm that is left of one that large."""
    gradient = vector([0.6 * norm], [0.8 * norm])
    zclip(gradient, NOTHING)
    return Gradient(gradient.tensors).norm.item()


def test_zclip_step_by_step() -> None:
    """Warm-up 4 on norms 1, 3, 1, 3: μ = 2, σ² = 1. Then 6 has z = 4 > 2 and is cut to 2 + 2²/4·1 = 3.

    μ ← 0.9·2 + 0.1·3 = 2.1, σ² ← 0.9·1 + 0.1·(3 − 2.1)² = 0.981. Then 2.5 is within and passes:
    μ ← 0.9·2.1 + 0.1·2.5 = 2.14, σ² ← 0.9·0.981 + 0.1·(2.5 − 2.14)² = 0.89586.
    """
    zclip = rule("zclip", z=2, alpha=0.9, warmup=4)
    assert [feed(zclip, norm) for norm in (1, 3, 1, 3)] == pytest.approx([1, 3, 1, 3], rel=1e-12)
    assert zclip.state() == pytest.approx({"count": 4, "mean": 2, "variance": 1})
    assert feed(zclip, 6) == pytest.approx(3, rel=1e-12)
    assert zclip.state() == pytest.approx({"count": 5, "mean": 2.1, "variance": 0.981})
    assert feed(zclip, 2.5) == pytest.approx(2.5, rel=1e-12)
    assert zclip.state() == pytest.approx({"count": 6, "mean": 2.14, "variance": 0.89586})


def test_zclip_lets_small_norms_and_the_warm_up_pass() -> None:
    zclip = rule("zclip", warmup=3)
    assert [feed(zclip, norm) for norm in (1, 1000, 1, 1e-6)] == pytest.approx([1, 1000, 1, 1e-6], rel=1e-12)


def test_zclip_without_spread_does_not_clip() -> None:
    """σ = 0 after a constant warm-up: no z-score exists, so nothing is cut; the next norms give it a spread."""
    zclip = rule("zclip", warmup=2)
    assert [feed(zclip, norm) for norm in (1, 1, 5)] == pytest.approx([1, 1, 5], rel=1e-12)
    assert feed(zclip, 50) < 50


def test_zclip_starts_from_the_moments_of_the_warm_up() -> None:
    zclip, norms = rule("zclip"), (torch.rand(25, generator=torch.Generator().manual_seed(0)).double() + 1).tolist()
    for norm in norms:
        feed(zclip, norm)
    seen = torch.tensor(norms, dtype=torch.float64)
    expected = {"count": 25, "mean": seen.mean().item(), "variance": seen.var(correction=0).item()}
    assert zclip.state() == pytest.approx(expected, rel=1e-12)


def test_zclip_forgets_what_is_not_finite() -> None:
    zclip = rule("zclip", warmup=3)
    for norm in (1.0, 2.0, 3.0, 2.0):
        feed(zclip, norm)
    before = zclip.state()
    assert math.isnan(feed(zclip, math.nan))
    assert feed(zclip, math.inf) == math.inf
    assert zclip.state() == before


@pytest.mark.parametrize("at", [2, 9])
def test_zclip_continues_from_a_checkpoint_bit_for_bit(at: int) -> None:
    """In the warm-up and after it, through JSON as checkpoints store it."""
    norms = (torch.rand(20, generator=torch.Generator().manual_seed(1)) * 10).tolist()
    whole, first, second = (rule("zclip", warmup=4, z=0.5) for _ in range(3))
    undisturbed = [feed(whole, norm) for norm in norms]
    assert undisturbed != norms
    begun = [feed(first, norm) for norm in norms[:at]]
    second.load(json.loads(json.dumps(first.state())))
    assert begun + [feed(second, norm) for norm in norms[at:]] == undisturbed
    assert second.state() == whole.state()


def test_match_brings_to_a_scheduled_share_of_the_others() -> None:
    """‖others‖ = 10; a ramp from 0 to 0.4 over 100 steps is at 0.1 after 25."""
    ratio = {"kind": "linear", "initial": 0, "final": 0.4, "end": 100}
    match = rule("match", ratio=ratio)
    for size in (1e-9, 1.0, 1e9):
        gradient = vector([3.0 * size, 0.0], [4.0 * size])
        match(gradient, RuleContext(others=vector([6.0, 0.0], [8.0]), step=25, steps=100))
        assert numbers(gradient) == pytest.approx([0.6, 0, 0.8], rel=1e-12)
    silent = vector([0.0], [0.0])
    match(silent, RuleContext(others=vector([6.0], [8.0]), step=25, steps=100))
    assert numbers(silent) == [0, 0]


def test_match_is_not_infected_by_others_that_are_not_finite() -> None:
    gradient = vector([3.0], [4.0])
    rule("match", ratio=0.5)(gradient, beside([math.nan], [1.0]))
    assert numbers(gradient) == [3, 4]


# --- every rule -------------------------------------------------------------------------------------------------

INFINITE = {
    "clip": {"max_norm": math.inf}, "zclip": {"z": math.inf, "warmup": 2}, "agc": {"ratio": math.inf},
    "relative": {"ratio": math.inf}, "scale": {"factor": 1.0}, "project": {},
    "match": {"ratio": 1.0},  # others of the same norm
}  # fmt: skip


def surroundings(like: Gradient) -> RuleContext:
    return RuleContext([torch.ones_like(t) for t in like.tensors.values()], like.clone())


def test_every_rule_is_tried() -> None:
    assert set(INFINITE) == set(TRANSFORMS)


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_an_infinite_threshold_changes_no_bit(kind: str) -> None:
    made = rule(kind, **INFINITE[kind])
    for size in (1.0, 2.0, 500.0, 1e9):
        gradient = vector([0.1 * size, -0.3 * size], [0.7 * size])
        before = numbers(gradient)
        made(gradient, surroundings(gradient))
        assert numbers(gradient) == before


@pytest.mark.parametrize("kind", [kind for kind in TRANSFORMS if kind != "scale"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_left_for_the_policy(kind: str, bad: float) -> None:
    """Every entry of the gradient, the finite ones too: scaled by 1/inf they would turn to zero unnoticed."""
    made, gradient = rule(kind), Gradient({0: torch.tensor([[bad, 2.0]], dtype=torch.float64)})
    others = Gradient({0: torch.tensor([[-1.0, -1.0]], dtype=torch.float64)})
    made(gradient, RuleContext([torch.ones(1, 2)], others))
    torch.testing.assert_close(gradient.tensors[0], torch.tensor([[bad, 2.0]]).double(), equal_nan=True)
    assert not gradient.norm.isfinite()


@pytest.mark.parametrize("kind", ["relative", "project"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_others_that_are_not_finite_do_not_spread(kind: str, bad: float) -> None:
    """The term at fault must be the only one whose norm tells."""
    gradient = vector([1.0, 2.0])
    rule(kind)(gradient, beside([bad, -1.0]))
    assert numbers(gradient) == [1, 2]


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_a_gradient_of_zero_stays(kind: str) -> None:
    made = rule(kind)
    for _ in range(3):
        gradient = vector([0.0, 0.0], [0.0])
        made(gradient, RuleContext([torch.ones(2), torch.ones(1)], vector([1.0, 0.0], [0.0])))
        assert numbers(gradient) == [0, 0, 0]


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_a_term_that_reaches_no_parameter(kind: str) -> None:
    gradient = Gradient({})
    rule(kind)(gradient, beside([1.0]))
    assert gradient.norm == 0


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_the_remembered_norm_is_the_measured_one(kind: str) -> None:
    settings = {"warmup": 2} if kind == "zclip" else {}
    made, generator = rule(kind, **settings), torch.Generator().manual_seed(2)
    for size in (1.0, 1.1, 40.0):
        tensors: list[Tensor] = [size * torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
        gradient, others = Gradient(dict(enumerate(tensors))), Gradient(dict(enumerate(-t for t in tensors)))
        assert gradient.norm > 0
        made(gradient, RuleContext([torch.ones(3, 2)] * 2, others))
        assert gradient.norm.item() == pytest.approx(Gradient(gradient.tensors).norm.item(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("clip", {"max_norm": -1}), ("clip", {"max_norm": math.nan}), ("relative", {"ratio": 0}), ("zclip", {"alpha": 1}),
     ("zclip", {"warmup": 1}), ("agc", {"eps": 0}), ("scale", {"factor": math.inf})],
)  # fmt: skip
def test_settings_without_sense_are_refused(kind: str, settings: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        rule(kind, **settings)
