"""Weights that steps cannot move: one event for as long as it lasts, which names the remedy."""

import json

import pytest

from twinrl.run import names
from twinrl.stability.monitor import Monitor
from twinrl.stability.policy import StabilityConfig
from twinrl.stability.precision import COOLDOWN, REMEDIES, Precision


@pytest.mark.parametrize("series", REMEDIES)
def test_a_share_above_the_limit_is_an_event_that_names_the_remedy(series: str) -> None:
    precision = Precision(0.5)
    assert precision.observe(1, 0, {"loss/total": 1.0}) is None
    assert precision.observe(2, 1, {series: 0.49}) is None
    event = precision.observe(3, 2, {series: 0.5})
    assert event is not None
    assert (event.step, event.iteration, event.kind, event.series) == (3, 2, "unmoved", series)
    assert (event.value, event.reference) == (0.5, 0.5)
    assert "fix: model.dtype=float32" in event.message
    assert precision.observe(4, 3, {series: 0.9}) is None


def test_the_next_event_comes_after_as_many_measured_steps_below_the_limit() -> None:
    precision = Precision(0.5)
    shares = [0.9, *[0.1] * (COOLDOWN - 1), 0.9, *[0.1] * COOLDOWN, 0.9]
    found = [precision.observe(n, n, {names.UNMOVED: share}) is not None for n, share in enumerate(shares)]
    assert [n for n, event in enumerate(found) if event] == [0, len(shares) - 1]


def test_without_a_limit_there_is_none() -> None:
    assert Precision(None).observe(1, 0, {names.UNMOVED: 1.0}) is None


def test_a_resumed_run_goes_on_in_the_episode_and_an_older_state_has_none() -> None:
    first, second = (Monitor(StabilityConfig(), ["base"]) for _ in range(2))
    assert first.precision.observe(1, 0, {names.UNMOVED: 0.9}) is not None
    state = json.loads(json.dumps(first.state()))
    second.load(state)
    assert second.precision.observe(2, 1, {names.UNMOVED: 0.9}) is None
    del state["precision"]
    second.load(state)
    assert second.precision.observe(3, 2, {names.UNMOVED: 0.9}) is not None
