"""Schedules: end points, symmetry, exact moments, one notation for each moment, errors in one line."""

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import yaml

from twinrl.config import Settings, canonical_hash, validate
from twinrl.config.errors import InputError
from twinrl.flow.schedules import AnySchedule, Constant, Cosine, Hard, Linear, RewardSchedule, Sigmoid, position

RAMPS = [Linear, Cosine, Sigmoid]


class Holder(Settings):
    a: AnySchedule = 1.0


def read(text: str) -> Any:
    """A schedule as YAML or the command line would give it."""
    return validate(Holder, {"a": yaml.safe_load(text)}).a


@pytest.mark.parametrize("kind", RAMPS)
def test_ramps_are_exact_outside_and_monotone_inside(kind: type) -> None:
    ramp = kind(initial=4, final=1, start=20, end="80%")
    values = [ramp.value(step, 100) for step in range(101)]
    assert values[:21] == [4] * 21
    assert values[80:] == [1] * 21
    assert all(a > b for a, b in pairwise(values[20:81]))
    assert values[50] == pytest.approx(2.5)


@pytest.mark.parametrize("kind", RAMPS)
def test_ramps_are_point_symmetric(kind: type) -> None:
    ramp = kind(initial=-1, final=1, end=100)
    for step in range(101):
        assert ramp.value(step, 100) == pytest.approx(-ramp.value(100 - step, 100), abs=1e-12)


def test_closed_forms() -> None:
    assert Linear(final=1, end=100).value(25, 100) == 0.25
    assert Cosine(final=1, end=3).value(1, 3) == pytest.approx(0.25)  # (1 − cos 60°)/2
    sigmoid = Sigmoid(final=1, end=2, steepness=4)
    # logistic(−2 + 4u) rescaled: u = ¼ lies at (σ(−1) − σ(−2))/(σ(2) − σ(−2))
    assert sigmoid.value(1, 4) == pytest.approx(0.5)
    assert Sigmoid(final=1, end=4, steepness=4).value(1, 4) == pytest.approx((0.268941 - 0.119203) / 0.761594, abs=1e-5)


def test_gentleness_of_the_first_tenth() -> None:
    """What the sigmoid's docstring says about the other shapes."""
    first = {kind: kind(final=1, end=10).value(1, 10) for kind in RAMPS}
    assert first[Linear] == pytest.approx(0.1)
    assert first[Cosine] == pytest.approx(0.0245, abs=1e-4)
    assert first[Sigmoid] == pytest.approx(0.0115, abs=1e-3)


def test_steep_sigmoid_stays_finite() -> None:
    steep = Sigmoid(final=1, end=1000, steepness=200)
    assert steep.value(1, 1000) < 1e-40
    assert steep.value(999, 1000) == 1


def test_published_renoise() -> None:
    """Beta(4→1, 1) linearly over 3000 of 10,000 steps."""
    ramp = read("{kind: linear, initial: 4, final: 1, end: 30%}")
    assert [ramp.value(step, 10_000) for step in (0, 1500, 3000, 9999)] == [4, 2.5, 1, 1]
    assert ramp.span(10_000) == (0, 3000)


def test_a_switch_is_exact_where_floats_are_not() -> None:
    """0.1·30 is 3.0000000000000004 in floating point; the switch must not come a step late."""
    for percent, steps in ((10, 30), (70, 10), (29, 100), (15, 60)):
        at = percent * steps // 100
        assert percent * steps % 100 == 0
        switch = Hard(final=1, start=f"{percent}%")
        assert [switch.value(step, steps) for step in (at - 1, at)] == [0, 1]


def test_a_ramp_of_no_length_is_a_switch() -> None:
    assert [Linear(final=1, start=5, end=5).value(step, 10) for step in (4, 5, 6)] == [0, 1, 1]


def test_a_number_is_constant() -> None:
    assert read("4") == Constant(number=4)
    assert read("4").value(7, 10) == 4
    assert read("4").extremes == (4, 4)
    assert read("{kind: linear, initial: 4, final: 1}").extremes == (1, 4)


class Staircase(Linear):
    """A user's own shape."""

    kind: str = "tests.flow.test_schedules.Staircase"  # type: ignore[assignment]

    def shape(self, u: float) -> float:
        return int(u * 4) / 4


def test_a_user_s_own_schedule_by_dotted_path() -> None:
    stairs = read("{kind: tests.flow.test_schedules.Staircase, final: 1, end: 100}")
    assert [stairs.value(step, 100) for step in (10, 30, 60, 80, 100)] == [0, 0.25, 0.5, 0.75, 1]


def test_moments_after_renoise() -> None:
    end = Fraction(3000)
    assert position("after_renoise", 10_000, end) == 3000
    assert position("after_renoise+500", 10_000, end) == 3500
    assert position("after_renoise+12.5%", 10_000, end) == 4250
    ramp = read("{kind: linear, final: 1, start: after_renoise, end: after_renoise + 10%}")
    assert ramp.tied
    assert not read("{kind: linear, final: 1}").tied
    assert [ramp.value(step, 10_000, end) for step in (3000, 3500, 4000)] == [0, 0.5, 1]
    with pytest.raises(InputError, match="no renoise is configured; fix: configure renoise"):
        ramp.value(0, 10_000)


def test_equal_moments_hash_alike() -> None:
    texts = ("30%", "30.0%", "'30 %'")
    dumped = [read(f"{{kind: hard, final: 1, start: {text}}}").model_dump(mode="json") for text in texts]
    assert len({canonical_hash(d) for d in dumped}) == 1
    assert read("{kind: hard, final: 1, start: '300'}") == read("{kind: hard, final: 1, start: 300}")


def test_settings_survive_yaml() -> None:
    ramp = read("{kind: sigmoid, initial: 1, final: 2, start: 10%, end: after_renoise+20%, steepness: 6}")
    assert read(yaml.safe_dump(ramp.model_dump(mode="json"))) == ramp


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{kind: hard, final: 1, start: 0.2}", r"a.start: 0.2 is ambiguous as a moment; fix: write 20% for a share"),
        ("{kind: hard, final: 1, start: 1.0}", r"a.start: 1.0 is ambiguous"),
        ("{kind: hard, final: 1, start: 300.0}", r"fix: write a whole number of steps"),
        ("{kind: hard, final: 1, start: -5}", r"a.start: -5 is not a moment; expected steps \(300\), a share"),
        ("{kind: hard, final: 1, start: after_renoise+}", r"'after_renoise\+' is not a moment"),
        ("{kind: hard, final: 1, start: after_renoise10%}", r"is not a moment"),
        ("{kind: hard, final: 1, start: true}", r"true is not a moment"),
        ("{kind: hard, final: 1, start: 120%}", r"120% lies beyond the run"),
        ("{kind: linear, final: 1, start: 40%, end: 30%}", r"a: the ramp ends at 30%, before it starts at 40%"),
        ("{kind: cosine, final: 1, start: 400, end: 300}", r"the ramp ends at 300, before it starts at 400"),
        ("{kind: linear, final: 1, start: after_renoise+9%, end: after_renoise}", r"before it starts"),
        ("{kind: ramp, final: 1}", r"unknown schedule 'ramp'; expected one of constant, hard, linear, cosine, sigmoid"),
        ("{kind: linear, finl: 1}", r"unknown key a.finl; did you mean final\?"),
        ("{kind: linear, final: .nan}", r"a.final: input should be a finite number"),
        ("linear", r"a.final: field required"),
        ("true", r"expected a name or a mapping with `kind` \(schedule\)"),
    ],
)
def test_errors_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(text)
    assert "\n" not in str(caught.value)


def test_mixed_units_are_compared_when_the_length_is_known() -> None:
    ramp = read("{kind: linear, final: 1, start: 300, end: 60%}")
    assert ramp.value(300, 600) == 0
    with pytest.raises(InputError, match="ends before it starts; got start 300 = step 300, end 60% = step 60 of 100"):
        ramp.value(0, 100)


def test_published_and_dmdr_rewards() -> None:
    published = RewardSchedule(weight={"kind": "hard", "final": 0.05, "start": "20%"})
    assert [published.weight_at(step, 10_000) for step in (1999, 2000)] == [0, 0.05]
    assert published.lr_factor_at(9999, 10_000) == 1
    dmdr = RewardSchedule(weight={"kind": "hard", "final": 0.05, "start": "after_renoise+10000"}, lr_factor=0.5)
    end = Fraction(10_000)
    assert [dmdr.weight_at(step, 60_000, end) for step in (19_999, 20_000)] == [0, 0.05]
    assert [dmdr.lr_factor_at(step, 60_000, end) for step in (19_999, 20_000)] == [1, 0.5]


def test_a_negative_reward_weight_is_refused() -> None:
    with pytest.raises(InputError, match="the weight falls to -1; expected ≥ 0"):
        validate(RewardSchedule, {"weight": {"kind": "linear", "initial": -1, "final": 1}})
