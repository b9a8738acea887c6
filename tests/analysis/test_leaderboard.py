import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import leaderboard, margins, plots
from analysis.frames import StudyFrame, assemble, load_study
from analysis.intervals import Interval
from analysis.leaderboard import _in_range, compare, per_prompt, values_of
from tests.analysis import simulated
from tests.analysis.simulated import at_most
from twinrl.config.errors import InputError
from twinrl.run import runlog

METRIC = "val/quality"


def study(values: dict[str, list[float]], **columns: object) -> StudyFrame:
    """Finished trials with the given qualities, seeds in order; infinite values are runs that diverged early."""
    lines = [
        {"arm": arm, "seed": seed, "config_hash": arm, "status": "diverged" if math.isinf(value) else "finished",
         "step": 50 if math.isinf(value) else 100, "planned": 100, "diverged": math.isinf(value), "time": 50.0,
         "after": math.nan, "recovered": False, "kind": "",
         "seconds": 1.0, "directory": "", METRIC: math.nan if math.isinf(value) else value, **columns}
        for arm, qualities in values.items() for seed, value in enumerate(qualities)
    ]  # fmt: skip
    return assemble("s", lines, [])


def noisy(center: float, n: int = 10, seed: int = 0) -> list[float]:
    return (center + 0.1 * np.random.default_rng(seed).standard_normal(n)).tolist()


def test_the_better_arm_leads_and_is_found() -> None:
    lines = leaderboard.leaderboard(
        study({"base": noisy(1.0), "good": noisy(0.5, seed=1), "same": noisy(1.0, seed=2)}), METRIC
    )
    by_arm = {line.arm: line for line in lines}
    assert lines[0].arm == "good"
    assert by_arm["good"].p_holm < 0.05 < by_arm["same"].p_holm
    good = by_arm["good"]
    assert good.better is not None
    assert good.better.estimate == 1.0
    assert good.difference is not None
    assert good.difference.high < 0
    assert by_arm["base"].better is None


def test_diverged_runs_are_worse_than_all_others() -> None:
    found = values_of(study({"a": [1.0, math.inf, 2.0]}).trials, METRIC)
    assert found.tolist() == [1.0, math.inf, 2.0]
    trials = study({"a": [1.0, math.inf]}).trials.rename(columns={METRIC: "val/recall_1nfe"})
    assert values_of(trials, "val/recall_1nfe").tolist() == [1.0, -math.inf]


def test_a_failed_run_keeps_its_value_only_where_it_recovered_and_went_on() -> None:
    trials = study({"a": [1.0, 2.0, 3.0]}).trials.assign(diverged=[True, True, False], recovered=[True, False, False])
    assert values_of(trials, METRIC).tolist() == [1.0, math.inf, 3.0]
    assert values_of(trials.assign(step=50), METRIC).tolist() == [math.inf, math.inf, 3.0]


def test_an_arm_that_diverges_is_ranked_last_without_an_interval() -> None:
    lines = leaderboard.leaderboard(study({"base": noisy(1.0), "bad": [math.inf] * 6 + noisy(0.1, 4)}), METRIC)
    assert lines[-1].arm == "bad"
    assert lines[-1].interval.estimate == math.inf
    assert lines[-1].diverged == 6
    assert lines[-1].difference is None


@pytest.mark.slow
def test_pairing_by_seed_finds_what_all_pairs_miss() -> None:
    seeds = np.random.default_rng(3).standard_normal(10)
    base, arm = pd.Series(seeds), pd.Series(seeds - 0.1)
    assert compare(arm, base, higher=False)[2] < 0.01
    strangers = arm.set_axis(range(100, 110))
    assert compare(strangers, base, higher=False)[2] > 0.5
    assert compare(arm, base, higher=False)[2] == pytest.approx(stats.wilcoxon(arm - base, zero_method="pratt").pvalue)


def test_family_wise_error_of_the_ranking() -> None:
    rng, found, n = np.random.default_rng(4), 0, 150
    for _ in range(n):
        base = rng.standard_normal(10)
        p = [leaderboard.signed_rank_p(rng.standard_normal(10), base) for _ in range(3)]
        found += bool((leaderboard.holm(p) < 0.05).any())
    assert found / n < at_most(0.05, n)


def test_signed_ranks_of_diverged_pairs() -> None:
    mine, other = np.array([0.0] * 8), np.array([-math.inf] * 8)
    assert leaderboard.signed_rank_p(mine, other) < 0.01
    assert leaderboard.signed_rank_p(other, other) == 1.0
    assert leaderboard.signed_rank_p(other, np.array([-math.inf] * 7 + [0.0])) > 0.5


def test_one_seed_ranks_nothing_and_says_how_many_it_takes() -> None:
    with pytest.raises(leaderboard.TooFewSeedsError, match=r"1 finished seed, .* expected 11 seeds .* run 10 more"):
        leaderboard.leaderboard(study({"base": [1.0], "arm": [0.5]}), METRIC)
    with pytest.raises(leaderboard.TooFewSeedsError, match=r"expected 36 seeds .* 0\.5 standard"):
        leaderboard.leaderboard(study({"base": [1.0], "arm": [0.5]}), METRIC, effect=0.5)


def test_shares_in_mixed_units_are_refused() -> None:
    found = study({"base": [0.9, 0.8], "arm": [91.0, 88.0]})
    leaderboard.leaderboard(found, METRIC)  # a distance has no such bound
    found.trials["val/recall_1nfe"] = found.trials[METRIC]
    with pytest.raises(InputError, match=r"share of 1 in some runs and in per cent in others; got 0\.8 to 91"):
        leaderboard.leaderboard(found, "val/recall_1nfe")


def test_an_interval_ends_where_the_metric_does() -> None:
    wide = Interval(5.0, -3.0, 13.0, 5, "")
    values = pd.Series([1.0, 5.0, 9.0])
    assert _in_range(wide, "val/fd_1nfe", values).low == 0.0
    assert _in_range(wide, "val/quality", values).low == -3.0  # a kernel distance without bias may be below 0
    assert _in_range(Interval(0.9, 0.7, 1.1, 5, ""), "val/recall_1nfe", values / 10).high == 1.0
    assert _in_range(Interval(90.0, 70.0, 110.0, 5, ""), "val/recall_1nfe", 10 * values).high == 110.0


def test_bad_input_is_named() -> None:
    two = study({"base": noisy(1.0), "arm": noisy(1.0)})
    with pytest.raises(InputError, match="one arm"):
        leaderboard.leaderboard(study({"base": noisy(1.0)}), METRIC)
    with pytest.raises(InputError, match="no run logged val/fid; expected one of val/quality"):
        leaderboard.leaderboard(two, "val/fid")
    two.trials.loc[0, METRIC] = math.nan
    with pytest.raises(InputError, match="missing or nan in finished runs; got seeds 0"):
        leaderboard.leaderboard(two, METRIC)
    two.trials.loc[0, "planned"] = 50
    with pytest.raises(InputError, match="different numbers of steps; got 50, 100"):
        leaderboard.leaderboard(two, METRIC)


def test_prompts_that_collapsed_are_listed() -> None:
    found = study(
        {"base": noisy(1.0), "arm": noisy(1.0)}, **{"val/accuracy/zero_1nfe": 0.9, "val/accuracy/one_1nfe": 0.2}
    )
    accuracy = per_prompt(found)
    assert accuracy.loc["one", "arm"] == pytest.approx(0.2)
    lines = leaderboard.collapses(found).set_index("arm")
    assert lines.loc["arm", ["runs", "collapsed", "prompts"]].tolist() == [10, 10, "one in 10"]


def test_a_prompt_that_is_nan_has_collapsed() -> None:
    found = study(
        {"base": noisy(1.0), "arm": noisy(1.0)}, **{"val/accuracy/zero_1nfe": 0.9, "val/accuracy/one_1nfe": 0.9}
    )
    found.trials.loc[[10, 11], "val/accuracy/one_1nfe"] = math.nan, 0.1
    accuracy = per_prompt(found)
    assert accuracy.isna().to_numpy().tolist() == [[False, False], [False, True]]
    lines = leaderboard.collapses(found).set_index("arm")
    assert lines["collapsed"].to_dict() == {"base": 0, "arm": 2}
    assert lines.loc["arm", "prompts"] == "one in 2 (1 nan)"
    cells = {text.get_text() for text in plots.prompts(accuracy).axes[0].texts}
    assert cells == {"0.9", "nan"}


def test_nan_for_every_prompt_is_a_verdict_where_the_log_has_it(tmp_path: Path) -> None:
    """A run whose samples are all broken, though it has not diverged, beside one that was not judged yet."""
    for name, config_hash, steps in (("base", "00000001", 40), ("arm", "00000002", 40), ("new", "00000003", 10)):
        simulated.make_run(tmp_path, name=name, config_hash=config_hash, steps=steps, finished=steps == 40)
    log = next(tmp_path.glob("arm-*")) / "log.jsonl"
    rows = runlog.read(log)
    log.unlink()
    with runlog.RunLog(log) as broken:
        for row in rows:
            lost = {key: math.nan for key in row if key.startswith("val/accuracy") and row["step"] == 40}
            broken.append(row | lost)
    lines = leaderboard.collapses(load_study(tmp_path)).set_index("arm")
    assert lines[["runs", "collapsed"]].T.to_dict("list") == {"arm": [1, 1], "base": [1, 0], "new": [0, 0]}


def test_another_prompt_gone_in_every_run_is_seen_though_the_means_are_high() -> None:
    found = study({"base": noisy(1.0), "arm": noisy(1.0)})
    for k in range(10):
        gone = (found.trials["arm"] == "arm") & (found.trials["seed"] == k)
        found.trials[f"val/accuracy/{k}_2nfe"] = 1.0 - gone
        found.trials[f"val/accuracy/{k}_4nfe"] = 0.0  # the fewest evaluations are what is judged
    assert (per_prompt(found) > 0.85).all(axis=None)
    lines = leaderboard.collapses(found).set_index("arm")
    assert lines["collapsed"].to_dict() == {"base": 0, "arm": 10}
    found.trials.loc[found.trials["arm"] == "arm", "diverged"] = True  # broken as a whole, which is told elsewhere
    assert leaderboard.collapses(found).set_index("arm").loc["arm", "runs"] == 0


# --- critical learning rates ------------------------------------------------------------------------------


def rates(doublings: float, seeds: int = 8) -> pd.DataFrame:
    """Trials on a fine grid of learning rates; ``good`` stands ``doublings`` more than ``base``."""
    rng, lines = np.random.default_rng(5), []
    for seed in range(seeds):
        limit = -8 + rng.standard_normal()
        for arm, extra in (("base", 0.0), ("good", doublings)):
            lines += [{"arm": arm, "seed": seed, "optim.lr": 2.0**k, "diverged": k > limit + extra}
                      for k in np.arange(-14, -1, 0.25)]  # fmt: skip
    return pd.DataFrame(lines)


def test_margin_is_the_planted_number_of_doublings() -> None:
    found = margins.margin(margins.critical_rates(rates(1.5)), "good", "base")
    assert found.estimate == pytest.approx(1.5, abs=0.01)
    assert found.low <= 1.5 <= found.high
    assert found.n == 8


def test_brackets_of_a_search_give_margins_whose_interval_knows_their_width() -> None:
    plain = [{"arm": arm, "seed": seed, "healthy": rate, "diverged": 1.2 * rate}
             for arm, rate in (("base", 1e-3), ("good", 2e-3)) for seed in range(5)]  # fmt: skip
    open_above = {"arm": "good", "seed": 5, "healthy": 0.1, "diverged": None}
    unknown = {"arm": "good", "seed": 6, "healthy": None, "diverged": None}
    found = margins.from_brackets([*plain, open_above, unknown])
    assert len(found) == 11
    margin, width = margins.margin(found, "good", "base"), math.log2(1.2)
    assert (margin.estimate, margin.n) == (pytest.approx(1.0), 5)
    assert 0.6 * width < margin.high - margin.estimate < width  # all seeds share both brackets: no spread, yet unsure
    rate = margins.critical_rate(found, "base")
    assert 2**rate.low <= 1e-3 * 1.2**0.5 <= 2**rate.high
    with pytest.raises(InputError, match="lacks diverged"):
        margins.from_brackets([{"arm": "base", "seed": 0, "healthy": 1e-3}])


def test_open_brackets_are_left_out_and_said() -> None:
    trials = rates(0.5)
    trials.loc[(trials["arm"] == "good") & (trials["seed"] < 3), "diverged"] = False
    found = margins.critical_rates(trials)
    assert sum(not c.bracketed for c in found) == 3
    assert margins.margin(found, "good", "base").n == 5
    trials.loc[trials["arm"] == "good", "diverged"] = False
    with pytest.raises(InputError, match="no seed has critical learning rates"):
        margins.margin(margins.critical_rates(trials), "good", "base")
    with pytest.raises(InputError, match=r"no column optim\.lr"):
        margins.critical_rates(trials.drop(columns="optim.lr"))
