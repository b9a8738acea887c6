import json
import statistics

import numpy as np
import pytest

from twinrl.stability.rolling import Episode, Rolling


@pytest.mark.parametrize("size", [2, 7, 50])
def test_median_and_scale_are_those_of_the_last_values(size: int) -> None:
    """Ties included: a value that leaves must be taken out once, not as often as it occurs."""
    values = np.random.default_rng(size).integers(-5, 5, 300).astype(float).tolist()
    window = Rolling(size)
    for i, value in enumerate(values):
        window.push(value)
        last = values[max(0, i + 1 - size) : i + 1]
        median = statistics.median(last)
        assert window.median == median
        assert window.scale == pytest.approx(1.4826 * statistics.median(abs(v - median) for v in last))
        assert len(window) == len(last)


def test_scale_of_normal_numbers_is_their_deviation_and_bears_outliers() -> None:
    values = np.random.default_rng(0).standard_normal(20_000)
    assert Rolling(20_000, values.tolist()).scale == pytest.approx(1, rel=0.02)
    values[:2000] += 1e6  # a tenth, as 20 spikes among 200 steps
    assert 1.05 < Rolling(20_000, values.tolist()).scale < 1.2


def test_a_window_goes_on_from_its_state() -> None:
    window = Rolling(3, [5.0, 1 / 3, -2.0])
    again = Rolling(3, json.loads(json.dumps(window.state())))
    for value in (7.0, 0.1):
        window.push(value)
        again.push(value)
        assert (again.median, again.scale, again.state()) == (window.median, window.scale, window.state())


def test_an_episode_ends_after_the_cooldown() -> None:
    troubled = [0, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 1]
    episode = Episode(cooldown=2)
    onsets = [episode.begins(bool(t)) for t in troubled]
    assert [i for i, onset in enumerate(onsets) if onset] == [1, 7, 11]
