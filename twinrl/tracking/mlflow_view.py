"""MLflow as a view of a run directory: published from the log, safe to repeat, and never in training's way.

Nothing is logged to MLflow directly. The view reads rows that a checkpoint has made durable and publishes
their thinned curves (:mod:`twinrl.tracking.thinning`), so a resumed run has neither gap nor repeat, and the
view can be thrown away and built again from the run directory alone. What was not published while training, because
the store was away, is published by::

    twinrl publish runs/<run>

*Why repeating is safe.* The points depend on the log alone, and so do their timestamps (the run's start plus
the training seconds in the rows); MLflow stores equal points once. ``mlflow.json`` in the run directory says
how far the log is published. A crash before it is written only means that some points are sent again. Before
anything is sent it takes a fingerprint of the log, so a log that was cut back and continued differently is
noticed, and the MLflow run replaced.
"""

import logging
import math
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from twinrl.config.errors import InputError
from twinrl.machine import files, known
from twinrl.run import layout, names, runlog
from twinrl.stability import verdict
from twinrl.stability.divergence import Diverged
from twinrl.tracking import moved, store
from twinrl.tracking.mlflow_run import MlflowRun
from twinrl.tracking.mlflow_state import ViewState
from twinrl.tracking.thinning import COUNTERS, MetricPoint, Thinner

ENDED_STATUSES = ("FINISHED", "FAILED", "KILLED")
logger = logging.getLogger(__name__)


class Publisher:
    """The connection of a run directory to its MLflow run; raises whatever the store raises.

    *When to use*: through :class:`MLflowView` while training, :func:`publish` after.
    """

    def __init__(self, run_dir: Path, uri: str, state: ViewState):
        self._log = run_dir / layout.LOG
        self._uri = uri
        self._state = state
        self._run = MlflowRun(run_dir, uri, state)
        self._thinner = Thinner(state.total)
        self._told: list[dict[str, Any]] = []
        for row in runlog.rows(self._log, stop=state.published):
            self._take(row)

    @property
    def run_id(self) -> str:
        """Id of the MLflow run."""
        return self._run.id

    def advance(self, offset: int) -> None:
        """Publish the rows that end at or before byte ``offset`` of the log, and new files."""
        store.probe(self._uri)
        self._state.announce(self._log, offset)
        points = []
        for row in runlog.rows(self._log, start=self._state.published, stop=offset):
            points += self._take(row)
        self._run.log_points(points)
        self._run.log_files()
        self._run.tag_events()
        self._run.tag_verdict(self._verdict())
        self._state.advance(offset)

    def _take(self, row: dict[str, Any]) -> list[MetricPoint]:
        """Take in the log's next row; the points that it completes. What tells of a failure is kept."""
        self._told.append({name: value for name, value in row.items() if name in COUNTERS or _tells(name)})
        return self._thinner.feed(row)

    def finish(self, status: str) -> None:
        """End the MLflow run, FAILED if the run failed, after what the open bucket holds; a KILLED one goes on there.

        An outcome that was measured last before the run failed ends with nan, which ranks behind every number.
        """
        failure = self._verdict()
        self._run.tag_verdict(failure)
        if status != "KILLED":
            self._run.log_points(self._thinner.flush())
            self._run.log_points(self._outdated(failure))
        self._run.finish("FAILED" if failure is not None and status != "KILLED" else status, self._thinner.seconds)

    def _verdict(self) -> Diverged | None:
        """Whether the run has failed in the rows taken in."""
        return verdict.of_run(self._log.parent, self._told)

    def _outdated(self, failure: Diverged | None) -> list[MetricPoint]:
        """A last point, nan, for each outcome whose last value is from before the failure."""
        values = verdict.final_values(runlog.surviving(self._told, self._told), names.is_outcome, failure)
        last = self._told[-1]["iteration"] if self._told else 0
        return [
            MetricPoint(name, last, value, self._thinner.seconds) for name, value in values.items() if math.isnan(value)
        ]


def _tells(name: str) -> bool:
    """Whether a verdict, or what ranks a run, needs a series."""
    return names.is_outcome(name) or verdict.telling(name)


class MLflowView:
    """The view as the trainer uses it: no method raises, whatever MLflow does.

    If MLflow is away, one warning names the command that publishes the run later. The view tries again when it is
    closed.

    Arguments:
        run_dir: the run directory, with ``log.jsonl`` and ``config.yaml``.
        uri: the MLflow store; default: ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` beside the run directory.
        experiment: name of the MLflow experiment; default: as before, at first ``twinrl``.
        tags: further tags, e.g. ``study``, ``arm``, ``config_hash``; kept for later publications.
        total: planned iterations; default: ``train.steps`` of the configuration.
        quiet: no warning when MLflow is away: the caller says it.

    *When to use*: on rank 0, with :meth:`publish_through` right after each checkpoint is on disk.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        uri: str | None = None,
        *,
        experiment: str | None = None,
        tags: Mapping[str, object] | None = None,
        total: int | None = None,
        quiet: bool = False,
    ):
        self._dir = Path(run_dir)
        self._aim = (uri, experiment, dict(tags or {}), total)
        self._publisher: Publisher | None = None
        self._away, self._quiet = False, quiet

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; None until something was published."""
        return self._publisher.run_id if self._publisher else None

    def publish_through(self, offset: int) -> bool:
        """Publish the rows up to byte ``offset`` of ``RunLog.sync``; False if MLflow does not have them."""
        return not self._away and self._guarded(offset, None)

    def close(self, status: str = "FINISHED", offset: int | None = None) -> bool:
        """Publish the rest and end the MLflow run; False if MLflow does not have it.

        Arguments:
            status: FINISHED, FAILED, or KILLED for a run to be resumed, whose last stretch stays open.
            offset: the durable length of the log; default: all of it.

        Raises:
            ValueError: another ``status``; a bug of the caller.
        """
        if status not in ENDED_STATUSES:
            raise ValueError(f"status must be one of {ENDED_STATUSES}, got {status!r}")
        return self._guarded(offset, status)

    def _guarded(self, offset: int | None, status: str | None) -> bool:
        """Publish, and end the run if there is a ``status``; a failure becomes the warning."""
        failures: tuple[type[Exception], ...] = (ImportError, OSError, InputError)
        try:
            failures += store.failures()
            with store.impatient(), _alone_with(self._dir):
                self._publisher = self._publisher or _open(self._dir, *self._aim)
                self._publisher.advance(_length(self._dir) if offset is None else offset)
                if status:
                    self._publisher.finish(status)
        except failures as error:
            self._give_up(error)
            return False
        return True

    def _give_up(self, error: Exception) -> None:
        """Warn the first time, and drop the connection."""
        if not self._away and not self._quiet:
            command = f"twinrl publish {shlex.quote(str(self._dir))}"
            logger.warning("MLflow is away (%s); training goes on. Publish the run later: %s", brief(error), command)
        self._publisher, self._away = None, True


def publish(
    run_dir: str | os.PathLike[str],
    tracking_uri: str | None = None,
    experiment: str | None = None,
    tags: Mapping[str, object] | None = None,
    final: bool = False,
) -> str:
    """Bring the MLflow run of ``run_dir`` up to date with its log, however often; returns the MLflow run id.

    Experiment, tags and store are those of the last publication, also of one that failed, where none are given.

    Arguments:
        run_dir, tracking_uri, experiment, tags: as for :class:`MLflowView`.
        final: the run does not go on at present: end the MLflow run, too, as ``result.json`` says.

    Raises:
        InputError: there is no log, or MLflow cannot be reached.
        OSError: a file of the run or of the store cannot be written.
    """
    folder = Path(run_dir)
    length = _length(folder)
    _check_readable(folder)
    try:
        with store.impatient(), _alone_with(folder):
            publisher = _open(folder, tracking_uri, experiment, tags or {}, None)
            publisher.advance(length)
            if final:
                publisher.finish(_status(folder))
    except store.failures() as error:
        if isinstance(error, OSError) and error.filename is not None:  # of a file, not of a server
            raise
        raise InputError(
            "MLflow cannot be reached",
            got=brief(error),
            fix="start its server, mend the rights of its file, or name another store",
        ) from error
    return publisher.run_id


def _check_readable(folder: Path) -> None:
    """Before anything is written or sent: raises InputError where a file of the run is damaged."""
    layout.read_config(folder)
    layout.read_environment(folder)
    layout.read_start(folder)
    layout.read_rows(folder)
    layout.read_events(folder)
    _status(folder)


def _status(folder: Path) -> str:
    """MLflow's word for how a run has ended; KILLED where it may be resumed."""
    result = layout.read_result(folder)
    if result is None:
        return "KILLED"
    return "FAILED" if result["status"] == "diverged" else "FINISHED"


@contextmanager
def _alone_with(folder: Path) -> Iterator[None]:
    """Inside, no other process publishes this run: of two that find no MLflow run each would make one."""
    busy = InputError(f"another process publishes {folder}", fix="wait for it to end, then publish again")
    with ExitStack() as stack:
        with suppress(OSError):  # of a folder that cannot be written the bookkeeping says it
            stack.enter_context(files.alone(folder / layout.MLFLOW_LOCK, busy, store.STORE_PATIENCE_SECONDS))
        yield


def _open(
    folder: Path,
    uri: str | None,
    experiment: str | None,
    tags: Mapping[str, object],
    total: int | None,
) -> Publisher:
    """A publisher for a run directory; its bookkeeping is on disk before MLflow is asked for anything."""
    state = ViewState.load(folder)
    moved.find_again(state)
    if uri is None and state.asked_for is not None:
        moved.check_there(state, state.asked_for)
    state.asked_for = uri or state.asked_for
    where = store.resolve(state.asked_for, folder.resolve().parent)
    if store.sqlite_path(where) is None:
        known.note(where)
    fits, stays = state.fits(folder / layout.LOG), state.store == store.shown(where)
    if state.run_id is not None and not (fits and stays):
        store.reach(where)  # before the bookkeeping of the store that has the run is given up
        if not stays and state.asked_for is None:
            moved.leave(state)
    if not fits:
        state.start_over()
    state.aim(store.shown(where), experiment, {name: str(tag) for name, tag in tags.items()}, total or planned(folder))
    return Publisher(folder, where, state)


def planned(folder: Path) -> int:
    """The run's planned iterations: ``train.steps`` of its configuration, else the rows it has."""
    train = layout.read_config(folder).get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    return steps if isinstance(steps, int) and steps > 0 else max(1, len(layout.read_rows(folder)))


def brief(error: Exception) -> str:
    """The first line of an error's message, shortened unless it is ours; its type where there is no message."""
    if isinstance(error, InputError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{store.shown(lines[0]):.160}" if lines else type(error).__name__


def _length(folder: Path) -> int:
    """Bytes in a run's log.

    Raises:
        InputError: there is none.
    """
    try:
        return (folder / layout.LOG).stat().st_size
    except files.GONE as error:
        raise InputError(f"{folder} has no {layout.LOG}", fix="name a run directory") from error
