import itertools
import math

import numpy as np
import pandas as pd
import pytest

from analysis import effects, firth
from analysis.effects import main_effects, odds_effects
from analysis.intervals import Interval, holm
from tests.analysis.simulated import at_least, at_most
from twinrl.config.errors import InputError

FACTORS = ("lr", "teacher", "clip")
SIMULATIONS = 2000
FEW = 100
"""Of what is fitted one by one; ``campaign`` fits 2,000 of each kind in test_validity.py."""
FAMILY_WISE = at_most(0.05, SIMULATIONS)


def factorial(seeds: int) -> pd.DataFrame:
    """A full 2³ design crossed with seeds."""
    rows = [dict(zip(FACTORS, levels, strict=True)) | {"seed": seed}
            for levels in itertools.product(("a", "b"), repeat=3) for seed in range(seeds)]  # fmt: skip
    return pd.DataFrame(rows)


def level(trials: pd.DataFrame, factor: str) -> np.ndarray:
    return (trials[factor] == "b").to_numpy(float)


def least_squares(trials: pd.DataFrame, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Main effects of (N, trials) outcomes, for all at once: (N, 3) estimates, half intervals and p-values."""
    from scipy import stats

    blocks = effects.design(trials.assign(y=0.0), ["y"], FACTORS, (), {})
    seeds = effects.factor_block("seed", trials["seed"]).columns
    x = np.concatenate([np.ones((len(trials), 1)), *(b.columns for b in blocks), seeds], axis=1)
    inverse = np.linalg.inv(x.T @ x)
    beta = y @ x @ inverse
    freedom = len(trials) - x.shape[1]
    variance = ((y - beta @ x.T) ** 2).sum(1) / freedom
    error = np.sqrt(variance[:, None] * np.diag(inverse)[1:4])
    return beta[:, 1:4], stats.t.ppf(0.975, freedom) * error, 2 * stats.t.sf(np.abs(beta[:, 1:4] / error), freedom)


def simulated(trials: pd.DataFrame, rng: np.random.Generator, effect: float) -> np.ndarray:
    """(N, trials) outcomes with a seed effect, noise of 1 and ``effect`` of the factor teacher."""
    seed_effect = rng.standard_normal((SIMULATIONS, trials["seed"].max() + 1))[:, trials["seed"]]
    return rng.standard_normal((SIMULATIONS, len(trials))) + seed_effect + effect * level(trials, "teacher")


def test_nothing_is_named_where_nothing_is_planted() -> None:
    trials = factorial(10)
    found = holm(least_squares(trials, simulated(trials, np.random.default_rng(0), 0.0))[2]) < 0.05
    assert found.any(1).mean() < FAMILY_WISE


def test_the_planted_factor_is_named_and_the_interval_covers() -> None:
    trials, rng, planted = factorial(10), np.random.default_rng(1), 0.8
    estimate, half, p = least_squares(trials, simulated(trials, rng, planted))
    found = holm(p) < 0.05
    assert found[:, 1].mean() > 0.85
    assert found[:, [0, 2]].any(1).mean() < FAMILY_WISE
    covered = (np.abs(estimate[:, 1] - planted) <= half[:, 1]).mean()
    assert at_least(0.95, SIMULATIONS) < covered < at_most(0.95, SIMULATIONS)


def test_what_is_simulated_is_what_main_effects_does() -> None:
    trials = factorial(4)
    y = simulated(trials, np.random.default_rng(2), 1.0)[:3]
    for row, estimate, half, p in zip(y, *least_squares(trials, y), strict=True):
        ours = {e.factor: e for e in main_effects(trials.assign(y=row), "y", FACTORS)}
        assert [ours[f].p for f in FACTORS] == pytest.approx(p)
        ends = [(ours[f].interval.low, ours[f].interval.high) for f in FACTORS]
        assert np.array(ends) == pytest.approx(np.stack([estimate - half, estimate + half], 1))


def test_main_effects_agree_with_a_statsmodels_formula() -> None:
    import statsmodels.formula.api as smf
    from statsmodels.stats.anova import anova_lm

    trials = factorial(5)
    trials["y"] = simulated(trials, np.random.default_rng(3), 1.0)[0]
    fitted = smf.ols("y ~ C(lr, Sum) * C(teacher, Sum) + C(clip, Sum) + C(seed, Sum)", trials).fit()
    table = anova_lm(fitted, typ=3)["PR(>F)"]
    ours = {e.factor: e for e in main_effects(trials, "y", FACTORS, [("lr", "teacher")])}
    assert ours["teacher"].p == pytest.approx(table["C(teacher, Sum)"])
    assert ours["lr × teacher"].p == pytest.approx(table["C(lr, Sum):C(teacher, Sum)"])
    means = trials.groupby("teacher")["y"].mean()
    assert ours["teacher"].interval.estimate == pytest.approx(means["b"] - means["a"])


def test_a_planted_interaction_is_found() -> None:
    trials = factorial(10)
    y = np.random.default_rng(4).standard_normal(len(trials)) + 2 * level(trials, "lr") * level(trials, "clip")
    found = main_effects(trials.assign(y=y), "y", FACTORS, [("lr", "clip"), ("lr", "teacher")])
    named = {e.factor for e in found if e.named}
    assert "lr × clip" in named
    assert "lr × teacher" not in named


def test_diverged_runs_are_ranked_last() -> None:
    trials = factorial(6)
    y = np.random.default_rng(5).standard_normal(len(trials))
    y[(trials["teacher"] == "b") & (trials["seed"] < 4)] = math.inf
    found = main_effects(trials.assign(y=y), "y", FACTORS)
    assert found[0].factor == "teacher"
    assert found[0].scale == "ranks"
    assert found[0].named


def test_ranks_keep_their_level_under_heavy_tails() -> None:
    from scipy import stats

    trials = factorial(5)
    outcomes = np.random.default_rng(8).standard_t(1.5, (SIMULATIONS, len(trials)))
    p = least_squares(trials, stats.rankdata(outcomes, axis=1))[2]
    assert (np.sort(p, axis=1)[:, 0] * len(FACTORS) < 0.05).mean() < FAMILY_WISE


def test_one_far_off_run_hides_a_factor_from_values_and_not_from_ranks() -> None:
    trials = factorial(5)
    y = np.random.default_rng(7).standard_normal(len(trials)) + 2.5 * (trials["teacher"] == "b")
    y.iloc[0] += 200.0  # a diverged run that went on to its end
    by_values, by_ranks = (main_effects(trials.assign(y=y), "y", FACTORS, ranks=ranks) for ranks in (False, True))
    assert [e.factor for e in by_ranks if e.named] == ["teacher"]
    assert by_ranks[0].scale == "ranks"
    assert not any(e.named for e in by_values)


def test_reference_and_several_levels() -> None:
    levels = {"x": 0.0, "y": 1.0, "z": 3.0}
    trials = pd.DataFrame([{"k": k, "seed": s, "y": value + 0.01 * s} for k, value in levels.items()
                           for s in range(4)])  # fmt: skip
    found = main_effects(trials, "y", ["k"], reference={"k": "y"})
    assert {e.contrast: round(e.interval.estimate, 6) for e in found} == {"x − y": -1.0, "z − y": 2.0}


# --- yes or no --------------------------------------------------------------------------------------------


def _odds_p(trials: pd.DataFrame, y: np.ndarray) -> np.ndarray:
    """Likelihood-ratio p-values of three factors; 1 where all outcomes are alike."""
    if y.min() == y.max():
        return np.ones(3)
    blocks = effects.design(trials.assign(y=y), ["y"], FACTORS, (), {})
    x = np.concatenate([np.ones((len(y), 1)), *(b.columns for b in blocks)], axis=1)
    full = firth.fit(x, y)
    return np.array([firth.p_value(x, y, [k], full) for k in (1, 2, 3)])


def _outcomes(trials: pd.DataFrame, rng: np.random.Generator, odds: float) -> np.ndarray:
    by_seed = rng.standard_normal((FEW, trials["seed"].max() + 1))[:, trials["seed"]]
    logit = -1.0 + 0.5 * by_seed + odds * level(trials, "teacher")
    return (rng.random(logit.shape) < 1 / (1 + np.exp(-logit))).astype(float)


def test_no_factor_of_divergence_is_named_where_none_is_planted() -> None:
    trials = factorial(3)
    outcomes = _outcomes(trials, np.random.default_rng(3), 0.0)
    p = np.array([_odds_p(trials, y) for y in outcomes])
    assert (holm(p) < 0.05).any(1).mean() < at_most(0.05, FEW)


def test_the_planted_factor_of_divergence_is_named() -> None:
    trials = factorial(10)
    outcomes = _outcomes(trials, np.random.default_rng(7), 2.0)[:40]
    p = np.array([_odds_p(trials, y) for y in outcomes])
    assert (holm(p)[:, 1] < 0.05).mean() > 0.8


def test_a_factor_that_decides_everything_has_a_finite_effect() -> None:
    trials = factorial(4)
    trials["diverged"] = trials["teacher"] == "b"
    found = odds_effects(trials, FACTORS)
    assert found[0].factor == "teacher"
    assert found[0].named
    assert 1 < found[0].interval.low < found[0].interval.estimate < math.inf
    assert not any(e.named for e in found[1:])
    assert odds_effects(trials.assign(diverged=False), FACTORS) == []


def test_firth_is_close_to_plain_logistic_regression_with_many_runs() -> None:
    import statsmodels.api as sm

    rng = np.random.default_rng(8)
    x = np.column_stack([np.ones(1000), rng.standard_normal((1000, 2))])
    y = (rng.random(1000) < 1 / (1 + np.exp(-x @ [0.3, 1.0, -0.5]))).astype(float)
    plain = sm.Logit(y, x).fit(disp=0)
    found = firth.fit(x, y)
    assert found.beta == pytest.approx(plain.params, abs=0.02)
    low, high = firth.profile_interval(x, y, 1, found, 0.95)
    assert [low, high] == pytest.approx(plain.conf_int()[1], abs=0.04)


def test_firth_of_a_two_by_two_table_adds_a_half_to_every_cell() -> None:
    x = np.column_stack([np.ones(20), [0] * 10 + [1] * 10])
    y = np.array([0] * 10 + [1] * 10, float)  # separated: plain estimates are infinite
    log_odds = math.log((10.5 / 0.5) / (0.5 / 10.5))
    assert firth.fit(x, y).beta[1] == pytest.approx(log_odds, abs=1e-4)


# --- bad input --------------------------------------------------------------------------------------------


def test_aliased_factors_are_refused_by_name() -> None:
    trials = factorial(2)
    trials["copy"] = trials["lr"]
    with pytest.raises(InputError, match="effect of copy cannot be told"):
        main_effects(trials.assign(y=1.0), "y", ["lr", "copy"])


def test_missing_columns_and_too_few_runs_are_refused() -> None:
    trials = factorial(2)
    with pytest.raises(InputError, match="no column val/quality"):
        main_effects(trials, "val/quality", ["lr"])
    with pytest.raises(InputError, match="too few runs"):
        main_effects(trials.iloc[[0, 15]].assign(y=[0.0, 1.0]), "y", ["lr"])
    with pytest.raises(InputError, match="factor lr has one level"):
        main_effects(trials[trials["lr"] == "a"].assign(y=1.0), "y", ["lr"])
    with pytest.raises(InputError, match="no factor varies"):
        main_effects(trials.assign(y=1.0), "y", [])


def test_effects_that_differ_by_rounding_alone_keep_their_order() -> None:
    same = Interval(1.0, 0.0, 2.0, 8, "")
    found = [effects.Effect(name, "b − a", same, p, p, "values") for name, p in
             (("first", 0.2 * (1 + 1e-12)), ("second", 0.2), ("third", 0.1))]  # fmt: skip
    assert [e.factor for e in effects.corrected(found, seeds=2)] == ["third", "first", "second"]


def test_one_seed_names_no_factor() -> None:
    trials = factorial(1)
    y = 5.0 * level(trials, "teacher") + 0.01 * np.random.default_rng(0).standard_normal(len(trials))
    alone = effects.main_effects(trials.assign(y=y), "y", FACTORS)[0]
    assert alone.factor == "teacher"
    assert alone.p_holm < 1e-4
    assert not alone.named
    twice = pd.concat([trials, trials.assign(seed=1)], ignore_index=True)
    assert effects.main_effects(twice.assign(y=np.concatenate([y, y])), "y", FACTORS)[0].named


def test_no_effect_is_zero_and_not_what_rounding_leaves() -> None:
    trials = factorial(2)
    found = effects.main_effects(trials.assign(y=0.1 + 0.2 * level(trials, "teacher")), "y", FACTORS)
    assert [e.interval.estimate for e in found if e.factor != "teacher"] == [0.0, 0.0]
