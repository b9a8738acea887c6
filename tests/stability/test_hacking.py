"""Reward hacking on made-up rows: what is an event, what is not, and that it goes on after a kill."""

import json
from collections.abc import Iterator

import pytest

from twinrl.run import names
from twinrl.stability.events import Event
from twinrl.stability.hacking import FIRST, Hacking
from twinrl.stability.monitor import Monitor
from twinrl.stability.policy import StabilityConfig

EVERY = 20
EDGES, JUDGE = names.content("edges", 1), names.content("held_out/judge", 1)


def rows(
    scores: list[float], edges: list[float], judge: list[float] | None = None, weight: float = 1.0, spread: float = 0.1
) -> Iterator[tuple[int, dict[str, float]]]:
    """Rows of one evaluation after the other: the reward's mean on the way to it, and what is found there."""
    for number, (score, edge) in enumerate(zip(scores, edges, strict=True)):
        for step in range(number * EVERY + 1, (number + 1) * EVERY + 1):
            row = {names.REWARD_MEAN: score, names.REWARD_STD: spread, names.REWARD_WEIGHT: weight}
            if step % EVERY == 0:
                row |= {EDGES: edge, names.content("edges", 4): 99.0}
                row |= {JUDGE: judge[number]} if judge else {}
            yield step, row


def events(
    scores: list[float], edges: list[float], judge: list[float] | None = None, start: float = 0.1, **settings: float
) -> list[Event]:
    watched = Hacking(Hacking.Config(), 1)
    watched.begin({EDGES: start} | ({JUDGE: 0.0} if judge else {}))
    found = [watched.observe(step, step - 1, row) for step, row in rows(scores, edges, judge, **settings)]
    return [event for event in found if event is not None]


def test_the_reward_rises_and_the_pictures_leave() -> None:
    (event,) = events([1.0, 1.08, 1.16], [0.1, 1.1, 2.0])
    assert (event.step, event.iteration, event.kind, event.series) == (60, 59, "hacking", EDGES)
    assert (event.value, event.reference) == (2.0, 0.1)
    assert "rose by 1.6 deviations" in event.message
    assert "edges left real pictures: +0.1 to +2.0" in event.message
    assert "steps 0 and 60" in event.message
    (event,) = events([1.0, 1.08, 1.16], [0.1, -1.0, -1.5])  # in either direction
    assert event.value == -1.5


@pytest.mark.parametrize(
    ("scores", "edges", "settings"),
    [
        ([1.0, 1.02, 1.04], [0.1, 3.0, 4.0], {}),  # the reward does not rise
        ([1.0, 1.5, 2.0], [0.3, 1.0, 1.2], {}),  # no whole deviation beyond the band
        ([1.0, 1.5, 2.0], [-3.0, -1.0, 2.0], {"start": -3.5}),  # nearer to real pictures than before
        ([1.0, 1.5, 2.0], [3.0, 4.0, 5.0], {"weight": 0.0}),  # no reward acts
        ([1.0, 1.5, 2.0], [float("nan")] * 3, {}),  # broken: a divergence tells
    ],
)
def test_what_is_no_hacking(scores: list[float], edges: list[float], settings: dict[str, float]) -> None:
    assert events(scores, edges, **settings) == []


def test_a_held_out_judge_that_falls() -> None:
    (event,) = events([1.0, 1.3, 1.6], [0.1, 0.2, 0.2], judge=[0.1, -0.2, -1.3])
    assert event.series == JUDGE
    assert "the held-out judge judge fell: +0.0 to -1.3" in event.message
    assert events([1.0, 1.3, 1.6], [0.1, 0.2, 0.2], judge=[0.1, 2.0, 4.0]) == []  # rises, too


def test_one_event_an_episode() -> None:
    edges = [0.0, 2.0, 3.0, 0.2, 2.5]
    assert [event.step for event in events([1.0, 1.5, 1.5, 1.5, 1.5], edges)] == [40, 100]


def test_before_is_the_last_evaluation_before_the_reward_acts() -> None:
    watched = Hacking(Hacking.Config(), 1)
    watched.begin({EDGES: -4.0})
    found = [watched.observe(step, step, row) for step, row in rows([0.0, 0.0], [-2.0, 0.0], weight=0.0)]
    later = rows([1.0, 1.5, 1.6], [0.5, 1.1, 1.3])
    found += [watched.observe(40 + step, 40 + step, row) for step, row in later]
    (event,) = [event for event in found if event is not None]
    assert (event.step, event.reference) == (100, 0.0)
    assert "steps 40 and 100" in event.message


@pytest.mark.parametrize("killed", [1, FIRST // 2, EVERY, EVERY + 7, 2 * EVERY + 3])
def test_it_goes_on_after_a_kill(killed: int) -> None:
    """Through JSON, inside the monitor's state; a state of an older version, without it, is taken."""
    planted = list(rows([1.0, 1.08, 1.16], [0.1, 1.1, 2.0]))
    first = Monitor(StabilityConfig(), ["base"])
    first.begin({names.VAL_QUALITY: 1.0, EDGES: 0.1})
    for step, row in planted[:killed]:
        assert first.hacking.observe(step, step, row) is None
    second = Monitor(StabilityConfig(), ["base"])
    second.load(json.loads(json.dumps(first.state())))
    found = [second.hacking.observe(step, step, row) for step, row in planted[killed:]]
    assert [event.step for event in found if event is not None] == [60]
    older = first.state()
    del older["hacking"]
    Monitor(StabilityConfig(), ["base"]).load(older)


def test_none_watches_nothing() -> None:
    watched = Hacking(None, 1)
    assert all(watched.observe(step, step, row) is None for step, row in rows([1.0, 2.0], [0.0, 9.0]))
