"""What single changes do, from the autopsy's table of trials: of the published recipe, and of the recommended one."""

import math

import numpy as np
import pandas as pd
from autopsy_runs import BROKEN, MARGIN, NO_REWARD, SOUND

from ablations.margin import bisect
from ablations.study import load
from analysis.intervals import Interval, clopper_pearson, mean_t, number


def share(yes: pd.Series) -> str:
    """k of n with its exact interval."""
    found = clopper_pearson(int(yes.sum()), len(yes))
    return f"{int(yes.sum())} of {len(yes)} [{found.low:.2f}, {found.high:.2f}]"


def factor(found: Interval, base: float, digits: int = 2) -> str:
    """An interval of logarithms as one of factors."""
    ends = [number(base**value, digits) for value in (found.estimate, found.low, found.high)]
    return f"{ends[0]} [{ends[1]}, {ends[2]}]"


# --- one suspect at a time ---------------------------------------------------------------------------------

COLUMNS = (
    "fell apart | at step, median | largest norm ÷ usual, median (most) | lowest accuracy, median "
    "| Fréchet distance of the whole, median"
)
RULE = "--:|--:|--:|--:|--:|"


def arm_line(found: pd.DataFrame) -> str:
    """The cells of ``COLUMNS`` for the runs of an arm."""
    step, distance = _median(found[found.diverged].diverged_step), _median(found[~found.diverged].final_fd)
    norms = f"{number(_median(found.norm_ratio))} ({number(found.norm_ratio.max())})"
    least = number(_median(found.accuracy_least), 2)
    return f"{share(found.diverged)} | {number(step, 4)} | {norms} | {least} | {number(distance, 2)}"


def _median(values: pd.Series) -> float:
    return float(values.dropna().median())


CURE, NONE, OPEN = "yes", "no", "not settled"
GUESSES = ("sigmoid start", "own clip", "lr cut on spikes", "first three", "smaller eta", "more rows")
"""Arms of autopsy-suspects that the run's author proposed."""


def suspects_values(trials: pd.DataFrame) -> dict[str, str]:
    """Each single change of the published recipe beside the published arm, with the verdict that was declared."""
    (_, published), *arms = single_changes(trials)
    bound = clopper_pearson(int(published.diverged.sum()), len(published)).low
    lines = [f"| alone | whose guess | {COLUMNS} | a cure |", f"|---|---|{RULE}---|"]
    lines.append(f"| `published` | | {arm_line(published)} | – |")
    for name, found in arms:
        whose = "the author's" if name in GUESSES else ""
        lines.append(f"| {name} | {whose} | {arm_line(found)} | {verdict(found, bound)} |")
    cut = dict(arms)["lr cut on spikes"]
    return {
        "suspects": "\n".join(lines),
        "suspect_seeds": str(min(len(found) for _, found in arms)),
        "finalist_seeds": str(trials[trials.study == "finalists"].seed.nunique()),
        "decoded_broken": share(dict(arms)["decoded baseline"].diverged),
        "own_clip_broken": share(dict(arms)["own clip"].diverged),
        "cut_broken": share(dict(arms)["lr cut on spikes"].diverged),
        "eta_broken": share(dict(arms)["smaller eta"].diverged),
        "exact_broken": share(dict(arms)["exact pixel gradient"].diverged),
        "cut_at_start": number(100 * (cut.lr_at_start / cut.lr).median(), 2),
        "cut_end": number(100 * (cut.lr_end / cut.lr).median(), 2),
        "cures": ", ".join(name for name, found in arms if verdict(found, bound) == CURE),
    }


def single_changes(trials: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """`published`, then each single change of it with its runs, those that keep the most runs whole first.

    An arm that is a finalist has the seeds of that study as well: its configuration is the same.
    """
    regime = trials[trials.study == "regime"].groupby("arm")
    chosen = trials[trials.study == "suspects"]
    arms = [("EMA teacher", regime.get_group(SOUND)), ("no reward", regime.get_group(NO_REWARD))]
    arms += list(chosen.groupby("arm", sort=False))
    arms.sort(key=lambda arm: (arm[1].diverged.mean(), arm[1].norm_ratio.median()))
    return [("published", regime.get_group(BROKEN)), *arms]


def renoise_values(trials: pd.DataFrame) -> dict[str, str]:
    """The claim that dynamic renoise steadies training before the reward starts: uniform times instead, by seed."""
    before = trials[(trials.study == "regime") & (trials.arm == BROKEN)].set_index("seed")
    uniform = trials[(trials.study == "suspects") & (trials.arm == "uniform renoise")].set_index("seed")
    shaped = before.loc[uniform.index]
    ratios = {name: np.log(uniform[f"early_{name}_noise"] / shaped[f"early_{name}_noise"]) for name in ("norm", "loss")}
    return {
        "uniform_norm_noise": factor(mean_t(ratios["norm"]), math.e),
        "uniform_loss_noise": factor(mean_t(ratios["loss"]), math.e),
        "uniform_spikes": f"{int(uniform.early_spikes.sum())}",
        "shaped_spikes": f"{int(shaped.early_spikes.sum())}",
        "renoise_seeds": str(len(uniform)),
    }


def causes_values(trials: pd.DataFrame) -> dict[str, str]:
    """The corrected recipe with the published teacher, the published reward, and both."""
    chosen = trials[trials.study == "causes"].rename(columns=lambda name: name.removeprefix("level."))
    chosen = chosen.loc[:, ~chosen.columns.duplicated()]
    lines = [f"| teacher | reward | seeds | {COLUMNS} |", f"|---|---|--:|{RULE}"]
    lines += [
        f"| {teacher} | {reward} | {len(found)} | {arm_line(found)} |"
        for (teacher, reward), found in chosen.groupby(["teacher", "reward"])
    ]
    return {"causes": "\n".join(lines), "causes_seeds": str(chosen.seed.nunique())}


def margin_values(trials: pd.DataFrame) -> dict[str, str]:
    """The critical learning rate of each teacher, with the published reward and without it, by bisection."""
    chosen = trials[trials.study == MARGIN].rename(columns=lambda name: name.removeprefix("level."))
    chosen = chosen.loc[:, ~chosen.columns.duplicated()]
    brackets = {key: _bracket(found) for key, found in chosen.groupby(["teacher", "reward", "seed"])}
    found = pd.Series({key: math.sqrt(low * high) for key, (low, high) in brackets.items()}, dtype=float)
    lines = ["| teacher | reward | critical learning rate, by seed | geometric mean |", "|---|---|---|--:|"]
    for (teacher, reward), rates in found.groupby(level=[0, 1]):
        each = ", ".join(_rate(*brackets[(teacher, reward, seed)]) for seed in rates.index.get_level_values(2))
        mean = f"{math.exp(np.log(rates).mean()):.1e}" if rates.notna().all() else "–"
        lines.append(f"| {teacher} | {reward} | {each} | {mean} |")
    ratios = {
        "margin_teacher_with": found["ema", "with"] / found["live", "with"],
        "margin_teacher_without": found["ema", "without"] / found["live", "without"],
        "margin_reward_live": found["live", "with"] / found["live", "without"],
        "margin_reward_ema": found["ema", "with"] / found["ema", "without"],
    }
    said = {name: factor(mean_t(np.log(ratio.dropna())), math.e) for name, ratio in ratios.items()}
    return {"margin": "\n".join(lines), "margin_seeds": str(chosen.seed.nunique())} | said


def _bracket(probes: pd.DataFrame) -> tuple[float, float]:
    """The largest rate that was healthy below every one that diverged, and the smallest above it; nan where open."""
    verdicts = {rate: not diverged for rate, diverged in zip(probes.lr, probes.diverged.tolist(), strict=True)}
    low, high, asked = bisect(load(f"autopsy-{MARGIN}").config.margin, verdicts.get)
    assert asked is None, f"a bisection is not at its end: {asked:g} was not probed"
    return low or math.nan, high or math.nan


def _rate(low: float, high: float) -> str:
    if math.isnan(low):
        return f"< {high:.1e}"
    return f"> {low:.1e}" if math.isnan(high) else f"{math.sqrt(low * high):.1e}"


def carried_values(trials: pd.DataFrame, where: str) -> dict[str, str]:
    """On other networks or data: the published recipe at each learning rate, and the decisive changes at one."""
    rates, changes = (trials[trials.study == study] for study in (f"{where}-rates", where))
    lines = [f"| learning rate | {COLUMNS} |", f"|--:|{RULE}"]
    lines += [f"| {rate:.0e} | {arm_line(found)} |" for rate, found in rates.groupby("lr")]
    arms = [f"| alone | {COLUMNS} |", f"|---|{RULE}"]
    arms += [f"| {name} | {arm_line(found)} |" for name, found in changes.groupby("arm", sort=False)]
    averaged = changes.arm == "EMA teacher"
    return {
        f"{where}_rates": "\n".join(lines),
        where: "\n".join(arms),
        f"{where}_live_broken": share(changes.diverged[~averaged]) if len(changes) else "–",
        f"{where}_ema_broken": share(changes.diverged[averaged]) if len(changes) else "–",
    }


def verdict(found: pd.DataFrame, bound: float) -> str:
    """A cure: the share's upper end is below the published share's lower end. No cure: half and more fell apart."""
    if clopper_pearson(int(found.diverged.sum()), len(found)).high < bound:
        return CURE
    return NONE if found.diverged.mean() >= 0.5 else OPEN


# --- the recipe -------------------------------------------------------------------------------------------


def recipe_values(trials: pd.DataFrame) -> dict[str, str]:
    """Of the recommended recipe: the runs that fell apart at each rate, its judge against the teacher, its price."""
    recipe = trials[trials.study == "recommended"].dropna(axis="columns", how="all")
    control = trials[trials.study == "control"]
    lines = [
        "| learning rate | seeds | fell apart | largest norm ÷ usual (most) | NFE | held-out judge − teacher's "
        "| judge, with − without reward | Fréchet distance × | recall, with − without | no worse |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for rate, runs in recipe.groupby("lr"):
        plain = control[control.lr == rate].set_index("seed")
        paired = runs.set_index("seed")
        for nfe in (1, 2):
            metric = {name: f"test{nfe}_{name}" for name in ("judge", "fd", "recall")}
            above = paired[metric["judge"]] - paired.teacher_judge
            judge, recall = ((paired[metric[name]] - plain[metric[name]]).dropna() for name in ("judge", "recall"))
            distance = np.log(paired[metric["fd"]] / plain[metric["fd"]]).dropna()
            first = f"{rate:.0e} | {len(runs)} | {share(runs.diverged)} | {runs.norm_ratio.max():.2g}"
            lines.append(
                f"| {first if nfe == 1 else ' | | | '} | {nfe} | {mean_t(above)} | {mean_t(judge)} "
                f"| {factor(mean_t(distance), math.e, 3)} | {mean_t(recall)} "
                f"| {'yes' if _no_worse(mean_t(distance), mean_t(recall)) else 'not shown'} |"
            )
    return {
        "recipe": "\n".join(lines),
        "recipe_broken": share(recipe.diverged),
        "recipe_seeds": str(recipe.seed.nunique()),
        "control_seeds": str(control.seed.nunique()),
    }


def _no_worse(distance: Interval, recall: Interval) -> bool:
    """As declared in the study's file: within 5 % of the Fréchet distance (here its logarithm) and 0.02 of recall."""
    return distance.high <= math.log(1.05) and recall.low >= -0.02


def sensitivity_values(trials: pd.DataFrame) -> dict[str, str]:
    """The recipe with one setting changed, paired by seed with the recipe itself at the same rate."""
    chosen = trials[trials.study == "sensitivity"]
    rate = chosen.lr.iloc[0]
    recipe = trials[(trials.study == "recommended") & (trials.lr == rate)].set_index("seed")
    lines = [
        "| changed | fell apart | largest norm ÷ usual (most) | held-out judge − teacher's, 1 NFE "
        "| judge − the recipe's | Fréchet distance ×, 1 NFE | 2 NFE | recall − the recipe's, 1 NFE |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, found in chosen.groupby("arm", sort=False):
        runs = found.set_index("seed")
        base = recipe.loc[runs.index]
        ratios = [np.log(runs[f"test{nfe}_fd"] / base[f"test{nfe}_fd"]) for nfe in (1, 2)]
        distance = [factor(mean_t(ratio), math.e, 3) for ratio in ratios]
        lines.append(
            f"| {name} | {share(found.diverged)} | {number(found.norm_ratio.max(), 2)} "
            f"| {mean_t(runs.test1_judge - runs.teacher_judge)} | {mean_t(runs.test1_judge - base.test1_judge)} "
            f"| {distance[0]} | {distance[1]} | {mean_t(runs.test1_recall - base.test1_recall)} |"
        )
    return {
        "sensitivity": "\n".join(lines),
        "sensitivity_seeds": str(chosen.seed.nunique()),
        "sensitivity_broken": share(chosen.diverged),
    }
