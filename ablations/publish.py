"""The MLflow view of a study: study → arm → seed, built from ledger and run logs, safe to repeat.

Seed runs are twinrl's own views of run directories (:mod:`twinrl.tracking.mlflow_view`), here with the tags
``study``, ``arm`` and the factor levels as parameters. A study and an arm are parent runs. Each report adds a fresh
summary run to an arm and removes the one before: at every logged step the median over seeds, the band between two
quantiles and the number of seeds still alive, so that charts compare arms and not single lucky runs. A trial that
belongs to several studies stays where it was published first; the others link to it by tags.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ablations.ledger import Record
from ablations.plan import Plan, Trial
from ablations.table import by_arm
from twinrl.errors import InputError
from twinrl.tracking import mlflow_view, names, runlog, store, ui
from twinrl.tracking.mlflow_state import State

EXPERIMENT = "ablations"
KEY_TAG = "twinrl.study_key"
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
SERVER = "http://127.0.0.1:5000"
"""Where ``twinrl ui`` serves by default."""
BAND = (0.1, 0.9)
MOST_POINTS = 500
POINTS_PER_REQUEST = 1000


@dataclass(frozen=True)
class Point:
    """One step of an arm's curve: the median and band of the seeds that have a finite value there."""

    step: int
    median: float
    low: float
    high: float
    alive: int


class StudyView:
    """Publishes a study to an MLflow store.

    Arguments:
        plan: of the study. uri: the store; default as for runs: ``MLFLOW_TRACKING_URI``, else sqlite in the
            workspace.

    Raises:
        InputError: the store can't be reached, is locked, or is no MLflow store.

    *When to use*: make it before the first trial, so that a store that is away stops nothing half-way;
    :meth:`trial` after each trial, :meth:`summarise` at the end.
    """

    def __init__(self, plan: Plan, uri: str | None = None):
        self.plan = plan
        self.uri = store.resolve(uri, plan.workspace.root)
        try:
            store.prepare(self.uri)
            self.client = store.connect(self.uri)
            with store.impatient():
                self.experiment = store.experiment_id(self.client, EXPERIMENT, self.uri)
        except store.failures() as error:
            raise InputError(
                f"the MLflow store {self.uri} can't be used", got=mlflow_view.brief(error),
                fix="name another --tracking-uri, or give --no-mlflow",
            ) from error  # fmt: skip

    def try_trial(self, trial: Trial) -> None:
        """:meth:`trial` where it can't be in the way: what fails now is published by :meth:`try_summaries`."""
        self._try(lambda: self.trial(trial))

    def try_summaries(self) -> str | None:
        """:meth:`summarise`; what went wrong, if anything."""
        return self._try(self.summarise)

    def _try(self, publish: Callable[[], object]) -> str | None:
        failures: tuple[type[Exception], ...] = (InputError, *store.failures())
        try:
            with store.impatient():
                publish()
        except failures as error:
            return mlflow_view.brief(error)
        return None

    # --- trials -------------------------------------------------------------------------------------------

    def trial(self, trial: Trial) -> str | None:
        """Publish a finished trial below its arm; its MLflow id, or None where its run is on another machine."""
        record, arm = self.plan.reread().record(trial), self._arm(trial)
        if record is None or not trial.run.log.exists():
            self._tag(arm, {f"elsewhere.s{trial.settings.seed}": _place(record)})
            return None
        owner = State.load(trial.run.path).tags.get("study", self.plan.study.name)
        mine = owner == self.plan.study.name
        run = mlflow_view.publish(
            trial.run.path, self.uri, EXPERIMENT, self._tags(trial, arm, record, mine), final=True
        )
        if mine:
            self._levels(run, trial)
        else:
            self._tag(arm, {f"reused.s{trial.settings.seed}": run})
        if record.diverged is not None:
            self.client.log_metric(run, "diverged/step", record.diverged["step"], timestamp=0, step=0)
        return run

    def _tags(self, trial: Trial, arm: str, record: Record, mine: bool) -> dict[str, object]:
        """A seed run's tags. A run that another study published first only learns that this one uses it, too."""
        outcome = {"status": record.status} | ({"diverged": record.diverged["kind"]} if record.diverged else {})
        name, seed = self.plan.study.name, trial.settings.seed
        if not mine:
            return {f"study.{name}": trial.arm, **outcome}
        place = {"study": name, "arm": trial.arm, "seed": seed, PARENT_TAG: arm}
        return place | {"config_hash": trial.settings.hash, "fingerprint": trial.fingerprint} | outcome

    def _levels(self, run: str, trial: Trial) -> None:
        for factor, level in trial.levels.items():
            self.client.log_param(run, f"factor.{factor}", level)

    def _arm(self, trial: Trial) -> str:
        """Id of the arm's parent run."""
        study = self._parent(f"study/{self.plan.study.name}", self.plan.study.name, {"level": "study"})
        key = f"arm/{self.plan.study.name}/{trial.arm}"
        run = self._parent(key, trial.arm, {"level": "arm", "arm": trial.arm, PARENT_TAG: study})
        self._levels(run, trial)
        return run

    def _parent(self, key: str, name: str, tags: Mapping[str, str]) -> str:
        """Id of the run with ``key``, made if need be."""
        found = self.client.search_runs([self.experiment], filter_string=f"tags.`{KEY_TAG}` = '{_quoted(key)}'")
        if found:
            return found[0].info.run_id
        tags = {KEY_TAG: _quoted(key), "study": self.plan.study.name, **tags}
        run = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        self.client.set_terminated(run)
        return run

    def _tag(self, run: str, tags: Mapping[str, object]) -> None:
        for name, value in tags.items():
            self.client.set_tag(run, name, str(value))

    # --- summaries ----------------------------------------------------------------------------------------

    def summarise(self) -> None:
        """Publish what is finished, and a fresh summary run for each arm."""
        plan = self.plan.reread()
        summaries = []
        for trials in by_arm(plan).values():
            done = [trial for trial in trials if plan.record(trial) is not None]
            runs = [run for trial in done if (run := self.trial(trial)) is not None]
            if runs:
                self._note(self._arm(done[0]), "the seeds of this arm", runs)
                summaries.append(self._summary(done))
        if summaries:
            study = self._parent(f"study/{plan.study.name}", plan.study.name, {"level": "study"})
            self._note(study, "the arms of this study, medians over seeds", summaries)

    def _summary(self, trials: Sequence[Trial]) -> str:
        """A new summary run of one arm; the one before is deleted."""
        arm, name = self._arm(trials[0]), f"{trials[0].arm} (summary)"
        older = f"tags.`{PARENT_TAG}` = '{arm}' and tags.level = 'summary'"
        for run in self.client.search_runs([self.experiment], filter_string=older):
            self.client.delete_run(run.info.run_id)
        tags = {"level": "summary", "study": self.plan.study.name, "arm": trials[0].arm, PARENT_TAG: arm}
        run = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        self._levels(run, trials[0])
        self._log(run, curves(self.plan.reread(), trials))
        self.client.set_terminated(run)
        return run

    def _log(self, run: str, curves: Mapping[str, Sequence[Point]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, 0, point.step)
            for metric, points in curves.items()
            for point in points
            for name, value in (
                (metric, point.median), (f"{metric}/low", point.low), (f"{metric}/high", point.high),
                (f"{metric}/alive", point.alive),
            )
        ]  # fmt: skip
        for start in range(0, len(metrics), POINTS_PER_REQUEST):
            self.client.log_batch(run, metrics=metrics[start : start + POINTS_PER_REQUEST])

    def _note(self, run: str, what: str, runs: Sequence[str]) -> None:
        """A link to the page that overlays ``runs``, as the run's description and a tag."""
        base = self.uri if self.uri.startswith("http") else SERVER
        url = ui.compare_url(
            base, self.experiment, runs, list(dict.fromkeys([self.plan.study.config.metric, names.LOSS_TOTAL]))
        )
        self._tag(run, {"compare": url, NOTE_TAG: f"[Curves of {what}]({url})"})


def _place(record: Record | None) -> str:
    return "unknown" if record is None else f"{record.where.get('host', '?')}:{record.where.get('directory', '?')}"


def _quoted(text: str) -> str:
    """A key that fits into MLflow's filter strings."""
    return text.replace("'", "’")


def curves(plan: Plan, trials: Sequence[Trial]) -> dict[str, list[Point]]:
    """The study's metric and the total loss over the seeds of an arm, as far as their logs are on this machine."""
    wanted = dict.fromkeys([plan.study.config.metric, names.LOSS_TOTAL])
    logs = [(runlog.read(t.run.log), plan.record(t)) for t in trials if t.run.log.exists()]
    return {metric: list(curve(logs, metric)) for metric in wanted}


def curve(logs: Sequence[tuple[Sequence[Mapping[str, Any]], Record | None]], metric: str) -> Iterator[Point]:
    """Median, band and number alive at each step of a metric, at most ``MOST_POINTS`` evenly spaced steps.

    A seed is alive up to its divergence, or to its last step. The statistics are of the finite values; how many
    seeds stand behind them is what ``alive`` is for.
    """
    values: dict[int, list[float]] = defaultdict(list)
    ends = [_end(rows, record) for rows, record in logs]
    for rows, _ in logs:
        for row in rows:
            if metric in row:
                values[row["step"]].append(float(row[metric]))
    steps = sorted(step for step, found in values.items() if np.isfinite(found).any())
    stride = max(1, math.ceil(len(steps) / MOST_POINTS))
    for step in steps[::stride]:
        finite = [value for value in values[step] if np.isfinite(value)]
        low, median, high = np.quantile(finite, (BAND[0], 0.5, BAND[1])).tolist()
        yield Point(step, median, low, high, sum(step <= end for end in ends))


def _end(rows: Sequence[Mapping[str, Any]], record: Record | None) -> int:
    """The last step at which a seed was alive."""
    if record is not None and record.diverged is not None:
        return int(record.diverged["step"]) - 1
    return int(rows[-1]["step"]) if rows else -1
