"""The top of a study's page: which factor, how sure, what it costs. Everything else on the page is evidence.

Sentences are made from the same effects and lines as the sections below them. Something is said to have an effect
only where it is found at 5 % family-wise; what is not found comes with what the data leave possible.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis.effects import Effect
from analysis.factor_page import FactorSection, estimate, match, ratio
from analysis.frames import StudyFrame, higher_is_better
from analysis.intervals import Interval, clopper_pearson, fewest_seeds, mean_t, number, seeds_needed
from analysis.leaderboard import PAIRED_FROM, ArmLine, TooFewSeedsError, leaderboard
from analysis.ledger import ENDED
from analysis.page import Facts, Heading, PageBlock, Table, Text, percent
from twinrl.run import names

if TYPE_CHECKING:
    import pandas as pd

SMALLEST_P = 0.001
MOST_NAMED = 4  # contrasts that a sentence names


def sentence(study: StudyFrame, metric: str | None = None, interactions: Sequence[tuple[str, str]] = ()) -> str:
    """What a study has found, in one sentence of plain text.

    Arguments:
        study: of :func:`analysis.frames.load_study`.
        metric: what arms are ranked by; default: the study's own, else ``val/quality``.
        interactions: pairs of factors that are asked about, besides those that the design can tell by itself.

    Raises:
        InputError: no run logged the metric, or the runs cannot be compared.

    *When to use*: at the end of a study, in a terminal. The page's first line is the same.
    """
    metric = metric or study.metric or names.VAL_QUALITY
    try:
        lines = leaderboard(study, metric)
    except TooFewSeedsError:
        lines = []
    return which(study, metric, lines, estimate(study, metric, interactions))


def blocks(
    study: StudyFrame, metric: str, lines: Sequence[ArmLine], factors: FactorSection, effect: float
) -> list[PageBlock]:
    """The answer's blocks.

    Arguments:
        lines: of the leaderboard; empty where there is no ranking. factors: their effects.
        effect: difference worth finding, in standard deviations of paired differences.
    """
    question: list[PageBlock] = [Text(study.question)] if study.question else []
    glance = factor_table(study, metric, factors) if factors.metric else arm_table(study, lines)
    table: list[PageBlock] = [Table(glance, "glance")] if glance is not None else []
    told = Facts(facts(study, metric, lines, factors, effect))
    return [*question, told, *table, Text(INTERVALS_NOTE, note=True), *_left_out(study), Heading("The evidence")]


def facts(
    study: StudyFrame, metric: str, lines: Sequence[ArmLine], factors: FactorSection, effect: float = 1.0
) -> list[tuple[str, str]]:
    """The questions and their answers; arguments as for :func:`blocks`."""
    made = [("Made by what?", study.note)] if study.note else []
    return [
        ("Which factor?", which(study, metric, lines, factors)),
        ("How sure?", sure(study, metric, lines, factors, effect)),
        ("What does it cost?", costs(study, factors)),
        *made,
    ]


INTERVALS_NOTE = (
    "Intervals: 95 %. ★: found at 5 %, over all factors (or arms) together (Holm), each outcome by itself. Time a "
    "step: training alone, without validation; compare it only between runs of one machine."
)


def _left_out(study: StudyFrame) -> list[PageBlock]:
    left = study.trials[~study.trials["status"].isin(ENDED)]["status"].value_counts()
    if not len(left):
        return []
    counted = ", ".join(f"{count} {status}" for status, count in left.items())
    return [Text(f"Not ranked, but counted as watched until their last step: {counted}.", note=True)]


# --- which ------------------------------------------------------------------------------------------------


def which(study: StudyFrame, metric: str, lines: Sequence[ArmLine], factors: FactorSection) -> str:
    """What was found to change the metric and the divergence."""
    by_metric = _by_factors(metric, factors) if factors.metric else _by_arms(study, metric, lines)
    return f"{by_metric} {_divergence(study, factors)}{_first(study, lines)}"


def _first(study: StudyFrame, lines: Sequence[ArmLine]) -> str:
    """The arm that leads the ranking, beside the base."""
    if not lines:
        return ""
    base = next(line for line in lines if line.arm == study.base)
    if lines[0] is base:
        return f" First of the arms is the base: {base.interval}."
    return f" First of the arms is {lines[0].arm}: {lines[0].interval}; the base has {base.interval}."


def _by_factors(metric: str, factors: FactorSection) -> str:
    if not any(effect.named for effect in factors.metric):
        first = factors.metric[0]
        if first.seeds == 1:
            largest = f"{_contrast(first)} {_change(first, metric, factors)}"
            return f"One seed names none; in it, and perhaps in it alone, {largest}."
        nearest = f"nearest: {first.factor}, p = {number(first.p_holm)}"
        return f"None is found to change {metric} beyond chance ({nearest})."
    found, higher = clear(factors.metric), higher_is_better(metric)
    texts = [f"{_contrast(e)} {_change(e, metric, factors)} ({_verdict(e.interval, higher)})"
             for e in found[:MOST_NAMED]]  # fmt: skip
    blurred = {e.factor for e in factors.metric if e.named} - {e.factor for e in found}
    texts += [f"{factor} matters, though no level by itself stands out from its reference" for factor in blurred]
    return f"{'; '.join(texts)}{_more(found)}."


def clear(effects: Sequence[Effect]) -> list[Effect]:
    """Contrasts of the factors that were found whose own interval excludes no effect."""
    return [e for e in effects if e.named and not e.interval.low <= 0 <= e.interval.high]


def _more(found: Sequence[Effect]) -> str:
    return f"; and {len(found) - MOST_NAMED} more contrasts" if len(found) > MOST_NAMED else ""


def _contrast(effect: Effect) -> str:
    """``teacher (ema instead of live)``."""
    words = effect.contrast if "×" in effect.contrast else effect.contrast.replace(" − ", " instead of ", 1)
    return f"{effect.factor} ({words})"


def _change(effect: Effect, metric: str, factors: FactorSection) -> str:
    if effect.scale == "ranks":
        ends = [factors.medians.get((effect.factor, level), math.nan) for level in effect.contrast.split(" − ")]
        medians = "" if any(map(math.isnan, ends)) else f", medians {' against '.join(map(number, ends))}"
        return f"moves a run's rank in {metric} by {effect.interval} of {effect.interval.n}{medians}"
    return f"changes {metric} by {effect.interval}"


def _verdict(interval: Interval, higher: bool) -> str:
    return "better" if bool(interval.estimate > 0) == higher else "worse"


def _by_arms(study: StudyFrame, metric: str, lines: Sequence[ArmLine]) -> str:
    if not lines:
        return f"There is no ranking by {metric} yet."
    found = [line for line in lines if line.p_holm < 0.05 and line.better]
    groups = {word: [line.arm for line in found if line.better and sign * (line.better.estimate - 0.5) > 0]
              for word, sign in (("Better", 1), ("worse", -1))}  # fmt: skip
    texts = [f"{word} than {study.base} by {metric}: {', '.join(arms) or 'no arm'}" for word, arms in groups.items()]
    return f"{'; '.join(texts)}."


def _divergence(study: StudyFrame, factors: FactorSection) -> str:
    diverged, n = int(study.trials["diverged"].sum()), len(study.trials)
    if not diverged:
        return f"No run diverged; of all {n}, rates above {percent(clopper_pearson(0, n).high)} are excluded."
    text = f"{diverged} of {n} runs diverged"
    if found := clear(factors.odds):
        changes = [f"{_contrast(e)} multiplies the odds by {ratio(e.interval)}" for e in found[:MOST_NAMED]]
        return f"{text}: {'; '.join(changes)}{_more(found)}."
    if factors.odds:
        first = factors.odds[0]
        return f"{text}; no factor is found to change that (nearest: {first.factor}, p = {number(first.p_holm)})."
    return f"{text}."


# --- how sure ---------------------------------------------------------------------------------------------


def sure(study: StudyFrame, metric: str, lines: Sequence[ArmLine], factors: FactorSection, effect: float) -> str:
    """What stands behind the answer, and what it leaves possible."""
    trials = study.trials
    seeds = trials.groupby("arm")["seed"].nunique()
    span = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    text = f"{len(study.arms)} arms, {span} seed{'s' * (span != '1')} an arm, {trials['planned'].max():,} steps; "
    text += f"base: {study.base}. "
    passed = [e.p_holm for e in (*clear(factors.metric), *clear(factors.odds))]
    if passed:
        text += f"What is named passes at 5 % over all factors together (largest p after Holm: {_p(max(passed))}). "
    missed = [e for e in factors.metric if not e.named and e.scale == "values"]
    if missed and lines:
        worst = max(missed, key=lambda e: max(abs(e.interval.low), abs(e.interval.high)))
        text += f"What is not found is not absent: {_contrast(worst)} may still change {metric} by {worst.interval}. "
    return text + _seeds(study, effect, int(seeds.min()))


def _seeds(study: StudyFrame, effect: float, have: int) -> str:
    """Whether the seeds are enough for the difference that is worth finding."""
    tests = len(study.arms) - 1
    need, least = seeds_needed(effect, tests), fewest_seeds(tests)
    base = set(study.arm(study.base)["seed"])
    common = min(len(base & set(study.arm(arm)["seed"])) for arm in study.arms)
    deviations = f"{effect:g} standard deviation{'s' * (effect != 1)}"
    aim = f"a difference of {deviations} between paired runs of two arms (power 80 %)"
    if PAIRED_FROM <= common < least:
        text = f"With {common} common seeds no difference can pass Wilcoxon's test in {tests} comparisons; {least} "
        return f"{text}seeds could, and {need} find {aim}."
    if have < need:
        return f"To find {aim} takes {need} seeds an arm, {need - have} more."
    return f"The seeds are enough to find {aim}."


# --- cost -------------------------------------------------------------------------------------------------


def costs(study: StudyFrame, factors: FactorSection) -> str:
    """Time and recall that go with the factors that were found, or with the arms."""
    seconds = float(study.trials["seconds"].sum())
    if not seconds > 0:
        return "The runs' times are not known."
    text = f"The whole study took {duration(seconds)} of training. "
    named = list(dict.fromkeys((e.factor, e.contrast) for e in (*clear(factors.metric), *clear(factors.odds))))
    for factor, contrast in named[:MOST_NAMED]:
        if spent := match(factors.time, factor, contrast):
            text += f"{_contrast(spent)}: {ratio(spent.interval)} times the time a step"
            lost = match(factors.recall, factor, contrast)
            values = lost is not None and lost.scale == "values"
            text += f", recall changes by {lost.interval}. " if lost is not None and values else ". "
    if not named:
        slow = {arm: r for arm in study.arms if arm != study.base and (r := time_ratio(study, arm)) is not None}
        if slow:
            arm = max(slow, key=lambda name: slow[name].estimate)
            text += f"The dearest arm, {arm}, takes {slow[arm]} times the base's time a step."
    return text.strip()


def duration(seconds: float) -> str:
    """For people: seconds, minutes or hours."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{number(seconds / length, 2)} {unit}"
    return f"{number(seconds, 2)} seconds"


def _p(value: float) -> str:
    return number(value, 2) if value >= SMALLEST_P else f"< {SMALLEST_P:g}"


def time_ratio(study: StudyFrame, arm: str) -> Interval | None:
    """Time a step over that of the base, paired by seed (geometric mean); None where it is not known."""
    import numpy as np

    per_step = study.trials["seconds"] / study.trials["step"]
    mine, base = (per_step[study.trials["arm"] == name].set_axis(study.arm(name)["seed"]) for name in (arm, study.base))
    logs = np.log((mine / base).to_numpy(float))
    logs = logs[np.isfinite(logs)]
    return ratio(mean_t(logs)) if len(logs) else None


# --- at a glance ------------------------------------------------------------------------------------------


def factor_table(study: StudyFrame, metric: str, factors: FactorSection) -> "pd.DataFrame":
    """One line a contrast: metric, odds of diverging, time and recall."""
    import pandas as pd

    scale = " (ranks)" if factors.metric[0].scale == "ranks" else ""
    lines = []
    for e in factors.metric:
        odds, time, recall = (match(of, e.factor, e.contrast) for of in (factors.odds, factors.time, factors.recall))
        line: dict[str, object] = {
            "factor": e.factor,
            "level − reference": e.contrast,
            f"{metric}{scale}": _starred(e, e.interval),
            "p (Holm)": e.p_holm,
            "odds of diverging ×": _starred(odds, ratio(odds.interval)) if odds else None,
            "time a step ×": str(ratio(time.interval)) if time else None,
        }
        if recall and recall.scale == "values":
            line["recall"] = str(recall.interval)
        lines.append(line)
    return pd.DataFrame(lines)


def _starred(effect: Effect, interval: Interval) -> str:
    return f"{'★ ' if effect.named else ''}{interval}"


def arm_table(study: StudyFrame, lines: Sequence[ArmLine]) -> "pd.DataFrame | None":
    """One line an arm: metric, chance to be better, divergence and time; None without a ranking."""
    import pandas as pd

    if not lines:
        return None
    return pd.DataFrame(
        {
            "arm": line.arm,
            "interquartile mean": f"{'★ ' if line.p_holm < 0.05 else ''}{line.interval}",
            "P(better than the base)": line.better,
            "p (Holm)": None if math.isnan(line.p_holm) else line.p_holm,
            "diverged": f"{line.diverged} of {len(study.arm(line.arm))}",
            "time a step ×": time_ratio(study, line.arm) if line.arm != study.base else None,
        }
        for line in lines
    )
