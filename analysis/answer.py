"""The top of a study's page: the answer in a sentence, then how it comes about. Everything below it is evidence.

Sentences are made from the same effects and lines as the sections below them. Something is said to have an effect
only where it is found at 5 % family-wise; what is not found comes with what the data leave possible.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from analysis import telling
from analysis import traces as tracing
from analysis.effects import Effect
from analysis.factor_page import PAIR, FactorSection, estimate, match, ratio
from analysis.frames import StudyFrame
from analysis.intervals import Interval, fewest_seeds, mean_t, number, seeds_needed
from analysis.leaderboard import PAIRED_FROM, ArmLine, TooFewSeedsError, leaderboard
from analysis.ledger import ENDED
from analysis.page import Facts, Heading, PageBlock, Table, Text
from analysis.telling import MOST_NAMED, clear, contrast, known
from analysis.traces import StudyTraces
from twinrl.run import names

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Answer:
    """What a study has found, read once and told in several lengths.

    Attributes:
        study: its trials. metric: what arms are ranked by. lines: the leaderboard; empty where there is no ranking.
        factors: what makes arms differ. traces: what the logs say of gradients.
        unranked: why there is no ranking.
    """

    study: StudyFrame
    metric: str
    lines: Sequence[ArmLine]
    factors: FactorSection
    traces: StudyTraces
    unranked: str = ""

    @classmethod
    def of(
        cls, study: StudyFrame, metric: str | None = None, interactions: Sequence[tuple[str, str]] = (),
        effect: float = 1.0,
    ) -> "Answer":  # fmt: skip
        """Everything that is needed of a study; arguments as for :func:`sentence`.

        Arguments:
            effect: difference worth finding, in standard deviations of paired differences.
        """
        metric, lines, unranked = metric or study.metric or names.VAL_QUALITY, [], ""
        try:
            lines = leaderboard(study, metric, effect) if len(study.arms) > 1 else []
        except TooFewSeedsError as error:
            unranked = str(error)
        factors = estimate(study, metric, interactions)
        return cls(study, metric, lines, factors, tracing.of_study(study), unranked)

    @property
    def ranking_tests(self) -> bool:
        """Whether the ranking tests what nothing else does: the contrasts of a single factor are its arms'."""
        return len(self.study.factors) != 1 or not self.factors.metric

    @cached_property
    def sentence(self) -> str:
        """Which arms fell, at which step, which term led, what explains it, in one sentence."""
        study, factors = self.study, self.factors
        briefly = bool(study.trials["diverged"].any())
        clauses = [
            telling.fell(study, factors), telling.led(study, self.traces),
            telling.metric_changed(study, self.metric, self.lines, factors, briefly), telling.idle(study, factors),
            telling.lost_prompts(study), telling.unwatched(study),
        ]  # fmt: skip
        text = "; ".join(clause for clause in clauses if clause)
        return f"{telling.capital(text)}."


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
    return Answer.of(study, metric, interactions).sentence


def blocks(answer: Answer, effect: float) -> list[PageBlock]:
    """The box below the first picture: questions with their answers, and a table.

    Arguments:
        effect: difference worth finding, in standard deviations of paired differences.
    """
    glance = factor_table(answer) if answer.factors.metric else arm_table(answer.study, answer.lines)
    table: list[PageBlock] = [Table(glance, "glance")] if glance is not None else []
    return [Facts(facts(answer, effect)), *table, Text(INTERVALS_NOTE, note=True), *_left_out(answer.study),
            Heading("The evidence")]  # fmt: skip


def facts(answer: Answer, effect: float = 1.0) -> list[tuple[str, str]]:
    """The questions and their answers; arguments as for :func:`blocks`."""
    rules = telling.rules(answer.study, answer.traces)
    return [
        ("Which factor?", which(answer)),
        *([("Did the rules act?", f"{telling.capital(rules)}.")] if rules else []),
        ("How sure?", sure(answer, effect)),
        ("What does it cost?", costs(answer.study, answer.factors)),
        *([("Made by what?", answer.study.note)] if answer.study.note else []),
    ]


INTERVALS_NOTE = (
    "Intervals: 95 %. ★: found at 5 %, over arms, factors and pairs together (Holm), each outcome by itself. Time a "
    "step: training alone, without validation; compare it only between runs of one machine. A ratio whose interval "
    "spans more than a factor of three is not known."
)


def _left_out(study: StudyFrame) -> list[PageBlock]:
    left = study.trials[~study.trials["status"].isin(ENDED)]["status"].value_counts()
    if not len(left):
        return []
    counted = ", ".join(f"{count} {status}" for status, count in left.items())
    return [Text(f"Not ranked, but counted as watched until their last step: {counted}.", note=True)]


# --- which ------------------------------------------------------------------------------------------------


def which(answer: Answer) -> str:
    """What was found to change the metric, and what decides which runs fall."""
    study, factors = answer.study, answer.factors
    changed = telling.metric_changed(study, answer.metric, answer.lines, factors)
    told = [telling.fell(study, factors), changed, telling.idle(study, factors)]
    return f"{' '.join(f'{telling.capital(clause)}.' for clause in told if clause)}{_first(study, answer.lines)}"


def _first(study: StudyFrame, lines: Sequence[ArmLine]) -> str:
    """The arm that leads the ranking, beside the base."""
    if not lines:
        return ""
    base = next(line for line in lines if line.arm == study.base)
    if lines[0] is base:
        return f" First of the arms is the base: {base.interval}."
    return f" First of the arms is {lines[0].arm}: {lines[0].interval}; the base has {base.interval}."


# --- how sure ---------------------------------------------------------------------------------------------


def sure(answer: Answer, effect: float) -> str:
    """What stands behind the answer, and what it leaves possible."""
    study, factors, trials = answer.study, answer.factors, answer.study.trials
    seeds = trials.groupby("arm")["seed"].nunique()
    span = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    text = f"{len(study.arms)} arms, {span} seed{'s' * (span != '1')} an arm, {trials['planned'].max():,} steps; "
    text += f"base: {study.base}. "
    passed = [*(e.p_holm for e in (*factors.pairs, *clear(factors.alone), *clear(factors.falls.alone))),
              *(pair.p_holm for pair in factors.falls.pairs)]  # fmt: skip
    if passed:
        text += "What is named passes at 5 % over all that is tested (largest p after Holm: "
        text += f"{telling.p_text(max(passed))}). "
    met = {name for e in factors.pairs for name in e.factor.split(PAIR)}
    missed = [e for e in factors.metric if not e.named and e.scale == "values" and PAIR not in e.factor
              and e.factor not in met]  # fmt: skip
    if missed and answer.lines:
        worst = max(missed, key=lambda e: max(abs(e.interval.low), abs(e.interval.high)))
        text += f"What is not found is not absent: {contrast(worst)} may still change {answer.metric} by "
        text += f"{worst.interval}. "
    return text + _seeds(answer, effect, int(seeds.min()))


def _seeds(answer: Answer, effect: float, have: int) -> str:
    """Whether the seeds are enough for the difference that is worth finding."""
    study = answer.study
    tests = len(study.arms) - 1
    need, least = seeds_needed(effect, tests), fewest_seeds(tests)
    base = set(study.arm(study.base)["seed"])
    common = min(len(base & set(study.arm(arm)["seed"])) for arm in study.arms)
    deviations = f"{effect:g} standard deviation{'s' * (effect != 1)}"
    aim = f"a difference of {deviations} between paired runs of two arms (power 80 %)"
    if answer.ranking_tests and PAIRED_FROM <= common < least:
        compared = f"{tests} comparison{'s' * (tests != 1)}"
        text = f"With {common} common seeds no difference can pass Wilcoxon's test in {compared}; {least} seeds could, "
        return f"{text}and {need} find {aim}."
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
    named = list(dict.fromkeys((e.factor, e.contrast) for e in _found(factors)))
    for factor, levels in named[:MOST_NAMED]:
        if spent := match(factors.time, factor, levels):
            text += f"{contrast(spent)}: {_dear(ratio(spent.interval))}"
            lost = match(factors.recall, factor, levels)
            values = lost is not None and lost.scale == "values"
            text += f", recall changes by {lost.interval}. " if lost is not None and values else ". "
    if not named:
        text += _dearest(study)
    return text.strip()


def _found(factors: FactorSection) -> list[Effect]:
    """Contrasts of the factors that matter, by themselves or together with another."""
    met = {name for effect in factors.pairs for name in effect.factor.split(PAIR)}
    met = met.union(*(pair.factors for pair in factors.falls.pairs))
    return [*clear(factors.alone), *clear(factors.falls.alone), *(e for e in factors.metric if e.factor in met)]


def _dear(spent: Interval) -> str:
    return f"{spent} times the time a step" if known(spent) == str(spent) else "its time a step is not known"


def _dearest(study: StudyFrame) -> str:
    ratios = {arm: time_ratio(study, arm) for arm in study.arms if arm != study.base}
    slow = {arm: spent for arm, spent in ratios.items() if spent is not None and known(spent) == str(spent)}
    if not slow:
        return "How much dearer one arm is than another is not known."
    arm = max(slow, key=lambda name: slow[name].estimate)
    return f"The dearest arm, {arm}, takes {slow[arm]} times the base's time a step."


def duration(seconds: float) -> str:
    """For people: seconds, minutes or hours."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{number(seconds / length, 2)} {unit}"
    return f"{number(seconds, 2)} seconds"


def time_ratio(study: StudyFrame, arm: str) -> Interval | None:
    """Time a step over that of the base, paired by seed (geometric mean); None where it is not known."""
    import numpy as np

    per_step = study.trials["seconds"] / study.trials["step"]
    mine, base = (per_step[study.trials["arm"] == name].set_axis(study.arm(name)["seed"]) for name in (arm, study.base))
    logs = np.log((mine / base).to_numpy(float))
    logs = logs[np.isfinite(logs)]
    return ratio(mean_t(logs)) if len(logs) else None


# --- at a glance ------------------------------------------------------------------------------------------


def factor_table(answer: Answer) -> "pd.DataFrame":
    """One line a contrast: metric, how many fell, time and recall."""
    import pandas as pd

    factors = answer.factors
    scale = " (ranks)" if factors.metric[0].scale == "ranks" else ""
    lines = []
    for e in factors.metric:
        time, recall = (match(of, e.factor, e.contrast) for of in (factors.time, factors.recall))
        line: dict[str, object] = {
            "factor": e.factor,
            "level − reference": e.contrast,
            f"{answer.metric}{scale}": _starred(factors.starred(e), str(e.interval)),
            "p (Holm)": e.p_holm,
            "fell": _fell(answer, e),
            "time a step ×": known(ratio(time.interval)) if time else None,
        }
        if recall and recall.scale == "values":
            line["recall"] = str(recall.interval)
        lines.append(line)
    return pd.DataFrame(lines)


def _fell(answer: Answer, effect: Effect) -> str | None:
    """How many runs of both levels fell; of a pair, where it takes both."""
    trials, falls = answer.study.trials, answer.factors.falls
    if PAIR in effect.factor:
        met = [pair for pair in falls.pairs if pair.factors == frozenset(effect.factor.split(PAIR))]
        return (
            _starred(True, f"{met[0].fell} of {met[0].runs} where {' and '.join(met[0].levels.values())} meet")
            if met
            else None
        )
    named = any(e.factor == effect.factor for e in falls.alone)
    groups = [trials[trials[effect.factor].astype(str) == level]["diverged"] for level in effect.contrast.split(" − ")]
    return _starred(named, " − ".join(map(telling.counts, groups)))


def _starred(found: bool, text: str) -> str:
    return f"{'★ ' if found else ''}{text}"


def arm_table(study: StudyFrame, lines: Sequence[ArmLine]) -> "pd.DataFrame | None":
    """One line an arm: metric, chance to be better, falls and time; None without a ranking."""
    import pandas as pd

    if not lines:
        return None
    return pd.DataFrame(
        {
            "arm": line.arm,
            "interquartile mean": _starred(line.p_holm < 0.05, str(line.interval)),
            "P(better than the base)": line.better,
            "p (Holm)": None if math.isnan(line.p_holm) else line.p_holm,
            "fell": f"{line.diverged} of {len(study.arm(line.arm))}",
            "time a step ×": known(time_ratio(study, line.arm)) if line.arm != study.base else None,
        }
        for line in lines
    )
