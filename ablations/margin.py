"""The critical learning rate: the largest at which an arm stays healthy, by bisection on log lr.

Each probe is an ordinary trial (the arm with another ``optim.lr`` and ``margin.steps`` steps), so probes are in the
ledger, run side by side, are reused by the next call and go on after a kill. The bisection itself has no state: it is
computed again from the ledger, and asks for the next probe.

Healthy means: not failed (:mod:`twinrl.stability.verdict`) at the end of ``margin.steps`` steps. The answer is a
bracket: a rate that stayed healthy and, above it, one that did not, their ratio below ``margin.tolerance``.
Divergence need not be monotone in the rate; the bracket is then one such crossing between ``low`` and ``high``.

*When to use*: to compare arms by how far they are from the edge, where none of them diverges at the working rate.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ablations.ledger import TrialRecord
from ablations.plan import Plan, Trial, Workspace, trial_of
from ablations.study import Arm, Margin, Study
from twinrl.config import validate
from twinrl.config.errors import InputError
from twinrl.run import layout
from twinrl.training.schema import RunConfig

SIGNIFICANT_DIGITS = 4
WARM_UP = "warm-up"

PlanRunner = Callable[[Plan], tuple[Plan, list[str]]]
"""Runs what is missing of a plan; the plan after that and a line for each failure."""


@dataclass(frozen=True)
class Bracket:
    """What the probes of an arm and seed say so far.

    Attributes:
        arm, seed: whose.
        healthy: the largest rate known to be healthy below every ``diverged`` one; None if ``low`` was not.
        diverged: the smallest rate above it known to diverge; None if ``high`` was healthy.
        next: the rate to be probed next; None when the bracket is narrow enough, or there is none.
    """

    arm: str
    seed: int
    healthy: float | None
    diverged: float | None
    next: float | None

    @property
    def critical(self) -> float:
        """Geometric mean of the bracket; nan where it is open."""
        return math.nan if self.healthy is None or self.diverged is None else math.sqrt(self.healthy * self.diverged)


def rounded(rate: float) -> float:
    """To four digits, so that a rate has one hash wherever it is computed."""
    return float(f"{rate:.{SIGNIFICANT_DIGITS - 1}e}")


def bisect(margin: Margin, healthy: Callable[[float], bool | None]) -> tuple[float | None, float | None, float | None]:
    """The bracket and the next rate to probe.

    Arguments:
        margin: ends and tolerance. healthy: what the probe at a rate said; None if there was none.

    Returns:
        (healthy, diverged, next), as in :class:`Bracket`.
    """
    low, high = rounded(margin.low), rounded(margin.high)
    for end, wanted in ((low, True), (high, False)):
        verdict = healthy(end)
        if verdict is None:
            return None, None, end
        if verdict is not wanted:
            return (None, low, None) if wanted else (high, None, None)
    while high / low > margin.tolerance:
        middle = rounded(math.sqrt(low * high))
        if middle in (low, high):  # the tolerance is finer than the digits
            break
        verdict = healthy(middle)
        if verdict is None:
            return low, high, middle
        low, high = (middle, high) if verdict else (low, middle)
    return low, high, None


def probe_of(arm: Arm, margin: Margin, rate: float, start: str | None = None) -> Arm:
    """The arm at another learning rate, for as long as it must survive, from its own start or the run at ``start``."""
    train = {"steps": margin.steps} | ({"init": start} if start else {})
    return Arm(f"{arm.name} lr={rate:g}", arm.levels, _with(arm.settings, train=train, optim={"lr": rate}))


def reachable(margin: Margin, known: Mapping[float, bool] | None = None) -> set[float]:
    """Every rate that a bisection may come to, whatever its probes say; beyond those ``known``."""
    asked = bisect(margin, dict(known or {}).get)[2]
    if asked is None:
        return set()
    return {asked}.union(*(reachable(margin, {**(known or {}), asked: verdict}) for verdict in (True, False)))


@dataclass
class Search:
    """The critical rates of all arms and seeds of a study.

    Arguments:
        study: with its ``margin`` section. workspace: where probes go. run: runs a plan's missing trials.
    """

    study: Study
    workspace: Workspace
    run: PlanRunner
    _trials: dict[tuple[str, float, str | None], Trial] = field(default_factory=dict)

    def complete(self) -> tuple[list[Bracket], list[str]]:
        """Probe until every bracket is narrow, or a probe failed, the budget is used up or the study was stopped.

        Returns:
            The brackets, and one line for each failed probe.
        """
        failures, ready = self._warm_up()
        while ready:
            probes, brackets = self.state()
            if not probes:
                return brackets, failures
            plan, failures = self.run(self._plan(probes))
            ready = not plan.missing
        return self.known(), failures

    def known(self) -> list[Bracket]:
        """The brackets as far as the ledger has probes; none where the search has not begun."""
        return self._brackets() if self._started() else []

    def state(self) -> tuple[list[Trial], list[Bracket]]:
        """The probes wanted next and the brackets, from the ledger alone."""
        arms, brackets = {arm.name: arm for arm in self.study.arms}, self._brackets()
        probes = [self.probe(arms[found.arm], found.seed, found.next) for found in brackets if found.next is not None]
        return probes, brackets

    def _brackets(self) -> list[Bracket]:
        records = self.workspace.ledger.read()
        return [self._bracket(arm, seed, records) for seed in self.study.config.seeds for arm in self.study.arms]

    def _bracket(self, arm: Arm, seed: int, records: Mapping[str, TrialRecord]) -> Bracket:
        def healthy(rate: float) -> bool | None:
            record = records.get(self.probe(arm, seed, rate).key)
            if record is None or not record.final:
                return None
            return record.diverged is None

        return Bracket(arm.name, seed, *bisect(self.study.config.margin, healthy))

    def probe(self, arm: Arm, seed: int, rate: float) -> Trial:
        """The trial of an arm and a seed at a learning rate."""
        margin = self.study.config.margin
        start = str(self._start(seed).run.path) if margin.warmup_steps else None
        key = (arm.name, rate, start)
        if key not in self._trials:
            self._trials[key] = self._trial(probe_of(arm, margin, rate, start), seed)
        return self._trials[key].seeded(seed)

    def _start(self, seed: int) -> Trial:
        """The run whose last checkpoint every probe of a seed starts from."""
        settings = _with(self.study.base(), train={"steps": self.study.config.margin.warmup_steps})
        return self._trial(Arm(WARM_UP, {}, settings), seed)

    def _trial(self, arm: Arm, seed: int) -> Trial:
        return trial_of(arm, seed, self.study.config.resources, self.workspace)

    def _starts(self) -> list[Trial]:
        """The shared starts; none where every probe begins as its arm does."""
        return [self._start(seed) for seed in self.study.config.seeds] if self.study.config.margin.warmup_steps else []

    def _started(self) -> bool:
        return all(layout.newest(start.run.checkpoints) is not None for start in self._starts())

    def _warm_up(self) -> tuple[list[str], bool]:
        """Make the shared checkpoints that are not there yet: failures, and whether all are there.

        Raises:
            InputError: a record says that one was made, but its run directory is not on this machine.
        """
        starts = self._starts()
        if not starts:
            return [], True
        plan, failures = self.run(self._plan(starts))
        for start in starts:
            if plan.record(start) is not None and layout.newest(start.run.checkpoints) is None:
                raise InputError(
                    f"the shared checkpoint {start.run.path} is not on this machine",
                    fix="copy the run directory here, or name another --ledger",
                )
        return failures, not plan.missing

    def _plan(self, trials: Sequence[Trial]) -> Plan:
        return Plan(self.study, self.workspace, list(trials), self.workspace.ledger.read())


def _with(settings: RunConfig, **sections: Mapping[str, object]) -> RunConfig:
    """The settings with other values in some sections, validated again."""
    content = settings.model_dump(mode="json")
    return validate(RunConfig, content | {name: content[name] | dict(new) for name, new in sections.items()})


def fifo(study: Study) -> Study:
    """The study without halving, which would prune probes by their quality."""
    return replace(
        study,
        config=study.config.model_copy(update={"stop": study.config.stop.model_copy(update={"kind": "divergence"})}),
    )


def margin_table(study: Study, brackets: Sequence[Bracket]) -> Table:
    """One line for each arm and seed."""
    table = Table(title=f"critical learning rate, {study.config.margin.steps} steps", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("arm", overflow="fold")
    for heading in ("seed", "healthy at", "diverged at", "critical"):
        table.add_column(heading, justify="right")
    for bracket in sorted(brackets, key=lambda b: [arm.name for arm in study.arms].index(b.arm)):
        open_end = f"> {bracket.healthy:.3g}" if bracket.healthy else "< low" if bracket.diverged else "unknown"
        critical = (
            "…" if bracket.next is not None else open_end if math.isnan(bracket.critical) else f"{bracket.critical:.3g}"
        )
        rates = [f"{rate:.3g}" if rate is not None else "–" for rate in (bracket.healthy, bracket.diverged)]
        table.add_row(escape(bracket.arm), str(bracket.seed), *rates, critical)
    return table
