"""What crossed factors do, from the autopsy's table of trials: many suspects at once, and pairs of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from autopsy_arms import COLUMNS, RULE, WELL, arm_line, before_reward, factor, paired_p, share
from autopsy_runs import BROKEN, MARGIN, NO_REWARD, arms
from matplotlib.figure import Figure

from ablations.study import Margin, Study, load
from analysis import plots
from analysis.effects import Effect, main_effects, odds_effects
from analysis.intervals import Interval, clopper_pearson, mean_t, number
from analysis.margins import Critical, critical_rate, critical_rates, margin
from analysis.survival import hazard_ratio, times_of

# --- fifteen suspects at once ------------------------------------------------------------------------------

FELL, STEP, NORM = "diverged", "step of the fall", "largest norm"


def screened(trials: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, object]]:
    """The screening's runs with a column for each suspect's level, and each suspect's published level."""
    runs = trials[trials.study == "screening"]
    asked = arms("screening")
    levels = pd.DataFrame([asked[made].levels for made in runs.config_hash], index=runs.index)
    norm = runs.norm_ratio.fillna(runs.norm_max / runs.usual_norm)  # it may have ended before the reward
    outcomes = {STEP: runs.diverged_step.fillna(math.inf), NORM: norm}
    reference = next(iter(asked.values())).levels  # the first arm's
    return pd.concat([runs[["seed", FELL]], levels, pd.DataFrame(outcomes)], axis=1), dict(reference)


def screening_effects(trials: pd.DataFrame) -> dict[str, list[Effect]]:
    """Outcome → effects of all suspects on it: log odds of a fall, ranks of its step and of the largest norm."""
    runs, published = screened(trials)
    found = {FELL: odds_effects(runs, list(published), reference=published)}
    ranked = {
        outcome: main_effects(runs, outcome, list(published), reference=published, ranks=True)
        for outcome in (STEP, NORM)
    }
    return found | ranked


def screening_values(trials: pd.DataFrame) -> dict[str, str]:
    """The screening's table and the suspects that each outcome names."""
    runs, published = screened(trials)
    effects = screening_effects(trials)
    p = {outcome: {effect.factor: effect.p_holm for effect in found} for outcome, found in effects.items()}
    lines = [
        "| suspect | published, other level | fell apart as published | at the other level | odds × | p (Holm): a fall "
        "| its step | largest norm |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for effect in effects[FELL]:
        name = effect.factor
        other = next(level for level in runs[name].unique() if level != published[name])
        fell = [_of(runs[runs[name] == level][FELL]) for level in (published[name], other)]
        corrected = [_p(p[outcome][name]) for outcome in (FELL, STEP, NORM)]
        lines.append(
            f"| {_words(name)} | {_words(str(published[name]))}, {_words(other)} | {' | '.join(fell)} "
            f"| {factor(effect.interval, math.e)} | {' | '.join(corrected)} |"
        )
    itself = (runs[list(published)] == pd.Series(published)).all(axis=1)
    named = {outcome: [_words(e.factor) for e in found if e.named] for outcome, found in effects.items()}
    return {
        "screening": "\n".join(lines),
        "screening_seeds": str(runs.seed.nunique()),
        "screening_broken": share(runs[FELL]),
        "screening_itself": _of(runs[itself][FELL]),
        "screening_others": _of(runs[~itself][FELL]),
        "screening_unguided": _of(runs[runs.guidance == "0"][FELL]),
        "screening_decoded": _of(runs[runs.baseline == "decoded"][FELL]),
        "screening_float32": number(runs[runs.precision == "float32"][NORM].median(), 2),
        "screening_bf16": number(runs[runs.precision == "bf16"][NORM].median(), 2),
        "screening_fell": ", ".join(named[FELL]) or "none",
        "screening_step": ", ".join(named[STEP]) or "none",
        "screening_norm": ", ".join(named[NORM]) or "none",
    }


def screening_figure(trials: pd.DataFrame) -> Figure:
    """Each suspect's log odds ratio of a fall, its other level against the published one."""
    effects = screening_effects(trials)[FELL]
    return plots.effects(effects, "log odds of falling apart, other level − published")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _of(yes: pd.Series) -> str:
    return f"{int(yes.sum())} of {len(yes)}"


def _p(value: float) -> str:
    return f"**{value:.1g}**" if value < 0.05 else f"{value:.2g}"


# --- pairs of factors --------------------------------------------------------------------------------------


FROM_CORRECTED = COLUMNS.replace("before the reward", "in the first fifth")
"""Columns where the arms' rewards start at different steps."""


def crossed_table(runs: pd.DataFrame, factors: Sequence[str], columns: str = COLUMNS) -> str:
    """One line for each combination of levels."""
    lines = [f"| {' | '.join(factors)} | seeds | {columns} |", f"|{'---|' * len(factors)}--:|{RULE}"]
    for levels, found in runs.groupby([f"level.{name}" for name in factors], sort=False):
        lines.append(f"| {' | '.join(levels)} | {len(found)} | {arm_line(found)} |")
    return "\n".join(lines)


def causes_values(trials: pd.DataFrame) -> dict[str, str]:
    """The corrected recipe with the published teacher, the published reward, and both."""
    return {"causes": crossed_table(trials[trials.study == "causes"], ["teacher", "reward"], FROM_CORRECTED)}


CORRECTED_START = 0.3
"""Share of the run at which the reward of `corrected` starts: where renoise ends."""
CLIPPED_BASE = ("ema", "corrected")
"""Levels of the arm of autopsy-clipped that has nothing published: teacher, reward."""


def clipped_values(trials: pd.DataFrame) -> dict[str, str]:
    """The same with a clip of the rectify term; the study's rule for a cause is that the intervals lie apart."""
    clipped = trials[trials.study == "clipped"]
    arms_of = {levels: found.set_index("seed") for levels, found in clipped.groupby(["level.teacher", "level.reward"])}
    base = arms_of.pop(CLIPPED_BASE)
    bound = clopper_pearson(int(base.diverged.sum()), len(base)).high
    values = {
        "clipped": crossed_table(clipped, ["teacher", "reward"], FROM_CORRECTED),
        "clipped_seeds": str(len(base)),
        "clipped_base": share(base.diverged),
    }
    for (teacher, reward), found in arms_of.items():
        low = clopper_pearson(int(found.diverged.sum()), len(found)).low
        values |= {
            f"clipped_{teacher}_{reward}": share(found.diverged),
            f"clipped_{teacher}_{reward}_p": paired_p(found.diverged, base.diverged),
            f"clipped_{teacher}_{reward}_verdict": "a cause" if low > bound else "not shown to be a cause",
        }
    live, averaged, alone = arms_of["live", "published"], arms_of["ema", "published"], arms_of["live", "corrected"]
    fell = clipped[clipped.diverged]
    quality = np.log(averaged.final_fd / base.final_fd)
    begun = alone.diverged_step[alone.diverged] <= CORRECTED_START * alone.steps[alone.diverged]
    return values | {
        "clipped_live_begun": _of(begun),
        "clipped_accuracies": f"{fell.final_accuracy.min():.2f} to {fell.final_accuracy.max():.2f}",
        "clipped_live_unwell": _of(live.accuracy_at_start < WELL),
        "clipped_fell_norm": number(fell.norm_ratio_whole.max(), 2),
        "clipped_whole_norm": number(clipped[~clipped.diverged].norm_ratio_whole.max(), 2),
        "clipped_reward_p": paired_p(live.diverged, alone.diverged),
        "clipped_reward_fd": factor(mean_t(quality), math.e, 3),
        "clipped_reward_hps": str(mean_t(averaged.final_lab_hps - base.final_lab_hps)),
    }


LEVELS = ("with", "without")
"""Of the reward."""


def interaction_values(trials: pd.DataFrame) -> dict[str, str]:
    """Teacher × reward on the share of falls; and what the reward does to the hazard of a fall after its start, with
    dynamic renoise and with uniform times. Arms share seeds; the intervals do not use that.
    """
    made = trials[trials.study == "interactions"]
    shared = trials[trials.config_hash.isin(made.config_hash)].drop_duplicates(["config_hash", "seed"], keep="last")
    level = made.drop_duplicates("config_hash").set_index("config_hash")["level.reward"]
    uniform = shared.assign(**{"level.renoise": "uniform", "level.reward": shared.config_hash.map(level)})
    regime = trials[(trials.study == "regime") & trials.arm.isin((BROKEN, NO_REWARD))]
    runs = pd.concat([regime.assign(**{"level.renoise": "dynamic"}), uniform])
    runs = runs.assign(time=runs.diverged_step.fillna(runs.steps))
    later = runs[~before_reward(runs)]  # alike with the reward and without, which are the same runs until then
    ratios = {}
    for renoise, found in later.groupby("level.renoise"):
        with_reward, without = (times_of(found[found["level.reward"] == reward]) for reward in LEVELS)
        ratios[renoise] = hazard_ratio(with_reward, without)
    crossed = difference(*(log_of(ratios[renoise]) for renoise in ("dynamic", "uniform")))
    return {
        "teacher_reward": str(teacher_reward(trials[trials.study == "regime"])),
        "interactions": crossed_table(runs, ["renoise", "reward"]),
        "interaction": factor(crossed, math.e),
        "interaction_verdict": "interact" if crossed.low > 0 or crossed.high < 0 else "are not shown to interact",
        "interaction_seeds": str(uniform.seed.nunique()),
        **{f"hazard_{renoise}": str(ratio) for renoise, ratio in ratios.items()},
        **{f"at_risk_{renoise}": str(len(found) // 2) for renoise, found in later.groupby("level.renoise")},
    }


def teacher_reward(regime: pd.DataFrame) -> Interval:
    """By how much more the reward raises the share of falls under a live teacher than under an EMA."""
    fell = {arm: clopper_pearson(int(yes.sum()), len(yes)) for arm, yes in regime.groupby("arm").diverged}
    live, ema = (
        difference(*(fell[f"reward={reward} teacher={teacher}"] for reward in LEVELS)) for teacher in ("live", "ema")
    )
    return difference(live, ema)


def log_of(ratio: Interval) -> Interval:
    """The interval of a ratio as one of its logarithm."""
    estimate, low, high = (math.log(x) if x else -math.inf for x in (ratio.estimate, ratio.low, ratio.high))
    return Interval(estimate, low, high, ratio.n, ratio.method, ratio.level)


def difference(a: Interval, b: Interval) -> Interval:
    """a − b of independent estimates whose intervals may be lopsided (MOVER; Zou and Donner 2008)."""
    estimate = a.estimate - b.estimate
    low = estimate - math.hypot(a.estimate - a.low, b.high - b.estimate)
    high = estimate + math.hypot(a.high - a.estimate, b.estimate - b.low)
    return Interval(estimate, low, high, min(a.n, b.n), "MOVER", a.level)


# --- learning rate × teacher × reward ----------------------------------------------------------------------


@dataclass(frozen=True)
class Brackets:
    """The critical learning rates of the study that searched for them by bisection.

    Attributes:
        study: as it was asked for.
        probes: its runs, with the rate ``lr`` beside the arm.
        found: (arm, seed) → where the rate lies.
    """

    study: Study
    probes: pd.DataFrame
    found: Mapping[tuple[str, int], Critical]

    @classmethod
    def of(cls, trials: pd.DataFrame) -> "Brackets":
        """Raises ValueError where an arm has no rate at a seed."""
        study = load(f"autopsy-{MARGIN}")
        probes = trials[trials.study == MARGIN].copy()
        probes["arm"] = probes.arm.str.rpartition(" lr=")[0]
        found = {(rate.arm, rate.seed): rate for rate in critical_rates(probes, "lr")}
        if set(found) != {(arm.name, seed) for arm in study.arms for seed in study.config.seeds}:
            raise ValueError(f"autopsy-{MARGIN} is not finished: a bracket is missing")
        return cls(study, probes, found)

    @cached_property
    def wide(self) -> set[tuple[str, int]]:
        """Where a run was told otherwise after the search had ended."""
        return {key for key, rate in self.found.items() if not _ended(rate, self.study.config.margin)}

    @property
    def searched(self) -> list[int]:
        """The seeds whose brackets are all narrow."""
        asked, fallen = self.study.config.seeds, {seed for _, seed in self.wide}
        return [seed for seed in asked if seed not in fallen]

    def rates(self, teacher: str, reward: str, seeds: Sequence[int] | None = None) -> list[Critical]:
        """By seed; of all seeds for None."""
        arm = f"teacher={teacher} reward={reward}"
        return [self.found[arm, seed] for seed in (self.study.config.seeds if seeds is None else seeds)]

    def table(self) -> str:
        """A line for each arm: its rate at every seed, and their geometric mean where all are narrow."""
        lines = ["| teacher, reward | critical learning rate, by seed | geometric mean |", "|---|---|--:|"]
        for arm in self.study.arms:
            mine = [self.found[arm.name, seed] for seed in self.study.config.seeds]
            narrow = all(rate.bracketed and (rate.arm, rate.seed) not in self.wide for rate in mine)
            mean = critical_rate(mine, arm.name) if narrow else None
            ends = [_rate(2**log) for log in (mean.estimate, mean.low, mean.high)] if mean is not None else []
            shown = f"{ends[0]} [{ends[1]}, {ends[2]}]" if ends else "–"
            each = [_critical(rate, (rate.arm, rate.seed) in self.wide) for rate in mine]
            lines.append(f"| {arm.name} | {', '.join(each)} | {shown} |")
        return "\n".join(lines)


def margin_values(trials: pd.DataFrame) -> dict[str, str]:
    """The critical learning rate of each teacher, with the published reward and without it, by bisection."""
    brackets = Brackets.of(trials)
    probes, searched, live = brackets.probes, brackets.searched, [brackets.rates("live", level) for level in LEVELS]
    lowered = margin([rate for rates in live for rate in rates], *(f"teacher=live reward={level}" for level in LEVELS))
    ema = [[(rate.healthy, rate.broken) for rate in brackets.rates("ema", level, searched)] for level in LEVELS]
    same = [a == b for a, b in zip(*ema, strict=True)]
    high = brackets.study.config.margin.high
    fallen = probes[probes.arm.str.startswith("teacher=ema") & (probes.lr == high) & ~probes.seed.isin(searched)]
    lived = brackets.rates("live", "without")[0].healthy
    below = probes[(probes.arm == "teacher=live reward=without") & (probes.lr < lived)]
    widths = [rate.width for key, rate in brackets.found.items() if key not in brackets.wide]
    return {
        "margin": brackets.table(),
        "margin_probes": str(len(probes)),
        "margin_tolerance": number(2 ** max(widths), 3),
        "margin_fallen_seeds": str(fallen.seed.nunique()),
        "margin_fallen_start": _span(fallen.accuracy_at_start),
        "margin_fallen_end": _span(fallen.test1_accuracy),
        "margin_below": _span(below.test1_accuracy),
        "margin_seeds": str(len(brackets.study.config.seeds)),
        "margin_reward_live": factor(lowered, 2),
        "margin_reward_live_verdict": f"{'' if lowered.high < 0 else 'not shown to be '}closer to the edge",
        "margin_reward_ema_same": f"{sum(same)} of {len(same)}",
        **{
            f"margin_teacher_{level}": _at_least(
                *(brackets.rates(teacher, level, searched) for teacher in ("ema", "live"))
            )
            for level in LEVELS
        },
    }


def _span(values: pd.Series) -> str:
    low, high = (f"{value:.2f}" for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def _ended(rate: Critical, asked: Margin) -> bool:
    """Whether the search has ended: in a bracket as narrow as asked, or at an end of the rates asked for."""
    if rate.bracketed:
        return rate.width <= math.log2(asked.tolerance)
    return rate.healthy >= asked.high or rate.broken <= asked.low


def _at_least(rates: Sequence[Critical], base: Sequence[Critical]) -> str:
    """How many times the base's critical rate a rate is in every seed, whatever lies inside the brackets."""
    return number(min(mine.healthy / theirs.broken for mine, theirs in zip(rates, base, strict=True)), 3)


def _critical(rate: Critical, wide: bool) -> str:
    if wide:
        return f"{_rate(rate.healthy)} to {_rate(rate.broken)}"
    if rate.healthy == 0:
        return f"< {_rate(rate.broken)}"
    return _rate(2**rate.log2) if rate.bracketed else f"> {_rate(rate.healthy)}"


def _rate(rate: float) -> str:
    digits, _, power = f"{rate:.1e}".partition("e")
    return f"{digits}e{int(power)}"
