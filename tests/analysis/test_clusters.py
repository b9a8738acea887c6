import numpy as np
import pytest

from analysis import clusters, plots
from analysis.frames import load_run
from tests.analysis import simulated
from tests.analysis.simulated import at_most

BATCH = 32


def event(rng: np.random.Generator, guilty: int = 0, n: int = BATCH, **changes: object) -> dict[str, object]:
    """A spike of the planted term, ``guilty`` of whose worst rows are in the planted range and branch."""
    plain = {"step": 1, "kind": "spike", "terms": [simulated.LEADER], "rows": list(range(n))}
    return plain | simulated.places(rng, n, guilty) | changes


def test_the_planted_range_of_t_and_the_branch_are_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    run = load_run(simulated.make_run(tmp_path_factory.mktemp("runs"), spikes_at=(120, 200, 260, 330)))
    found = {c.where: c for c in clusters.clusters(run.events)}
    (window,) = [where for where in found if where.startswith("t ")]
    low, high = map(float, window.removeprefix("t ").split("–"))
    assert low <= simulated.GUILTY_T[0] < simulated.GUILTY_T[1] <= high
    assert high - low <= 0.25
    assert set(found) == {window, f"branch {simulated.GUILTY_BRANCH}"}
    assert (found[window].count, found[window].worst, found[window].judged) == (16, 16, 4)
    assert all(c.p < 0.01 < c.expected for c in found.values())


def test_chance_expects_what_the_rows_beside_the_worst_show() -> None:
    cases = [{"step": k, "kind": "spike", "terms": ["a"], "t": [0.95, *[0.95] * 3, *[0.1] * 12], "branches": ["x"] * 16}
             for k in range(6)]  # fmt: skip
    (found,) = clusters.clusters(cases)
    assert (found.count, found.worst, found.expected) == (12, 12, pytest.approx(6 * 2 * 4 / 16))


@pytest.mark.slow
def test_nothing_is_named_where_the_order_says_nothing_about_t() -> None:
    """Also where times crowd in one place: an unequal law of t is no cluster."""
    rng, named, n = np.random.default_rng(0), 0, 100
    for k in range(n):
        events = [event(rng, t=(rng.random(BATCH) ** 4).tolist()) for _ in range(8)]
        named += bool(clusters.clusters(events, draws=200, seed=k))
    assert named / n < at_most(0.05, n)


def test_rows_that_are_not_finite_are_compared_with_the_other_events() -> None:
    rng = np.random.default_rng(1)
    spikes = [event(rng) for _ in range(6)]
    broken = [event(rng, guilty=2, n=2, kind="nonfinite") for _ in range(5)]
    assert clusters.clusters(broken) == []  # nothing to compare with
    found = clusters.clusters(spikes + broken)
    assert any(c.where.startswith("t 0.8") for c in found)


def test_events_without_times_or_terms_are_passed_over() -> None:
    rng = np.random.default_rng(2)
    old = [{k: v for k, v in event(rng, guilty=4).items() if k not in ("t", "branches")} for _ in range(5)]
    of_the_whole_batch = [event(rng, guilty=4, terms=[]) for _ in range(5)]
    assert clusters.clusters([*old, *of_the_whole_batch, event(rng, guilty=4)]) == []


def test_a_single_branch_is_no_cluster_and_figures_show_the_worst() -> None:
    rng = np.random.default_rng(3)
    events = [event(rng, guilty=4, branches=["any"] * BATCH, step=100 * k) for k in range(5)]
    assert not any("branch" in c.where for c in clusters.clusters(events))
    figure = plots.places(clusters.placed(events))
    _, labels = figure.axes[0].get_legend_handles_labels()
    assert labels == ["other rows", "worst, any"]
