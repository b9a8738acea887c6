"""What crossed factors do, from the autopsy's table of trials: teacher × reward, renoise × reward, rate × both."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from autopsy_arms import COLUMNS, RULE, arm_line, before_reward, factor, share
from autopsy_runs import MARGIN

from ablations.study import load
from analysis.intervals import Interval, clopper_pearson, mean_t, number
from analysis.margins import Critical, critical_rate, critical_rates, margin
from analysis.survival import Times, hazard_ratio
from twinrl.errors import InputError

ACCURACY = load(f"autopsy-{MARGIN}").config.margin.accuracy_floor


def levels_of(trials: pd.DataFrame, study: str, *factors: str) -> pd.DataFrame:
    """The runs of a study with the levels of its factors as columns of their own."""
    chosen = trials[trials.study == study]
    return chosen.assign(**{name: chosen[f"level.{name}"] for name in factors})


def crossed_table(runs: pd.DataFrame, factors: Sequence[str]) -> str:
    """One line for each combination of levels."""
    lines = [f"| {' | '.join(factors)} | seeds | {COLUMNS} |", f"|{'---|' * len(factors)}--:|{RULE}"]
    for levels, found in runs.groupby(list(factors), sort=False):
        lines.append(f"| {' | '.join(levels)} | {len(found)} | {arm_line(found)} |")
    return "\n".join(lines)


# --- from the corrected recipe ----------------------------------------------------------------------------


def causes_values(trials: pd.DataFrame) -> dict[str, str]:
    """The corrected recipe with the published teacher, the published reward, and both."""
    runs = levels_of(trials, "causes", "teacher", "reward")
    arms = {key: found.set_index("seed") for key, found in runs.groupby(["teacher", "reward"])}
    base = arms["ema", "corrected"]
    bound = clopper_pearson(int(base.diverged.sum()), len(base)).high
    values = {"causes": crossed_table(runs, ["teacher", "reward"]), "causes_seeds": str(runs.seed.nunique())}
    for (teacher, reward), found in arms.items():
        low = clopper_pearson(int(found.diverged.sum()), len(found)).low
        distance = np.log(found.final_fd / base.final_fd).replace([np.inf, -np.inf], np.nan).dropna()
        values |= {
            f"causes_{teacher}_{reward}": share(found.diverged),
            f"causes_{teacher}_{reward}_fd": factor(mean_t(distance), math.e) if len(distance) > 1 else "–",
            f"causes_{teacher}_{reward}_norm": number(found.norm_ratio.max(), 2),
            f"causes_{teacher}_{reward}_verdict": "a cause" if low > bound else "not shown to be a cause",
        }
    return values


# --- renoise × reward -------------------------------------------------------------------------------------


def interaction_values(trials: pd.DataFrame) -> dict[str, str]:
    """What the reward does to the hazard of a fall after its start, with dynamic renoise and with uniform times."""
    runs = levels_of(trials, "interactions", "reward", "renoise")
    later = runs[~before_reward(runs)]
    ratios = {
        renoise: hazard_ratio(*(_times(found[found.reward == reward]) for reward in ("with", "without")))
        for renoise, found in later.groupby("renoise")
    }
    crossed = difference(*(log_of(ratios[renoise]) for renoise in ("beta", "uniform")))
    arms = dict(iter(runs.groupby(["reward", "renoise"])))
    return {
        "interactions": crossed_table(runs, ["renoise", "reward"]),
        "interaction": factor(crossed, math.e),
        "interaction_verdict": "interact" if crossed.low > 0 or crossed.high < 0 else "are not shown to interact",
        **{f"hazard_{renoise}": str(ratio) for renoise, ratio in ratios.items()},
        **{f"interaction_{renoise}_{reward}": share(found.diverged) for (reward, renoise), found in arms.items()},
    }


def _times(runs: pd.DataFrame) -> Times:
    """Steps from the start to the fall, or to the end of a run that stayed whole."""
    return Times(runs.diverged_step.fillna(runs.steps).to_numpy(float), runs.diverged.to_numpy(bool))


def log_of(ratio: Interval) -> Interval:
    """The interval of a ratio as one of its logarithm."""
    ends = (math.log(end) if end > 0 else -math.inf for end in (ratio.estimate, ratio.low, ratio.high))
    return Interval(*ends, ratio.n, ratio.method, ratio.level)


def difference(a: Interval, b: Interval) -> Interval:
    """a − b of independent estimates whose intervals may be lopsided (MOVER; Zou and Donner 2008)."""
    estimate = a.estimate - b.estimate
    low = estimate - math.hypot(a.estimate - a.low, b.high - b.estimate)
    high = estimate + math.hypot(a.high - a.estimate, b.estimate - b.low)
    return Interval(estimate, low, high, min(a.n, b.n), "MOVER", a.level)


# --- learning rate × teacher × reward ----------------------------------------------------------------------


def margin_values(trials: pd.DataFrame) -> dict[str, str]:
    """The critical learning rate of each teacher, with the published reward and without it, by bisection."""
    chosen = trials[trials.study == MARGIN].copy()
    chosen["arm"] = chosen.arm.str.rpartition(" lr=")[0]
    chosen["diverged"] |= ~(chosen.test1_accuracy >= ACCURACY)  # broken from the start is not healthy, either
    rates = critical_rates(chosen, "lr")
    lines = ["| arm | critical learning rate, by seed | geometric mean |", "|---|---|--:|"]
    for arm in sorted({rate.arm for rate in rates}):
        mine = sorted((rate for rate in rates if rate.arm == arm), key=lambda rate: rate.seed)
        mean = factor(critical_rate(rates, arm), 2) if all(rate.bracketed for rate in mine) else "–"
        lines.append(f"| {arm} | {', '.join(map(_rate, mine))} | {mean} |")
    live, ema = ({reward: f"reward={reward} teacher={teacher}" for reward in LEVELS} for teacher in ("live", "ema"))
    pairs = {
        "margin_teacher_with": (ema["with"], live["with"]),
        "margin_teacher_without": (ema["without"], live["without"]),
        "margin_reward_live": (live["with"], live["without"]),
        "margin_reward_ema": (ema["with"], ema["without"]),
    }
    said = {name: _times_more(rates, *pair) for name, pair in pairs.items()}
    return {"margin": "\n".join(lines), "margin_seeds": str(chosen.seed.nunique())} | said


LEVELS = ("with", "without")


def _times_more(rates: list[Critical], arm: str, base: str) -> str:
    """How many times the base's critical rate an arm's is; – where it is outside the search in one of them."""
    try:
        return factor(margin(rates, arm, base), 2)
    except InputError:
        return "–"


def _rate(rate: Critical) -> str:
    if rate.healthy == 0:
        return f"< {rate.broken:.1e}"
    return f"{2**rate.log2:.1e}" if rate.bracketed else f"> {rate.healthy:.1e}"
