"""MLflow on both sides: a study read from an experiment, addresses of published runs, reports as artifacts."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from analysis import ledger
from analysis.frames import BOOKKEEPING, Run, StudyFrame, assemble
from twinrl.config.errors import InputError
from twinrl.run import names
from twinrl.tracking import moved, pictures, store, ui
from twinrl.tracking.mlflow_state import ViewState

FACTOR = "factor."
FOLDER = "report"
REPORT_TAG = "twinrl.report"
NONFINITE_PREFIX = "nonfinite/"
"""Before a metric's name: how many of its values were not finite."""
MOST_LINKS = 60
STATUS = {"FINISHED": "finished", "FAILED": "diverged"}
"""How a run ended by MLflow's status, where no tag says it."""


def mlflow_links(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(name, address) of a page that overlays the runs' losses, and of each run; empty if none was published.

    Of many runs only the first :data:`MOST_LINKS` are there. A store that cannot be reached gives no links: the
    report does not depend on it.
    """
    states = ((run.name, state) for run in runs if (state := moved.published(run.path)))
    published = dict(islice(states, MOST_LINKS))
    stores = {str(state.store) for state in published.values()}
    if len(stores) != 1:
        return []
    uri = stores.pop()
    if _is_gone(uri):
        return []
    base = store.pages(uri)
    failures: tuple[type[Exception], ...] = store.failures()
    try:
        with store.impatient():
            client = store.connect(uri)
            experiments = {name: client.get_run(state.run_id).info.experiment_id for name, state in published.items()}
    except failures:
        return []
    ids = [str(state.run_id) for state in published.values()]
    title = "all curves" if len(ids) < MOST_LINKS else f"curves of the first {MOST_LINKS}"
    overlay = (title, ui.compare_url(base, next(iter(experiments.values())), ids))
    return [overlay, *((n, ui.run_url(base, experiments[n], run)) for n, run in zip(published, ids, strict=True))]


def log_report(runs: Sequence[Run], folder: Path, name: str) -> str | None:
    """Log a report's folder as artifacts, below ``report/``, and its figures as pictures among the charts.

    They go to the run's own MLflow run, or to the study's.

    A study's MLflow run is what all its published runs have above them; where they have nothing in common, a run
    ``report <name>`` is made in their experiment, once. A store that cannot be reached gets nothing.

    Returns:
        The address of the MLflow run, None where nothing was published.
    """
    states = [state for run in runs if (state := moved.published(run.path))]
    uri = str(states[0].store) if states else ""
    if len({state.store for state in states}) != 1 or _is_gone(uri):
        return None
    failures: tuple[type[Exception], ...] = store.failures()
    try:
        with store.impatient():
            client = store.connect(uri)
            run = cache(client.get_run)
            first = run(states[0].run_id)
            target = first if len(states) == 1 else _above(run, states) or _for_reports(client, first, name)
            client.log_artifacts(target.info.run_id, str(folder), FOLDER)
            pictures.show(client, target.info.run_id, sorted(folder.glob("figures/*.png")), FOLDER)
    except failures:
        return None
    return ui.run_url(store.pages(uri), target.info.experiment_id, target.info.run_id)


def _above(run: Callable[[str], Any], states: Sequence[ViewState]) -> Any | None:
    """The topmost run that all published ones are below of, by their parent tags; None if there is none.

    Arguments:
        run: id → MLflow run; an arm, which many runs are below of, is asked for once.
    """
    tops = {state.tags.get(store.PARENT_TAG) or str(state.run_id) for state in states}
    while above := {parent for top in tops if (parent := run(top).data.tags.get(store.PARENT_TAG))}:
        tops = above | {top for top in tops if not run(top).data.tags.get(store.PARENT_TAG)}
    return run(tops.pop()) if len(tops) == 1 else None


def _for_reports(client: Any, run: Any, name: str) -> Any:
    """The run that holds reports about ``name`` in the experiment of ``run``; made if need be."""
    experiment, key = run.info.experiment_id, name.replace("'", "’")
    if found := client.search_runs([experiment], filter_string=f"tags.`{REPORT_TAG}` = '{key}'"):
        return found[0]
    made = client.create_run(experiment, run_name=f"report {name}", tags={REPORT_TAG: key})
    client.set_terminated(made.info.run_id)
    return made


def _is_gone(uri: str) -> bool:
    """Whether a sqlite store does not exist; connecting would make it."""
    database = store.sqlite_path(uri)
    return database is not None and not database.is_file()


# --- reading ----------------------------------------------------------------------------------------------


def from_mlflow(uri: str, experiment: str, base: str | None = None) -> StudyFrame:
    """A study from an MLflow experiment: finished runs with tags ``arm`` and ``seed``, last metrics, params.

    Arguments:
        uri: the store. experiment: its name, or ``experiment/study`` for the runs with that tag ``study``.
        base: as for a study in files.

    *When to use*: where only the MLflow store is at hand; it has neither events nor the time that a run took.

    Raises:
        InputError: the store is away, or has no such experiment or no such runs.
    """
    if _is_gone(uri):
        raise InputError(f"there is no MLflow store at {uri}", fix="check --tracking-uri")
    try:
        with store.impatient():
            client = store.connect(uri)
            name, _, study = experiment.partition("/")
            found = client.get_experiment_by_name(name)
            runs = list(client.search_runs([found.experiment_id], max_results=5000)) if found else []
            seeds = [run for run in runs if "seed" in run.data.tags and run.data.tags.get("study", "") in (study, "")]
            lines = [_from_mlflow_run(client, run) for run in seeds if run.info.status != "RUNNING"]
    except store.failures() as error:
        raise InputError("MLflow cannot be reached", got=str(error).splitlines()[0], fix="check the store") from error
    if not lines:
        raise InputError(f"MLflow has no finished runs of {experiment!r}", expected="runs with a tag seed", got=uri)
    params = {key for line in lines for key in line if "." in key}
    params = {key for key in params if key.startswith(FACTOR)} or params
    varying = sorted(key for key in params if len({line.get(key) for line in lines}) > 1)
    kept = [{k: v for k, v in line.items() if "." not in k or k in varying} for line in lines]
    return assemble(experiment, kept, varying, base=base)


def _from_mlflow_run(client: Any, run: Any) -> dict[str, Any]:
    """A run's line. A study's tags hold its verdict; of a run by itself MLflow's own status says what they lack."""
    tags, params = run.data.tags, run.data.params
    status = tags.get("status") or STATUS.get(run.info.status, "unfinished")
    step = _steps_made(client, run)
    failure = None
    if tags.get("diverged") == "true" or status == "diverged":
        after, recovered = tags.get("diverged.after", math.nan), tags.get("diverged.recovered") == "true"
        failure = {"step": int(tags.get("diverged.step", step)), "after": after, "recovered": recovered}
        failure["kind"] = tags.get("diverged.kind", "")
    settings = {k: v for k, v in params.items() if "." in k and k.split(".")[0] not in BOOKKEEPING}
    base = {
        "arm": tags.get("arm") or tags.get("config_hash", "run"),
        "seed": int(tags["seed"]),
        "config_hash": tags.get("config_hash", ""),
        "status": status,
        "step": step, "planned": int(params.get("train.steps", step)),
        **ledger.failed(failure, step), "seconds": math.nan, "directory": "", "rollbacks": math.nan,
    }  # fmt: skip
    return settings | base | _outcomes(client, run)


def _steps_made(client: Any, run: Any) -> int:
    """From the study's tag, else the last iteration of a series that every row has; a rollback repeats steps there."""
    planned = int(run.data.params.get("train.steps", 1))
    if (made := run.data.tags.get("step")) is not None:
        return int(made)
    return min(planned, _last_iteration(client, run, names.STEP_SECONDS, default=planned - 1) + 1)


def _outcomes(client: Any, run: Any) -> dict[str, float]:
    """The last values. The store holds finite ones alone: where its counter of others is ahead, the last was one."""
    values = {name: float(value) for name, value in run.data.metrics.items() if names.is_outcome(name)}
    counters = {
        name.removeprefix(NONFINITE_PREFIX): name for name in run.data.metrics if name.startswith(NONFINITE_PREFIX)
    }
    for name, counter in ((name, counter) for name, counter in counters.items() if names.is_outcome(name)):
        if _last_iteration(client, run, counter) > _last_iteration(client, run, name, default=-1):
            values[name] = math.nan
    return values


def _last_iteration(client: Any, run: Any, metric: str, default: int = 0) -> int:
    return max((point.step for point in client.get_metric_history(run.info.run_id, metric)), default=default)
