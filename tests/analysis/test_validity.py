"""Short versions of ``python -m analysis.coverage``, whose full table is committed."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from analysis import coverage, validity
from analysis.validity import COVERS, LEVEL, ValidityRow
from tests.analysis.simulated import at_least, at_most

FULL = 2000


def outside(check: str, studies: int) -> list[ValidityRow]:
    """What is further from its band than four Monte-Carlo errors."""
    found = list(validity.CHECKS[check](studies))
    assert found
    bands = ((f, *validity.BANDS[f.kind]) for f in found)
    return [f for f, low, high in bands if not at_least(low, studies) <= f.share <= at_most(high, studies)]


@pytest.mark.parametrize(
    ("check", "studies"),
    [("main effects", 2000), ("grids", 2000), ("ranking", 50), ("critical rates", 50), ("chances", 100)],
)
def test_shares_lie_inside_their_bands(check: str, studies: int) -> None:
    """The others take a fit for every study: few of them are tried where each statistic is tested."""
    assert outside(check, studies) == []


@pytest.mark.campaign
@pytest.mark.parametrize("check", list(validity.CHECKS))
def test_shares_of_many_studies_lie_inside_their_bands(check: str) -> None:
    assert outside(check, FULL) == []


def test_the_committed_page_is_of_the_committed_numbers() -> None:
    results = Path(__file__).parents[2] / "benchmarks/results"
    parts = json.loads((results / "coverage.json").read_text())
    assert parts.keys() == {*coverage.ROWS, *coverage.TABLES}
    assert coverage.page(parts) == (results / "coverage.md").read_text()


def test_a_part_is_made_again_and_the_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(*arguments: str) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", ["coverage", "--out", str(tmp_path / "coverage.md"), *arguments])
        coverage.main()
        return json.loads((tmp_path / "coverage.json").read_text())

    first = main("--studies", "5", "--only", "grids")
    both = main("--studies", "4", "--only", "main effects")
    assert both["grids"] == first["grids"]
    assert both["main effects"]["studies"] == 4
    assert "not made yet" in (tmp_path / "coverage.md").read_text()


@pytest.mark.parametrize(("rate", "n"), [(0.1, 3), (0.3, 4), (1.0, 5), (4.0, 4)])
def test_what_an_exact_interval_covers_at_least_is_that_of_all_permutations(rate: float, n: int) -> None:
    """By trying every way in which the runs of two arms could have been shared out."""
    expected = 0.0
    for m in range(2 * n + 1):
        times = np.concatenate([np.arange(1, m + 1), np.full(2 * n - m, 100)])
        sums = np.array([times[list(arm)].sum() for arm in itertools.combinations(range(2 * n), n)])
        silent = (sums == sums.min()).mean() > 0.025
        expected += stats.binom.pmf(m, 2 * n, 1 - math.exp(-rate)) * (1.0 if silent else 0.95)
    assert coverage.least_exact(rate, n) == pytest.approx(expected)


def test_a_share_is_outside_only_beyond_its_monte_carlo_error() -> None:
    good, wide, lax = (ValidityRow("x", "y", 10, kind, share, 2000) for kind, share in
                       ((COVERS, 0.975), (COVERS, 0.99), (LEVEL, 0.08)))  # fmt: skip
    assert (good.within, wide.within, lax.within) == (True, False, False)
    assert ValidityRow("x", "y", 10, COVERS, 1.0, 2000).error > 0
    rows = validity.table([good, wide]).splitlines()
    assert rows[2].startswith("| x | y | 10 | covers | 97.5 % | 0.3 | 2,000 |  |")
    assert rows[3].endswith("| outside |")


def test_the_true_restricted_mean_is_that_of_many_runs() -> None:
    time, _ = validity.divergence(np.random.default_rng(0), (200_000,), 1.3)
    error = time.std() / math.sqrt(len(time))
    assert abs(validity.mean_time(1.3) - time.mean()) < 4 * error
