"""The pages of studies in a store: where ``twinrl ui`` opens.

A study's run has the tags ``level`` (``study``), ``study`` (its name) and ``compare`` (the address of its first page).
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from twinrl.config.errors import InputError
from twinrl.config.loading import read_yaml
from twinrl.run import layout
from twinrl.tracking import moved, store
from twinrl.tracking.mlflow_state import ViewState

EXPERIMENT = "ablations"
LEVEL, STUDY, PAGE = "level", "study", "compare"
WORKSPACE = Path("runs/ablations")
"""Where ``twinrl ablate`` keeps studies unless told otherwise."""
RUNS = "runs"
"""The folder of runs where no subject is named."""
FOLDERS = "studies"
"""The folder of studies in a workspace."""
FILES = (".yaml", ".yml")
OF_SQLITE = """
    SELECT study.value, page.value FROM runs
    JOIN tags AS level ON level.run_uuid = runs.run_uuid AND level.key = ? AND level.value = ?
    JOIN tags AS study ON study.run_uuid = runs.run_uuid AND study.key = ?
    JOIN tags AS page ON page.run_uuid = runs.run_uuid AND page.key = ?
    WHERE runs.lifecycle_stage = 'active' ORDER BY runs.start_time DESC
"""


def located(subject: str, uri: str | None) -> tuple[str, str | None]:
    """The store that ``twinrl ui SUBJECT`` opens, and the study that is named in it, if one is.

    Arguments:
        subject: a run directory, a folder of them, a study's name or YAML file, or its folder in a workspace.
        uri: the store; default: where the run was published, else the environment's, else that of the folder, or of
            the default workspace.

    Raises:
        InputError: a run from elsewhere names the store.
    """
    path = Path(subject)
    if layout.is_run(path):
        state = ViewState.load(path)
        moved.find_again(state)
        if uri is None and state.store is not None:
            moved.check_own(path, state.store)
        return store.resolve(uri or state.store, path.resolve().parent), None
    if path.is_dir() and path.resolve().parent.name == FOLDERS:
        return store.resolve(uri, path.resolve().parents[1]), path.resolve().name
    if path.is_dir() or subject == RUNS or (path.name != subject and path.suffix not in FILES):
        return store.resolve(uri, path), None
    name = str(read_yaml(path).get("name", path.stem)) if path.is_file() else subject.removesuffix(path.suffix)
    return store.resolve(uri, WORKSPACE), name


def pages(uri: str) -> dict[str, str]:
    """Study → what follows a server's address on its first page, the newest study first.

    Raises:
        InputError: the store can't be asked.
    """
    failures = (sqlite3.Error,) if (database := store.sqlite_path(uri)) is not None else store.failures()
    try:
        found = _of_sqlite(database) if database is not None else _of_server(uri)
    except failures as error:
        raise InputError(
            f"the MLflow store {store.shown(uri)} can't be read", got=str(error).splitlines()[0]
        ) from error
    newest: dict[str, str] = {}
    for study, page in found:
        newest.setdefault(study, f"/#{page.partition('/#')[2]}")
    return newest


def _of_sqlite(database: Path) -> list[tuple[str, str]]:
    if not database.is_file():
        return []
    with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as connection:
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'tags'").fetchone() is None:
            return []  # a store that was never used
        return connection.execute(OF_SQLITE, (LEVEL, STUDY, STUDY, PAGE)).fetchall()


def _of_server(uri: str) -> list[tuple[str, str]]:
    with store.impatient():
        client = store.connect(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        wanted = f"tags.{LEVEL} = '{STUDY}'"
        runs = client.search_runs([experiment.experiment_id], filter_string=wanted) if experiment else []
        return [(run.data.tags[STUDY], run.data.tags[PAGE]) for run in runs if PAGE in run.data.tags]


def page_of(study: str, found: dict[str, str], uri: str) -> str:
    """The page of a study. Raises InputError where the store has none of it."""
    if study not in found:
        raise InputError(
            f"the store {store.shown(uri)} shows no study {study}",
            expected=f"one of {', '.join(found)}" if found else None,
            fix=f"twinrl ablate run {study}, or name a folder of runs as ./{study}",
        )
    return found[study]
