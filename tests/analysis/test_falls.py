import itertools
import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import falls
from analysis.falls import FallEffects, fall_effects
from tests.analysis.simulated import at_most

LEVELS = {"teacher": ("live", "ema"), "reward": ("with", "without")}


def grid(fell: Callable[..., bool], seeds: int = 8, levels: dict[str, tuple[str, ...]] = LEVELS) -> pd.DataFrame:
    """Runs of all combinations, of which those fall that ``fell`` says by their levels and seed."""
    rows = [dict(zip(levels, chosen, strict=True)) | {"arm": " ".join(chosen), "seed": seed,
                                                      "diverged": fell(*chosen, seed),
                                                      "time": 50.0 if fell(*chosen, seed) else 100.0}
            for chosen in itertools.product(*levels.values()) for seed in range(seeds)]  # fmt: skip
    return pd.DataFrame(rows)


def told(trials: pd.DataFrame) -> FallEffects:
    return fall_effects(trials, [name for name in trials.columns if name in (*LEVELS, "rate")])


def test_two_factors_that_must_meet_are_told_as_such_and_not_one_by_one() -> None:
    found = told(grid(lambda teacher, reward, seed: (teacher, reward) == ("live", "with")))
    (pair,) = found.pairs
    assert pair.levels == {"teacher": "live", "reward": "with"}
    assert (pair.fell, pair.runs, pair.other_fell, pair.other_runs) == (8, 8, 0, 24)
    assert pair.falls
    assert found.arms is not None
    assert found.arms.named
    assert found.alone == []


def test_two_cures_that_only_help_together_are_found_too() -> None:
    (pair,) = told(grid(lambda teacher, reward, seed: (teacher, reward) != ("ema", "without") or seed == 0)).pairs
    assert pair.levels == {"teacher": "ema", "reward": "without"}
    assert not pair.falls
    assert (pair.whole, pair.other_whole) == (7, 0)


@pytest.mark.parametrize("chance", [0, 1])
def test_one_factor_that_decides_is_told_alone(chance: int) -> None:
    found = told(grid(lambda teacher, reward, seed: teacher == "live" and seed >= chance))
    assert found.pairs == []
    assert {effect.factor for effect in found.alone} == {"teacher"}


def test_three_levels_and_a_missing_arm() -> None:
    levels = {**LEVELS, "rate": ("slow", "usual", "fast")}
    trials = grid(lambda teacher, reward, rate, seed: (teacher, rate) == ("live", "fast"), seeds=5, levels=levels)
    found = told(trials[trials["arm"] != "ema with slow"])
    assert [pair.levels for pair in found.pairs] == [{"teacher": "live", "rate": "fast"}]
    assert {effect.factor for effect in found.alone} <= {"reward"}
    assert not found.alone


def test_falls_that_the_factors_do_not_explain_are_those_of_arms() -> None:
    """Four of four in one arm are too few for a pair, and enough to say that arms differ."""
    found = told(grid(lambda teacher, reward, seed: (teacher, reward) == ("live", "with"), seeds=4))
    assert found.arms is not None
    assert found.arms.named
    assert found.pairs == []


def test_where_no_run_fell_nothing_is_tested_and_where_all_did_when_they_did() -> None:
    assert told(grid(lambda *levels: False)) == FallEffects()
    alike = grid(lambda *levels: True)
    found = told(alike.assign(time=np.where(alike["teacher"] == "live", 50.0, 80.0)))
    assert found.arms is not None
    assert found.arms.named
    assert not found.odds
    unlike = told(alike).arms
    assert unlike is not None
    assert unlike.p == 1.0


def test_one_factor_is_not_corrected_for_itself() -> None:
    found = fall_effects(grid(lambda level, seed: level == "a" or seed == 0, levels={"k": ("a", "b")}), ["k"])
    assert found.arms is not None
    assert found.arms.p == found.arms.p_holm
    assert [effect.p for effect in found.odds] == [effect.p_holm for effect in found.odds]
    assert not found.together


# --- exchanges --------------------------------------------------------------------------------------------


def test_exchanges_within_seeds_are_those_of_all_sign_flips() -> None:
    """Two arms of six pairs: Fisher's sign test by enumeration."""
    trials = grid(lambda level, seed: level == "a" and seed < 5, seeds=6, levels={"k": ("a", "b")})
    error = math.sqrt(0.0625 / falls.EXCHANGES)
    assert falls.arms_p(trials) == pytest.approx(2 * 0.5**5, abs=4 * error)


def test_runs_of_unpaired_seeds_are_exchanged_freely() -> None:
    trials = grid(lambda level, seed: level == "a" and seed < 6, levels={"k": ("a", "b")})
    trials["seed"] = range(len(trials))
    exact = float(stats.fisher_exact([[6, 2], [0, 8]]).pvalue)
    assert falls.arms_p(trials) == pytest.approx(exact, abs=4 * math.sqrt(exact / falls.EXCHANGES))


def test_arms_without_a_difference_are_rarely_told_apart() -> None:
    arm, seed = (part.ravel() for part in np.meshgrid(range(4), range(8), indexing="ij"))
    rng, studies = np.random.default_rng(0), 400
    luck = rng.random((studies, 8))[:, seed]
    p = np.array(falls.exchanged(arm, seed, (rng.random(luck.shape) < luck).astype(float), exchanges=400))
    assert (p < 0.05).mean() < at_most(0.05, studies)
