"""The MLflow view of a study: study → arm → seed, built from ledger and run logs, safe to repeat.

Seed runs are twinrl's own views of run directories (:mod:`twinrl.tracking.mlflow_view`), here with the tags
``study``, ``arm`` and the factor levels as parameters. They grow while trials run, by the rows that a checkpoint has
made durable: what a resumed trial cuts off and repeats was never shown. A study and an arm are parent runs. At the
end an arm gets a fresh summary run (:mod:`ablations.summary`) in place of the one before, so that charts compare arms
and not single lucky runs. A trial that belongs to several studies stays where it was published first; the others
link to it by tags.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial

from ablations.display import by_arm
from ablations.ledger import TrialRecord
from ablations.plan import Plan, Trial
from ablations.summary import BandPoint, curves
from ablations.trial import durable_log
from twinrl.config.errors import InputError
from twinrl.run import names
from twinrl.tracking import mlflow_view, store, ui
from twinrl.tracking.mlflow_run import POINTS_PER_REQUEST, fitting
from twinrl.tracking.mlflow_state import ViewState
from twinrl.tracking.mlflow_view import MLflowView

EXPERIMENT = "ablations"
STUDY_KEY_TAG = "twinrl.study_key"
NOTE_TAG = "mlflow.note.content"
SERVER = "http://127.0.0.1:5000"
"""Where ``twinrl ui`` serves by default."""
LIVE_SECONDS = 10
PAUSE_SECONDS = 60
"""How long nothing is shown live after the store did not answer; the end of the study catches up."""


class StudyView:
    """Publishes a study to an MLflow store.

    Arguments:
        plan: of the study. uri: the store; default as for runs: ``MLFLOW_TRACKING_URI``, else sqlite in the
            workspace.

    Raises:
        InputError: the store can't be reached, is locked, or is no MLflow store.

    *When to use*: make it before the first trial, so that a store that is away stops nothing half-way;
    :meth:`live` while trials run, :meth:`trial` after each, :meth:`summarise` at the end.
    """

    def __init__(self, plan: Plan, uri: str | None = None):
        self.plan = plan
        self._shown: dict[str, MLflowView] = {}
        self._offsets: dict[str, int] = {}
        self._ended: set[str] = set()
        self._runs: dict[str, dict[str, str]] = {}
        self._arms: dict[str, str] = {}
        self._paused_until = 0.0
        self.uri = store.resolve(uri, plan.workspace.root)
        try:
            store.prepare(self.uri)
            self.client = store.connect(self.uri)
            with store.impatient():
                self.experiment = store.experiment_id(self.client, EXPERIMENT, self.uri)
        except store.failures() as error:
            raise InputError(
                f"the MLflow store {store.shown(self.uri)} can't be used", got=mlflow_view.brief(error),
                fix="name another --tracking-uri, or give --no-mlflow",
            ) from error  # fmt: skip

    def try_live(self) -> None:
        """:meth:`live` for every trial that has moved on; where the store does not answer, nothing for a minute."""
        for trial in self.plan.missing:
            if time.monotonic() < self._paused_until:
                return
            if trial.key not in self._ended and self._try(partial(self.live, trial)):
                self._paused_until = time.monotonic() + PAUSE_SECONDS

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

    def live(self, trial: Trial) -> None:
        """Publish what a running trial's newest checkpoint has made durable, if that is more than before.

        Raises:
            InputError: the store does not answer.
        """
        offset = durable_log(trial.run.path)
        if offset is None or offset == self._offsets.get(trial.key):
            return
        first = trial.key not in self._shown
        if first:
            tags = self._tags(trial, self._arm(trial), self._mine(trial))
            self._shown[trial.key] = MLflowView(  # the study says itself, once and at its end, that MLflow was away
                trial.run.path, self.uri, experiment=EXPERIMENT, tags=tags, quiet=True
            )
        view = self._shown[trial.key]
        if not view.publish_through(offset) or view.run_id is None:
            del self._shown[trial.key]
            raise InputError(f"the MLflow store {store.shown(self.uri)} does not answer")
        self._offsets[trial.key] = offset
        if first:
            self._place(trial, view.run_id)

    def trial(self, trial: Trial) -> str | None:
        """Publish a finished trial below its arm; its MLflow id, or None where its run is on another machine."""
        record, arm = self.plan.reread().record(trial), self._arm(trial)
        self._ended.add(trial.key)
        self._shown.pop(trial.key, None)
        if record is None or not trial.run.log.exists():
            self._tag(arm, {f"elsewhere.s{trial.settings.seed}": _whereabouts(record)})
            return None
        tags = self._tags(trial, arm, self._mine(trial)) | {"status": record.status}
        run = mlflow_view.publish(trial.run.path, self.uri, EXPERIMENT, tags, final=True)
        self._place(trial, run)
        self._outcome(run, record)
        return run

    def _mine(self, trial: Trial) -> bool:
        """Whether no other study has published the trial's run first."""
        return ViewState.load(trial.run.path).tags.get("study", self.plan.study.name) == self.plan.study.name

    def _tags(self, trial: Trial, arm: str, mine: bool) -> dict[str, object]:
        """A seed run's tags. A run that another study published first only learns that this one uses it, too."""
        name, seed = self.plan.study.name, trial.settings.seed
        if not mine:
            return {f"study.{name}": trial.arm}
        place = {"study": name, "arm": trial.arm, "seed": seed, store.PARENT_TAG: arm}
        return place | {"config_hash": trial.config_hash, "fingerprint": trial.fingerprint}

    def _place(self, trial: Trial, run: str) -> None:
        """Give a seed run its factor levels and its arm the link to the curves of its seeds."""
        arm = self._arm(trial)
        if self._mine(trial):
            self._levels(run, trial)
        else:
            self._tag(arm, {f"reused.s{trial.settings.seed}": run})
        self._runs.setdefault(trial.arm, {})[trial.key] = run
        self._note(arm, "the seeds of this arm", list(self._runs[trial.arm].values()))

    def _outcome(self, run: str, record: TrialRecord) -> None:
        """Steps made, and a failure as the ledger has it, its step also as a number that sorts."""
        self._tag(run, {"step": record.step, "diverged": str(record.diverged is not None).lower()})
        if record.diverged is None:
            return
        self._tag(run, {f"diverged.{name}": str(value).lower() for name, value in record.diverged.items()})
        self.client.log_metric(run, "diverged/step", record.diverged["step"], timestamp=0, step=0)

    def _levels(self, run: str, trial: Trial) -> None:
        for factor, level in trial.levels.items():
            self.client.log_param(run, fitting(f"factor.{factor}"), level)

    def _arm(self, trial: Trial) -> str:
        """Id of the arm's parent run; the store is asked once, as a search goes through all its runs."""
        if trial.arm not in self._arms:
            key, tags = f"arm/{self.plan.study.name}/{trial.arm}", {"level": "arm", "arm": trial.arm}
            run = self._parent(key, trial.arm, {**tags, store.PARENT_TAG: self._study})
            self._levels(run, trial)
            self._arms[trial.arm] = run
        return self._arms[trial.arm]

    @cached_property
    def _study(self) -> str:
        """Id of the study's parent run."""
        return self._parent(f"study/{self.plan.study.name}", self.plan.study.name, {"level": "study"})

    def _parent(self, key: str, name: str, tags: Mapping[str, str]) -> str:
        """Id of the run with ``key``, made if need be."""
        found = self.client.search_runs([self.experiment], filter_string=f"tags.`{STUDY_KEY_TAG}` = '{_quoted(key)}'")
        if found:
            return found[0].info.run_id
        tags = {STUDY_KEY_TAG: _quoted(key), "study": self.plan.study.name, **tags}
        run = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        self.client.set_terminated(run)
        return run

    def _tag(self, run: str, tags: Mapping[str, object]) -> None:
        for name, value in tags.items():
            self.client.set_tag(run, name, str(value))

    # --- summaries ----------------------------------------------------------------------------------------

    def summarise(self) -> None:
        """Publish what is finished, and a fresh summary run for each arm; what is left is marked as interrupted."""
        plan = self.plan.reread()
        for key in [trial.key for trial in plan.missing if trial.key in self._shown]:
            self._shown.pop(key).close("KILLED", self._offsets[key])
        summaries = []
        for trials in by_arm(plan).values():
            done = [trial for trial in trials if plan.record(trial) is not None]
            runs = [run for trial in done if (run := self.trial(trial)) is not None]
            if runs:
                summaries.append(self.summary(done[0], curves(plan, done)))
        if summaries:
            self.compare(summaries)

    def compare(self, summaries: Sequence[str]) -> str:
        """Link the study's run to the page that overlays its arms; the page's address."""
        return self._note(self._study, "the arms of this study, medians over seeds", summaries)

    def summary(self, trial: Trial, curves: Mapping[str, Sequence[BandPoint]]) -> str:
        """A new summary run of the arm of ``trial`` with curves by metric; the one before is deleted."""
        arm, name = self._arm(trial), f"{trial.arm} (summary)"
        for older in self._summaries.pop(arm, []):
            self.client.delete_run(older)
        tags = {"level": "summary", "study": self.plan.study.name, "arm": trial.arm, store.PARENT_TAG: arm}
        run = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        self._summaries[arm] = [run]
        self._levels(run, trial)
        self._log(run, curves)
        self.client.set_terminated(run)
        return run

    @cached_property
    def _summaries(self) -> dict[str, list[str]]:
        """Arm's run → its summary runs, found in one search."""
        found: dict[str, list[str]] = {}
        wanted, token = f"tags.study = '{_quoted(self.plan.study.name)}' and tags.level = 'summary'", None
        while token != "":
            page = self.client.search_runs([self.experiment], filter_string=wanted, page_token=token)
            for run in page:
                found.setdefault(run.data.tags.get(store.PARENT_TAG, ""), []).append(run.info.run_id)
            token = page.token or ""
        return found

    def _log(self, run: str, curves: Mapping[str, Sequence[BandPoint]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, 0, point.step)
            for metric, points in curves.items()
            for point in points
            for name, value in (
                (metric, point.median), (f"{metric}/low", point.low), (f"{metric}/high", point.high),
                (f"{metric}/lowest", point.lowest), (f"{metric}/highest", point.highest),
                (f"{metric}/alive", point.alive),
            )
        ]  # fmt: skip
        for start in range(0, len(metrics), POINTS_PER_REQUEST):
            self.client.log_batch(run, metrics=metrics[start : start + POINTS_PER_REQUEST])

    def _note(self, run: str, what: str, runs: Sequence[str]) -> str:
        """A link to the page that overlays ``runs``, as the run's description and a tag."""
        base = self.uri if self.uri.startswith("http") else SERVER
        url = ui.compare_url(
            base, self.experiment, runs, list(dict.fromkeys([self.plan.study.config.metric, names.LOSS_TOTAL]))
        )
        self._tag(run, {"compare": url, NOTE_TAG: f"[Curves of {what}]({url})"})
        return url


@contextmanager
def following(view: StudyView) -> Iterator[Callable[[Trial], object]]:
    """While a study runs: shows its trials every few seconds in a thread, and each once more when it has ended.

    Yields:
        what to call with a trial that has ended; leaving the block waits until those are published.
    """
    ended: queue.Queue[Trial | None] = queue.Queue()

    def follow() -> None:
        next_look = time.monotonic() + LIVE_SECONDS
        while True:
            try:
                trial = ended.get(timeout=max(0.0, next_look - time.monotonic()))
            except queue.Empty:
                view.try_live()
                next_look = time.monotonic() + LIVE_SECONDS
                continue
            if trial is None:
                return
            view.try_trial(trial)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield ended.put
    finally:
        ended.put(None)
        thread.join()


def _whereabouts(record: TrialRecord | None) -> str:
    return "unknown" if record is None else f"{record.where.get('host', '?')}:{record.where.get('directory', '?')}"


def _quoted(text: str) -> str:
    """A key that fits into MLflow's filter strings."""
    return text.replace("'", "’")
