"""Findings of a study as clauses, from which the one-sentence answer and the first box of its page are made.

First whether anything happened, then what explains it: two levels that only matter where they meet, single factors, or
that it is not told apart. A clause begins in lower case and has no full stop.
"""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis import traces as tracing
from analysis.effects import Effect
from analysis.factor_page import PAIR, FactorSection
from analysis.falls import Together
from analysis.frames import StudyFrame, higher_is_better
from analysis.intervals import Interval, clopper_pearson, mean_t, number
from analysis.leaderboard import ArmLine, collapses, values_of
from analysis.ledger import ENDED
from analysis.page import percent, share_text
from analysis.traces import StudyTraces

if TYPE_CHECKING:
    import pandas as pd

SMALLEST_P = 0.001
MOST_NAMED = 4  # arms, levels or contrasts that a clause names
WIDEST = 3.0
"""Ratio of the ends of an interval of a ratio beyond which it says nothing."""


# --- words ------------------------------------------------------------------------------------------------


def capital(clause: str) -> str:
    """A clause as a sentence begins; names of factors and metrics stay as they are."""
    first = clause.split()[0].rstrip(":,")
    named = not first.isidentifier() or clause.startswith(f"{first} (")
    return clause if named else f"{clause[0].upper()}{clause[1:]}"


def p_text(value: float) -> str:
    """A p-value for people."""
    return number(value, 2) if value >= SMALLEST_P else f"< {SMALLEST_P:g}"


def p_equals(value: float) -> str:
    """``p = 0.02`` or ``p < 0.001``."""
    return f"p = {p_text(value)}" if value >= SMALLEST_P else f"p {p_text(value)}"


def known(ratio: Interval | None) -> str | None:
    """A ratio with its interval; one whose ends are more than a factor of three apart is not known."""
    if ratio is None:
        return None
    wide = not (ratio.low > 0 and math.isfinite(ratio.high) and ratio.high <= WIDEST * ratio.low)
    return "not known" if wide else str(ratio)


def contrast(effect: Effect) -> str:
    """``teacher (ema instead of live)``."""
    return f"{effect.factor} ({instead(effect)})"


def instead(effect: Effect) -> str:
    """``ema instead of live``."""
    return effect.contrast if "×" in effect.contrast else effect.contrast.replace(" − ", " instead of ", 1)


def verdict(difference: float, higher: bool) -> str:
    """Whether a change of a metric is for the better."""
    return "better" if (difference > 0) == higher else "worse"


def listed(texts: Sequence[str]) -> str:
    """The first of some texts, and how many more there are."""
    more = f" and {len(texts) - MOST_NAMED} more" if len(texts) > MOST_NAMED else ""
    return ", ".join(texts[:MOST_NAMED]) + more


def counted(name: str, count: int, n: int) -> str:
    """``reward in 3 of 4``; the name alone where it is all of them."""
    return name if count == n else f"{name} in {count} of {n}"


def meeting(pair: Together) -> str:
    """``teacher=live and reward=with``."""
    return " and ".join(f"{factor}={level}" for factor, level in pair.levels.items())


# --- falls ------------------------------------------------------------------------------------------------


def fell(study: StudyFrame, factors: FactorSection) -> str:
    """Which runs fell, when, and what decides it."""
    count, n = int(study.trials["diverged"].sum()), len(study.trials)
    if not count:
        return f"no run fell (0 of {n}, so rates up to {percent(clopper_pearson(0, n).high)} remain possible)"
    if count == n:
        return f"every run fell (all {n}), {when(study.trials)}{_not_alike(study, factors)}"
    if pairs := factors.falls.pairs:
        return "; ".join(map(_met, [study] * len(pairs), pairs))
    if names := list(dict.fromkeys(e.factor for e in factors.falls.alone)):
        levels = " and by ".join(_by_level(study, name) for name in names[:MOST_NAMED])
        return f"which runs fell is decided by {levels}, {when(study.trials)}"
    return f"{_by_arm(study)}, {when(study.trials)}; {_unexplained(factors)}"


def _not_alike(study: StudyFrame, factors: FactorSection) -> str:
    """When the runs of each arm fell, where that differs."""
    arms = factors.falls.arms
    if arms is None or not arms.named:
        return ""
    medians = {arm: float(study.arm(arm)["time"].median()) for arm in study.arms}
    ordered = [f"{arm} at {number(step, 6)}" for arm, step in sorted(medians.items(), key=lambda item: item[1])]
    return f", not alike ({p_equals(arms.p_holm)}): {listed(ordered)}"


def when(trials: "pd.DataFrame") -> str:
    """The step at which falls were seen."""
    lost = trials[trials["diverged"]]
    median, same = statistics.median_low(lost["time"].tolist()), lost["time"].nunique() == 1
    return f"seen at step {number(median, 6)}{'' if same else ' (median)'}"


def _met(study: StudyFrame, pair: Together) -> str:
    mine = np.logical_and.reduce([study.trials[f].astype(str) == level for f, level in pair.levels.items()])
    if pair.falls:
        only = "only" if pair.other_fell == 0 else "hardly but"
        return (
            f"runs fall {only} where {meeting(pair)} meet: {pair.fell} of {pair.runs}, {when(study.trials[mine])}, "
            f"against {pair.other_fell} of {pair.other_runs} elsewhere"
        )
    only = "only" if pair.other_whole == 0 else "hardly but"
    return (
        f"runs stay whole {only} where {meeting(pair)} meet: {pair.fell} of {pair.runs} fell there, against "
        f"{pair.other_fell} of {pair.other_runs} elsewhere, {when(study.trials[~mine])}"
    )


def _by_level(study: StudyFrame, factor: str) -> str:
    """``teacher: live 8 of 8, ema 0 of 8``, the worst level first."""
    if PAIR in factor:
        return factor
    groups = {str(level): mine["diverged"] for level, mine in study.trials.groupby(factor, sort=False)}
    worst = sorted(groups.items(), key=lambda item: -float(item[1].mean()))
    return f"{factor}: {listed([f'{name} {counts(own)}' for name, own in worst])}"


def counts(diverged: "pd.Series") -> str:
    """``3 of 8``."""
    return f"{int(diverged.sum())} of {len(diverged)}"


def _by_arm(study: StudyFrame) -> str:
    by_arm = {arm: study.arm(arm)["diverged"] for arm in study.arms}
    lost = sorted((arm for arm in by_arm if by_arm[arm].any()), key=lambda arm: -float(by_arm[arm].mean()))
    whole = sum(len(own) for own in by_arm.values() if not own.any())
    others = f", none of the {whole} in other arms" if whole else ""
    return f"fell: {listed([f'{arm} {counts(by_arm[arm])}' for arm in lost])}{others}"


def _unexplained(factors: FactorSection) -> str:
    arms = factors.falls.arms
    if arms is None or not arms.named:
        p = f" ({p_equals(arms.p_holm)})" if arms else ""
        return f"that arms differ in this is not shown{p}"
    apart = "; what makes it is not told apart" if factors.odds else ""
    return f"the arms differ in this ({p_equals(arms.p_holm)}){apart}"


def led(study: StudyFrame, traces: StudyTraces) -> str:
    """Which term's norm rose first in the runs that fell, and by how much; empty where nothing is known."""
    lost = [traces.runs[k] for k in study.trials.index[study.trials["diverged"]] if k in traces.runs]
    lost = [trace for trace in lost if len(trace.raw) > 1]
    if not lost:
        return ""
    if not (found := tracing.leaders(lost)):
        return "no term's gradient norm had left its level before"
    term, rises = found[0]
    times = float(np.median([rise.times for rise in rises]))
    text = f"the gradient of {term} rose first in {len(rises)} of {len(lost)} (to {_times(times)} its usual norm"
    leads = [rise.lead for rise in rises if not math.isnan(rise.lead)]
    text += f", {lead_text(float(np.median(leads)))})" if leads else ")"
    others = [f"{name} in {len(own)}" for name, own in found[1:]]
    if none := len(lost) - sum(len(own) for _, own in found):
        others.append(f"in {none} none left its level")
    return text + (f", {listed(others)}" if others else "")


def _times(value: float) -> str:
    return f"{number(value, 2)} times" if math.isfinite(value) else "infinitely many times"


def lead_text(steps: float) -> str:
    """How many steps before, or after, the total."""
    if not steps:
        return "in one step with the total"
    return f"{number(abs(steps), 3)} step{'s' * (abs(steps) != 1)} {'before' if steps > 0 else 'after'} the total"


# --- the metric -------------------------------------------------------------------------------------------


def metric_changed(
    study: StudyFrame, metric: str, lines: Sequence[ArmLine], factors: FactorSection, briefly: bool = False
) -> str:
    """What was found to change the metric.

    Arguments:
        briefly: leave out what the falls say by themselves: a run that fell has the worst value.
    """
    if len(study.arms) < 2:
        return ""
    told = [*_pairs_told(study, metric, factors, briefly), *_alone_told(metric, factors, briefly)]
    if told:
        return "; ".join(told)
    if briefly and (factors.pairs or factors.alone):
        return ""
    if factors.metric and factors.metric[0].seeds == 1:
        largest = _changes(factors.metric[0], metric, factors)
        return f"one seed names no factor; in it, and perhaps in it alone, {largest}"
    if factors.arms is not None and factors.arms.named:
        apart = "; what makes it is not told apart" if factors.metric else ""
        return f"the arms differ in {metric} ({p_equals(factors.arms.p_holm)}){apart}{_singled(study, lines)}"
    if singled := _singled(study, lines):
        return f"{metric}{singled}"
    if not lines and not factors.metric:
        return f"there is no ranking by {metric} yet"
    return f"no arm is found to differ in {metric} beyond chance{_nearest(factors)}"


def _nearest(factors: FactorSection) -> str:
    tested = [*factors.metric, *([factors.arms] if factors.arms else [])]
    if not tested:
        return ""
    first = min(tested, key=lambda effect: effect.p)
    return f" ({f'nearest: {first.factor}, ' if factors.metric else ''}{p_equals(first.p_holm)})"


def _singled(study: StudyFrame, lines: Sequence[ArmLine]) -> str:
    """Arms that differ from the base by themselves."""
    found = [line for line in lines if line.p_holm < 0.05 and line.better]
    words = {word: [line.arm for line in found if line.better and sign * (line.better.estimate - 0.5) > 0]
             for word, sign in (("better", 1), ("worse", -1))}  # fmt: skip
    texts = [f"{word} than {study.base}: {listed(arms)}" for word, arms in words.items() if arms]
    return f"; {'; '.join(texts)}" if texts else ""


def clear(effects: Sequence[Effect]) -> list[Effect]:
    """Contrasts whose own interval excludes no effect."""
    return [e for e in effects if not e.interval.low <= 0 <= e.interval.high]


def _alone_told(metric: str, factors: FactorSection, briefly: bool) -> list[str]:
    decided = {e.factor for e in factors.falls.alone}.union(*(pair.factors for pair in factors.falls.pairs))
    alone = [e for e in factors.alone if not (briefly and e.factor in decided)]
    found = clear(alone)
    blurred = list(dict.fromkeys(e.factor for e in alone if e.factor not in {one.factor for one in found}))
    texts = [_changes(effect, metric, factors) for effect in found[:MOST_NAMED]]
    texts += [f"and {len(found) - MOST_NAMED} more contrasts"] if len(found) > MOST_NAMED else []
    return texts + [f"{name} matters, though no level by itself stands out from its reference" for name in blurred]


def _changes(effect: Effect, metric: str, factors: FactorSection) -> str:
    better = verdict(effect.interval.estimate, higher_is_better(metric))
    if effect.scale != "ranks":
        return f"{contrast(effect)} changes {metric} by {effect.interval} ({better})"
    ends = [factors.medians.get((effect.factor, level), math.nan) for level in effect.contrast.split(" − ")]
    medians = "" if any(map(math.isnan, ends)) else f", medians {' against '.join(map(_median, ends))}"
    return (
        f"{contrast(effect)} moves a run's rank in {metric} by {effect.interval} of {effect.interval.n}{medians} "
        f"({better})"
    )


def _median(value: float) -> str:
    return number(value) if math.isfinite(value) else "a fallen run's"


def _pairs_told(study: StudyFrame, metric: str, factors: FactorSection, briefly: bool) -> list[str]:
    decided = {pair.factors for pair in factors.falls.pairs}
    names = [name for name in dict.fromkeys(e.factor for e in factors.pairs)
             if not (briefly and frozenset(name.split(PAIR)) in decided)]  # fmt: skip
    return [f"{metric} depends on {' and '.join(name.split(PAIR))} together: "
            f"{_simple(study, metric, name.split(PAIR))}" for name in names[:MOST_NAMED]]  # fmt: skip


def _simple(study: StudyFrame, metric: str, pair: Sequence[str]) -> str:
    """What one factor changes at each level of the other; of more than two levels the ends of the table of means."""
    ended = study.trials[study.trials["status"].isin(ENDED)]
    ended = ended.assign(value=values_of(ended, metric).to_numpy())
    first, second = pair
    low, *others = dict.fromkeys(ended[first].astype(str))
    if len(others) > 1 or ended[second].nunique() > 2 or not np.isfinite(ended["value"]).all():
        return _ends(ended, pair)
    texts = []
    for level, rows in ended.groupby(ended[second].astype(str), sort=False):
        table = rows.pivot_table("value", "seed", rows[first].astype(str))
        change = mean_t((table[others[0]] - table[low]).dropna().to_numpy())
        better = f" ({verdict(change.estimate, higher_is_better(metric))})" if change.low * change.high > 0 else ""
        texts.append(f"{change}{better} at {second}={level}")
    return f"{first} ({others[0]} instead of {low}) changes it by {', by '.join(texts)}"


def _ends(ended: "pd.DataFrame", pair: Sequence[str]) -> str:
    """The lowest and the highest cell by their medians."""
    medians = ended.assign(**{name: ended[name].astype(str) for name in pair}).groupby(list(pair))["value"].median()
    named = [(" ".join(f"{f}={level}" for f, level in zip(pair, cell, strict=True)), float(value))
             for cell, value in medians.sort_values(kind="stable").items()]  # fmt: skip
    (lowest, low), (highest, high) = named[0], named[-1]
    return f"lowest with {lowest} (median {_median(low)}), highest with {highest} ({_median(high)})"


def idle(study: StudyFrame, factors: FactorSection) -> str:
    """The factors that nothing was found of, where others were found; empty if there are none."""
    met = [*(pair.factors for pair in factors.falls.pairs), *(e.factor.split(PAIR) for e in factors.pairs)]
    matter = {e.factor for e in (*factors.alone, *factors.falls.alone)}.union(*met)
    quiet = [name for name in study.factors if name not in matter]
    if not matter or not quiet:
        return ""
    return f"not found to matter: {listed(quiet)}"


# --- what else a reader must know -------------------------------------------------------------------------


def lost_prompts(study: StudyFrame) -> str:
    """Prompts that are gone in runs that did not fall; empty if there are none."""
    table = collapses(study)
    hit = table[table["collapsed"] > 0]
    arms = [f"{row.arm} in {row.collapsed} of {row.runs} runs ({row.prompts})" for row in hit.itertuples()]
    return f"prompts are lost in runs that did not fall: {listed(arms)}" if arms else ""


def unwatched(study: StudyFrame) -> str:
    """Whether a fall could be seen in every arm; empty if so, or if the configurations are gone."""
    blind = [arm for arm in study.arms for k in study.arm(arm).index[:1]
             if k in study.runs and not _evaluations(study, k)]  # fmt: skip
    if not blind:
        return ""
    where = "in no arm" if len(blind) == len(study.arms) else f"not in {listed(blind)}"
    return f"a fall could be seen {where}: runs were judged at their end alone (evaluation.every)"


def _evaluations(study: StudyFrame, k: int) -> int:
    """Evaluations of a run before its last step; some where its configuration does not say."""
    every = (study.runs[k].config.get("evaluation") or {}).get("every")
    if every is None:
        return 1
    return (int(study.trials.loc[k, "planned"]) - 1) // int(every) if int(every) > 0 else 0


def rules(study: StudyFrame, traces: StudyTraces) -> str:
    """What the gradient rules did, arm by arm; empty where there were none."""
    did: dict[str, list[str]] = {}
    never: dict[str, list[str]] = {}
    for row in tracing.rules_table(study, traces).to_dict("records"):
        arm, gradient, factor = str(row["arm"]), str(row["gradient"]), float(row["median factor"])
        if math.isnan(factor):
            never.setdefault(gradient, []).append(arm)
            continue
        steps = f"{share_text(row['share of steps'])} of the steps"
        did.setdefault(gradient, []).append(f"{arm} in {steps} (median factor {number(factor, 2)})")
    texts = [f"on {gradient}: {listed(arms)}" for gradient, arms in did.items()]
    return "; ".join(texts + [f"on {gradient}, never: {listed(arms)}" for gradient, arms in never.items()])
