import math
from pathlib import Path

import numpy as np
import pytest

from analysis import traces
from analysis.frames import load_run, load_study, run_divergence
from tests.analysis import simulated
from twinrl.run import layout, runlog

STEP = np.arange(1, 301)


def norms(**rises: tuple[int, float]) -> dict[str, np.ndarray]:
    """Noisy norms of level 1, each multiplied by a factor from a step on."""
    rng = np.random.default_rng(0)
    found = {term: np.exp(0.2 * rng.standard_normal(len(STEP))) for term in ("a", "b", "total")}
    for term, (step, factor) in rises.items():
        found[term][step - 1 :] *= factor
    return found


def test_the_term_that_leaves_its_level_first_leads() -> None:
    found = traces.first_rise(STEP, norms(a=(231, 30), b=(215, 20), total=(225, 50)), after=220, time=240)
    assert found is not None
    assert (found.term, found.step, found.lead) == ("b", 215, 10)
    assert 15 < found.times < 60


def test_a_level_that_is_always_high_is_no_rise_and_a_total_that_does_not_rise_gives_no_lead() -> None:
    found = traces.first_rise(STEP, norms(a=(1, 100), b=(230, 30)), after=220, time=240)
    assert found is not None
    assert found.term == "b"
    assert math.isnan(found.lead)


def test_where_nothing_spikes_a_level_that_has_doubled_leads() -> None:
    found = traces.first_rise(STEP, norms(b=(212, 3), a=(228, 3)), after=220, time=240)
    assert found is not None
    assert found.term == "b"
    assert 2 < found.times < 3 * math.exp(5 * 0.2)
    assert 212 <= found.step <= 212 + traces.SMOOTHED
    assert traces.first_rise(STEP, norms(b=(212, 1.5)), after=220, time=240) is None


def test_no_rise_no_leader() -> None:
    assert traces.first_rise(STEP, norms(a=(250, 50)), after=220, time=240) is None
    assert traces.first_rise(STEP, norms(a=(3, 50)), after=0, time=4) is None  # nothing says what is usual


def test_a_norm_that_is_not_finite_has_risen_and_one_that_was_not_logged_has_not() -> None:
    broken = norms(a=(230, 1))
    broken["a"][229:] = math.inf
    broken["b"][229:] = math.nan
    found = traces.first_rise(STEP, broken, after=220, time=240)
    assert found is not None
    assert (found.term, found.step, found.times) == ("a", 230, math.inf)


def test_stretches_keep_the_largest_and_leave_out_what_a_logarithm_cannot_show() -> None:
    values = np.array([0.0, 2.0, 5.0, math.inf, math.nan, 0.0])
    found = traces.stretched(np.arange(1, 7), values, np.array([1, 2, 4, 7]))
    assert np.isnan(found[[0, 2]]).all()
    assert found[1] == 5.0


def test_actions_of_rules() -> None:
    raw = np.array([0.0, 1.0, 2.0, 4.0, math.inf])
    did = traces.action(raw, np.minimum(raw, 1.5))
    assert (did.share, did.factor) == (2 / 3, (0.75 + 0.375) / 2)
    assert math.isnan(traces.action(raw, raw).factor)


def test_a_study_is_read_by_columns_and_says_what_rules_did(tmp_path: Path) -> None:
    for k, limits in enumerate(({}, {"rectify": 0.5})):
        simulated.make_run(tmp_path, config_hash=f"0000000{k}", steps=160, diverges_at=100, leader="base",
                           limits=limits, settings={"clip": k})  # fmt: skip
    study = load_study(tmp_path)
    found = traces.of_study(study)
    assert {trace.rise.term for trace in found.runs.values() if trace.rise} == {"base"}
    (line,) = traces.rules_table(study, found).to_dict("records")
    assert (line["gradient"], line["share of steps"], line["runs"]) == ("rectify", 1.0, "1 of 1")
    assert line["median factor"] == pytest.approx(0.5 / 3, rel=0.2)
    clipped = traces.of_study(study).of_arm(study, study.arms[1])[0]
    assert np.nanmax(clipped.entering["rectify"]) == 0.5 < np.nanmin(clipped.raw["rectify"])


def test_rows_say_what_columns_say(tmp_path: Path) -> None:
    simulated.make_run(tmp_path, steps=160, diverges_at=100, leader="base")
    run = load_run(next(tmp_path.iterdir()))
    failure = run_divergence(run)
    assert failure is not None
    simulated.make_run(tmp_path, config_hash="00000001", steps=160)
    study = load_study(tmp_path)
    assert traces.rise_of(run, failure) in [trace.rise for trace in traces.of_study(study).runs.values()]


def test_the_start_of_a_reward_is_where_it_first_pulls(tmp_path: Path) -> None:
    run = simulated.make_run(tmp_path, steps=40)
    rows = [row | {"reward/weight": float(row["step"] > 20)} for row in runlog.read(run / layout.LOG)]
    (run / layout.LOG).unlink()
    with runlog.RunLog(run / layout.LOG) as log:
        for row in rows:
            log.append(row)
    assert traces.of_run(load_run(run), traces.edges_to(40)).reward_start == 21
