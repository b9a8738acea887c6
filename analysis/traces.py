"""What the logs of a study's runs say of its gradients: which term rose first, what rules did, norms over steps.

A run's log is read by the columns that this takes, one run at a time; of each run a few hundred numbers are kept.

*Rose first.* A run falls between the last good evaluation and the first bad one. A term's norm has risen where it is
above what was usual by the trainer's own margins (:mod:`twinrl.stability.series`): those for a spike, ten times or six
robust deviations of its logarithm; where no term has spiked those for a drift of its running median, twice and three.
Usual is the median of the steps before the search begins, one evaluation earlier than the last good one: samples look
well for a while after a norm has left its level.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.frames import Run, StudyFrame
from analysis.plots import UNCHANGED
from twinrl.run import layout, names
from twinrl.run.columns import Columns
from twinrl.stability.detectors import REWARD_OWNER, TOTAL, term_of, terms_in
from twinrl.stability.divergence import Diverged
from twinrl.stability.series import Drift, Spike

if TYPE_CHECKING:
    import pandas as pd

STRETCHES = 120
"""Parts that the steps of a study are cut into for its picture."""
USUAL = 100
"""Steps that say what is usual, at most."""
FEWEST_USUAL = 5
"""Fewer finite values than these say nothing of it."""
SMOOTHED = 9
"""Steps of a running median."""
SOONEST = 50
"""Steps before a fall in which its cause is looked for, at least."""


@dataclass(frozen=True)
class Rise:
    """The term whose norm left its level first, before a run fell.

    Attributes:
        term, step: which, and where. times: largest norm from there to the fall over the usual one.
        lead: steps before the total norm; NaN where that did not rise.
    """

    term: str
    step: int
    times: float
    lead: float = math.nan


@dataclass(frozen=True)
class RuleAction:
    """What the rules of one term, or of the sum, did in one run.

    Attributes:
        share: of its steps with a gradient in which they changed its norm. factor: median over these; NaN if none.
    """

    share: float
    factor: float


@dataclass(frozen=True)
class RunTrace:
    """One run.

    Attributes:
        raw, entering: term or total → (STRETCHES,) largest norm of each stretch before rules, and after them as it
            enters the sum (of the total: the optimizer); NaN where none was positive and finite.
        rules: term or total → what its rules did. rise: which term rose first before the run fell.
        reward_start: first step at which a reward pulls, where that is not the first of the run.
    """

    raw: Mapping[str, np.ndarray]
    entering: Mapping[str, np.ndarray]
    rules: Mapping[str, RuleAction]
    rise: Rise | None = None
    reward_start: int | None = None


@dataclass(frozen=True)
class StudyTraces:
    """The runs of a study whose logs are there, by index in its trials.

    Attributes:
        edges: (STRETCHES + 1,) steps at which stretches begin, and the last one's end.
    """

    edges: np.ndarray
    runs: Mapping[int, RunTrace] = field(default_factory=dict)

    def of_arm(self, study: StudyFrame, arm: str) -> list[RunTrace]:
        """The arm's runs, seed by seed."""
        return [self.runs[k] for k in study.arm(arm).index if k in self.runs]

    @property
    def terms(self) -> list[str]:
        """The terms whose norms were logged, the total left out."""
        return sorted({term for trace in self.runs.values() for term in trace.raw if term != TOTAL})


def of_study(study: StudyFrame) -> StudyTraces:
    """All runs whose directories are there; a damaged log is refused where the study is loaded."""
    edges = edges_to(int(study.trials["planned"].max()))
    return StudyTraces(
        edges, {k: of_run(run, edges, study.trials.loc[k]) for k, run in study.runs.items()}
    )  # fmt: skip


def edges_to(steps: int) -> np.ndarray:
    """Where the stretches of a run of so many steps begin."""
    return np.unique(np.linspace(1, steps + 1, min(steps, STRETCHES) + 1).astype(int))


def of_run(run: Run, edges: np.ndarray, trial: "pd.Series | None" = None) -> RunTrace:
    """One run's trace.

    Arguments:
        trial: its line in the study's table, which says whether and when it fell.
    """
    log = layout.read_columns(run.path, _telling)
    step = log.values["step"][log.lasting]
    raw, entering = (
        {term: _norms(log, name) for term, name in _series(log, quantity).items()}
        for quantity in ("norm_raw", "norm_clipped")
    )
    fell = trial is not None and bool(trial["diverged"])
    return RunTrace(
        {term: stretched(step, values, edges) for term, values in raw.items()},
        {term: stretched(step, values, edges) for term, values in entering.items()},
        {term: action(raw[term], values) for term, values in entering.items() if term in raw},
        first_rise(step, raw, trial["after"], trial["time"]) if fell and trial is not None else None,
        _reward_start(step, log),
    )  # fmt: skip


def _telling(name: str) -> bool:
    return name == names.REWARD_WEIGHT or (name.startswith("grad/") and name.endswith(("/norm_raw", "/norm_clipped")))


def _series(log: Columns, quantity: str) -> dict[str, str]:
    """Term, and the total → its column of a quantity, in the order in which the log has them."""
    raw = [name for name in log.values if name.endswith("/norm_raw")]
    terms = [term for name in raw if (term := term_of(name))]
    found = {term: names.grad(term, quantity) for term in (*terms, TOTAL)}
    return {term: name for term, name in found.items() if name in log.values}


def _norms(log: Columns, name: str) -> np.ndarray:
    """A column's lasting rows: NaN where nothing was logged, infinite where that was not finite."""
    values = np.where(log.logged[name] & ~np.isfinite(log.values[name]), np.inf, log.values[name])
    return np.asarray(values[log.lasting])


def stretched(step: np.ndarray, values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The largest positive, finite value of each stretch; NaN where there is none."""
    kept = np.isfinite(values) & (values > 0)
    largest = np.zeros(len(edges) - 1)
    place = np.clip(np.searchsorted(edges, step[kept], side="right") - 1, 0, len(largest) - 1)
    np.maximum.at(largest, place, values[kept])
    return np.where(largest > 0, largest, np.nan)


def action(raw: np.ndarray, entering: np.ndarray) -> RuleAction:
    """In how many of the steps with a gradient its norm was changed, and by what factor."""
    known = np.isfinite(raw) & np.isfinite(entering) & (raw > 0)
    factor = entering[known] / raw[known]
    acted = factor[np.abs(factor - 1) > UNCHANGED]
    share = len(acted) / len(factor) if len(factor) else math.nan
    return RuleAction(share, float(np.median(acted)) if len(acted) else math.nan)


def _reward_start(step: np.ndarray, log: Columns) -> int | None:
    """The first step with a weight, or with a gradient of the reward; None where it pulls from the start, or never."""
    sources = (names.REWARD_WEIGHT, names.grad(REWARD_OWNER, "norm_raw"))
    found = next((log.values[name][log.lasting] for name in sources if name in log.values), None)
    at = step[found > 0] if found is not None else step[:0]
    return int(at[0]) if len(at) and at[0] > step[0] else None


# --- rises ------------------------------------------------------------------------------------------------


def first_rise(step: np.ndarray, norms: Mapping[str, np.ndarray], after: float, time: float) -> Rise | None:
    """The term that rose first before a fall; of several at one step the one furthest off.

    Arguments:
        step: (n,). norms: term, and the total → (n,) norms before rules.
        after, time: the fall began after step ``after``, and was seen at step ``time``.
    """
    margin = time - (after if after == after else 0.0)
    begin = max(min(time - 2 * margin, time - SOONEST), time / 4)
    before = (step <= begin) & (step > begin - USUAL)
    window = (step > begin) & (step <= time)
    found: dict[str, tuple[int, float, float]] = {}
    for seen in (_Spiked(norms), _Drifted(norms)):
        found = {term: rose for term in norms if (rose := seen.rose(term, before, window)) is not None}
        total = found.pop(TOTAL, None)
        if found:
            break
    else:
        return None
    term = min(found, key=lambda name: (found[name][0], -found[name][1]))
    at, _, times = found[term]
    lead = math.nan if total is None else float(step[total[0]] - step[at])
    return Rise(term, int(step[at]), times, lead)


def rise_of(run: Run, failure: Diverged) -> Rise | None:
    """The term that rose first before a run's failure, from its rows."""
    rows = run.lasting
    series = {term: names.grad(term, "norm_raw") for term in (*terms_in(rows), TOTAL)}
    norms = {term: np.array([_height(row.get(name, 0.0)) for row in rows]) for term, name in series.items()}
    step = np.array([row["step"] for row in rows])
    return first_rise(step, norms, float(failure.after), float(failure.step))


def _height(value: float) -> float:
    return value if math.isfinite(value) else math.inf


class _Spiked:
    """Norms step by step, against the margins for a spike.

    Arguments:
        norms: term, and the total → (n,) norms.
    """

    def __init__(self, norms: Mapping[str, np.ndarray]):
        self.norms = norms
        own = Spike.Config()
        self.ratio, self.z, self.floor = own.ratio, own.z, own.floor

    def series(self, term: str) -> np.ndarray:
        """What is compared with the margin; what was not logged has not risen."""
        return np.where(np.isnan(self.norms[term]), 0.0, self.norms[term])

    def least(self, scale: float) -> float:
        """The rise of a logarithm that counts, at a robust deviation."""
        return min(math.log(self.ratio), self.z * scale)

    def rose(self, term: str, before: np.ndarray, window: np.ndarray) -> tuple[int, float, float] | None:
        """Position of the first value above the margin, its deviations, and the largest over the usual from there on.

        Arguments:
            before, window: (n,) which steps say what is usual, and in which a rise is looked for.
        """
        values = self.norms[term]
        usual = values[before & np.isfinite(values) & (values > 0)]
        if len(usual) < FEWEST_USUAL:
            return None
        logs = np.log(usual)
        middle = float(np.median(logs))
        scale = max(1.4826 * float(np.median(np.abs(logs - middle))), self.floor)
        with np.errstate(divide="ignore"):
            off = np.log(self.series(term)) - middle
        (at,) = (window & (off > self.least(scale))).nonzero()
        return (int(at[0]), float(off[at[0]] / scale), float(np.exp(off[window].max()))) if len(at) else None


class _Drifted(_Spiked):
    """Running medians of the norms, against the margins for a drift."""

    def series(self, term: str) -> np.ndarray:
        """(n,) the median of each step and those before it, SMOOTHED together."""
        padded = np.concatenate([np.zeros(SMOOTHED - 1), super().series(term)])
        return np.asarray(np.median(np.lib.stride_tricks.sliding_window_view(padded, SMOOTHED), axis=1))

    def least(self, scale: float) -> float:
        """As above; both must be passed."""
        own = Drift.Config()
        return max(math.log(own.factor), own.z * scale)


# --- arms -------------------------------------------------------------------------------------------------


def leaders(found: Sequence[RunTrace]) -> list[tuple[str, list[Rise]]]:
    """The terms that rose first in runs that fell, the most frequent first, with the rises."""
    by_term: dict[str, list[Rise]] = {}
    for trace in found:
        if trace.rise is not None:
            by_term.setdefault(trace.rise.term, []).append(trace.rise)
    return sorted(by_term.items(), key=lambda item: -len(item[1]))


def rules_table(study: StudyFrame, traces: StudyTraces) -> "pd.DataFrame":
    """Arm and term of every rule that acted or is configured: share of steps and factor, medians over seeds."""
    import pandas as pd

    lines: list[dict[str, Any]] = []
    for arm in study.arms:
        mine = traces.of_arm(study, arm)
        for term in dict.fromkeys(term for trace in mine for term in trace.rules):
            actions = [trace.rules[term] for trace in mine if term in trace.rules]
            if not any(one.share > 0 for one in actions) and not _configured(study, arm, term):
                continue
            factors = [one.factor for one in actions if one.share > 0]
            lines.append({
                "arm": arm, "gradient": "sum" if term == TOTAL else term,
                "share of steps": float(np.mean([one.share for one in actions])),
                "median factor": float(np.median(factors)) if factors else math.nan,
                "runs": f"{len(factors)} of {len(actions)}",
            })  # fmt: skip
    return pd.DataFrame(lines, columns=["arm", "gradient", "share of steps", "median factor", "runs"])


def _configured(study: StudyFrame, arm: str, term: str) -> bool:
    """Whether the arm's runs have rules for a term, or for the sum."""
    run = next((study.runs[k] for k in study.arm(arm).index if k in study.runs), None)
    rules = (run.config.get("gradients") or {}) if run is not None else {}
    if term == TOTAL:
        return bool(rules.get("total"))
    own = rules.get("terms") or {}
    return bool(own[term] if term in own else rules.get("each"))
