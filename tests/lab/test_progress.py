"""A build's progress told to whoever shows it as a part of something longer."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from twinrl.lab.progress import show, stages, watched_by

STEPS = 50


def built(shown: bool = True) -> None:
    """Two models side by side, the second twice as dear."""
    with stages("building", 3 * STEPS, shown) as stage, ThreadPoolExecutor(2) as pool:
        ticks = [stage(name, cost, STEPS) for name, cost in (("codec", 1), ("judge", 2))]
        for work in [pool.submit(lambda tick=tick: [tick() for _ in range(STEPS)]) for tick in ticks]:
            work.result()


def test_a_watcher_hears_of_every_step_and_nothing_is_drawn(capfd: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[str, float]] = []
    with watched_by(lambda what, share: told.append((what, share))):
        built()
    assert len(told) >= 2 * STEPS
    assert {share for _, share in told} <= {done / (3 * STEPS) for done in range(3 * STEPS + 1)}
    assert max(share for _, share in told) == 1
    assert told[1][0] == "building: codec, judge"
    assert capfd.readouterr().err == ""


def test_pictures_go_to_whoever_watches_and_else_nowhere() -> None:
    shown: list[str] = []
    show("before", {})
    with watched_by(lambda what, share: None, lambda title, rows: shown.append(title)):
        show("the data", {})
    with watched_by(lambda what, share: None):
        show("to one who looks at no pictures", {})
    assert shown == ["the data"]


def test_a_silent_build_tells_nobody() -> None:
    told: list[str] = []
    with watched_by(lambda what, share: told.append(what)):
        built(shown=False)
    assert told == []


def test_nobody_hears_of_builds_afterwards() -> None:
    told: list[str] = []
    with watched_by(lambda what, share: told.append(what)):
        pass
    built()
    assert told == []


def test_without_a_terminal_lines_stand_in_for_the_bar(capfd: pytest.CaptureFixture[str]) -> None:
    built()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[:2] == ["building: codec 0%", "building: codec, judge 10%"]
    assert lines[-1].endswith(" 100%")
