"""Short versions of ``python -m analysis.coverage``, whose full table is committed."""

import pytest

from analysis import validity
from analysis.validity import COVERS, LEVEL, Finding


@pytest.mark.parametrize(
    ("check", "studies"),
    [("main effects", 2000), ("ranking", 100), ("critical rates", 100), ("chances", 200), ("hazard ratios", 40)],
)
def test_shares_lie_inside_their_bands(check: str, studies: int) -> None:
    found = list(validity.CHECKS[check](studies))
    assert found
    assert [f for f in found if not f.within] == []


@pytest.mark.slow
@pytest.mark.parametrize(("check", "studies"), [("restricted means", 200), ("odds", 40), ("recurrences", 100)])
def test_shares_of_the_dear_ones_lie_inside_their_bands(check: str, studies: int) -> None:
    outside = [f for f in validity.CHECKS[check](studies) if not f.within]
    assert [f for f in outside if (f.what, f.study, f.n) not in TOO_WIDE] == []


TOO_WIDE = {("difference of restricted means", "rates 0.2, 0.2", n) for n in (10, 20)}
"""Where both arms expect two divergences in ten runs; docs/analysis.md says so."""


def test_a_share_is_outside_only_beyond_its_monte_carlo_error() -> None:
    good, wide, lax = (Finding("x", "y", 10, kind, share, 2000) for kind, share in
                       ((COVERS, 0.975), (COVERS, 0.99), (LEVEL, 0.08)))  # fmt: skip
    assert (good.within, wide.within, lax.within) == (True, False, False)
    assert Finding("x", "y", 10, COVERS, 1.0, 2000).error > 0
    rows = validity.table([good, wide]).splitlines()
    assert rows[2].startswith("| x | y | 10 | covers | 97.5 % | 0.3 | 2,000 |  |")
    assert rows[3].endswith("| outside |")


def test_the_true_restricted_mean_is_that_of_many_runs() -> None:
    import numpy as np

    time, _ = validity.divergence(np.random.default_rng(0), (200_000,), 1.3)
    assert validity.mean_time(1.3) == pytest.approx(time.mean(), rel=5e-3)
