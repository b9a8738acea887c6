"""The MLflow view of a study: study → arm → seed, built from ledger and run logs, safe to repeat.

Seed runs are twinrl's own views of run directories (:mod:`twinrl.tracking.mlflow_view`), here with the tags
``study``, ``arm`` and the factor levels as parameters. They grow while trials run, by the rows that a checkpoint has
made durable: what a resumed trial cuts off and repeats was never shown. A study and an arm are parent runs. When its
last trial has ended an arm gets a fresh summary run (:mod:`ablations.summary`) in place of the one before, so that
charts compare arms and not single lucky runs; the study's pages (:mod:`ablations.pages`) show those. A trial that
belongs to several studies stays where it was published first; the others link to it by tags.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial

from ablations import pages
from ablations.display import by_arm
from ablations.ledger import TrialRecord
from ablations.plan import Plan, Trial
from ablations.summary import Curve, alive, curves, logs_of
from ablations.trial import durable_log
from twinrl.config.errors import InputError
from twinrl.run import names
from twinrl.tracking import mlflow_view, store, studies, ui, views
from twinrl.tracking.mlflow_run import POINTS_PER_REQUEST, fitting
from twinrl.tracking.mlflow_state import ViewState
from twinrl.tracking.mlflow_view import MLflowView

EXPERIMENT = studies.EXPERIMENT
STUDY_KEY_TAG = "twinrl.study_key"
NOTE_TAG = "mlflow.note.content"
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
        self._published: dict[str, str | None] = {}
        self._summarised: dict[str, int] = {}
        self._series: dict[str, pages.Extent] = {}
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
        """:meth:`trial`, and the summary of an arm that it completes, where it can't be in the way.

        What fails now is published by :meth:`try_summaries`.
        """
        self._try(lambda: self._complete(trial))

    def _complete(self, trial: Trial) -> None:
        self.trial(trial)
        plan = self.plan.reread()
        trials = by_arm(plan)[trial.arm]
        if all(plan.record(other) is not None for other in trials):
            self._summarise(plan, trials)

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
        self._published[trial.key] = run
        return run

    def _mine(self, trial: Trial) -> bool:
        """Whether no other study has published the trial's run first."""
        return ViewState.load(trial.run.path).tags.get("study", self.plan.study.name) == self.plan.study.name

    def _tags(self, trial: Trial, arm: str, mine: bool) -> dict[str, object]:
        """A seed run's tags. A run that another study published first only learns that this one uses it, too."""
        name, seed = self.plan.study.name, trial.settings.seed
        member: dict[str, object] = {f"study.{name}": trial.arm}
        if not mine:
            return member
        title = f"{trial.arm} · s{seed}"
        place = {"study": name, "arm": trial.arm, "seed": seed, store.PARENT_TAG: arm, store.NAME_TAG: title}
        return member | place | {"config_hash": trial.config_hash, "fingerprint": trial.fingerprint}

    def _place(self, trial: Trial, run: str) -> None:
        """Give a seed run its factor levels and its arm the link to the curves of its seeds."""
        arm = self._arm(trial)
        if self._mine(trial):
            self._levels(run, trial)
        else:
            self._tag(arm, {f"reused.s{trial.settings.seed}": run})
        self._runs.setdefault(trial.arm, {})[trial.key] = run
        self._note_seeds(arm, list(self._runs[trial.arm].values()))

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
        """Id of the study's parent run, whose tags name the factors' levels."""
        study = self.plan.study
        run = self._parent(f"study/{study.name}", study.name, {"level": "study"})
        for factor, levels in study.factors.items():
            self.client.set_tag(run, f"factor.{factor}", ", ".join(levels))
        return run

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
        """Publish what is finished, the arms' summaries and the study's pages; what is left counts as interrupted."""
        plan = self.plan.reread()
        for key in [trial.key for trial in plan.missing if trial.key in self._shown]:
            self._shown.pop(key).close("KILLED", self._offsets[key])
        for trials in by_arm(plan).values():
            done = [trial for trial in trials if plan.record(trial) is not None]
            for trial in done:
                if trial.key not in self._published:
                    self.trial(trial)
            if any(self._published[trial.key] for trial in done):
                self._summarise(plan, done)
        if self._summarised:
            self.compare()

    def compare(self) -> str:
        """Lay out the study's pages and link its run to them; the address of the norms by term and arm."""
        name, metric = self.plan.study.name, self.plan.study.config.metric
        for page, view in pages.views(name, metric, self._series).items():
            views.save(self.client, self.experiment, _page_key(name, page), view)
        at = {
            page: views.address(self.experiment, _page_key(name, page), page != pages.DIVERGED) for page in pages.TITLES
        }
        links = "\n".join(f"- [{title}]({at[page].removeprefix('/')})" for page, title in pages.TITLES.items())
        shown = f"{self._base}{at[pages.NORMS]}"
        self._tag(self._study, {"compare": shown, NOTE_TAG: f"{self.plan.study.config.question}\n\n{links}"})
        self._count()
        return shown

    def _count(self) -> None:
        """Say in the study's run how many trials have ended, and how many have diverged."""
        plan = self.plan.reread()
        ended = [record for trial in plan.trials if (record := plan.record(trial)) is not None]
        counts = {"trials": len(ended), "diverged": sum(record.diverged is not None for record in ended)}
        for name, count in counts.items():
            if count:  # no bar has no height
                self.client.log_metric(self._study, name, count, timestamp=0, step=0)

    def _summarise(self, plan: Plan, trials: Sequence[Trial]) -> None:
        """The summary of an arm's ended ``trials``, unless it is there."""
        if self._summarised.get(trials[0].arm) != len(trials):
            logs = logs_of(plan, trials)
            self.summary(trials, curves(logs), alive(logs))
            self._summarised[trials[0].arm] = len(trials)

    def summary(
        self, trials: Sequence[Trial], curves: Iterable[tuple[str, Curve]], living: Iterable[tuple[int, int]]
    ) -> str:
        """A new summary run of an arm; the one before is deleted.

        Arguments:
            trials: of the arm. curves: its series. living: (step, seeds alive).
        """
        arm, name = self._arm(trials[0]), f"{trials[0].arm} · {len(trials)} seed{'s' * (len(trials) != 1)}"
        for older in self._summaries.pop(arm, []):
            self.client.delete_run(older)
        tags = {"level": "summary", "study": self.plan.study.name, "arm": trials[0].arm, store.PARENT_TAG: arm}
        tags[views.COLOUR_TAG] = self._colour(trials[0])
        run = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        self._summaries[arm] = [run]
        self._levels(run, trials[0])
        self._log(run, curves, living)
        self.client.set_terminated(run)
        return run

    def _colour(self, trial: Trial) -> str:
        """The arm's colour, as in the report's figures."""
        from analysis.plots import colour

        return colour([arm.name for arm in self.plan.study.arms].index(trial.arm))

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

    def _log(self, run: str, curves: Iterable[tuple[str, Curve]], living: Iterable[tuple[int, int]]) -> None:
        """Send an arm's curves, a request's worth at a time."""
        from mlflow.entities import Metric

        batch = [Metric(pages.ALIVE, float(count), 0, step) for step, count in living]
        for name, curve in curves:
            key = fitting(name)
            self._series[key] = self._series.get(key, pages.Extent()).with_curve(curve)
            for metric, values in zip(pages.bands(key), (curve.median, curve.low, curve.high), strict=True):
                batch += [
                    Metric(metric, float(value), 0, int(step)) for step, value in zip(curve.step, values, strict=True)
                ]
            while len(batch) >= POINTS_PER_REQUEST:
                self.client.log_batch(run, metrics=batch[:POINTS_PER_REQUEST])
                batch = batch[POINTS_PER_REQUEST:]
        self.client.log_batch(run, metrics=batch)

    def _note_seeds(self, arm: str, runs: Sequence[str]) -> None:
        """Link an arm's run to the pages that overlay its seeds."""
        links = {
            "gradient norm": ui.compare_url("", self.experiment, runs, [names.GRAD_TOTAL_RAW], log_scale=True),
            self.plan.study.config.metric: ui.compare_url("", self.experiment, runs, [self.plan.study.config.metric]),
        }
        listed = "\n".join(f"- [{title}]({at.removeprefix('/')})" for title, at in links.items())
        self._tag(arm, {NOTE_TAG: f"The seeds of this arm:\n\n{listed}"})

    @property
    def _base(self) -> str:
        """The address of the store's pages."""
        return store.pages(self.uri)


def _page_key(study: str, page: str) -> str:
    return f"{study}-{page}"


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
