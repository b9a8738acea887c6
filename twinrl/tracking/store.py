"""Where MLflow keeps its data, and how to reach it quietly, lazily and without waiting for long.

The default store of a run is ``mlflow.db`` (sqlite) beside the run directories, with artifacts in
``mlartifacts`` next to it. An explicit URI goes before the environment's ``MLFLOW_TRACKING_URI``, and that
before the default. mlflow is imported here and nowhere else, on first use (1.3 s).
"""

import logging
import os
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from twinrl.config.errors import InputError
from twinrl.config.secrets import shown
from twinrl.machine import files

LOCAL = "http://127.0.0.1:5000"
"""Where ``twinrl ui`` serves by default."""
DATABASE_NAME = "mlflow.db"
ARTIFACTS_NAME = "mlartifacts"
STORE_PATIENCE_SECONDS = 5
MAKING_SECONDS = 120
"""How long to wait for another process that makes the same store."""
PARENT_TAG = "mlflow.parentRunId"
NAME_TAG = "mlflow.runName"
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
CHATTY_LOGGERS = ("mlflow", "alembic", "sqlalchemy", "urllib3")
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # opens the pages for training runs
IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(STORE_PATIENCE_SECONDS), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


def without_password(uri: str | None) -> str | None:
    """``uri`` itself. Raises InputError where it holds a password, which would be written and printed."""
    if uri is not None and shown(uri) != uri:
        raise InputError(
            f"the tracking URI {shown(uri)} holds a password",
            fix="leave it out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_URI)",
        )
    return uri


def pages(uri: str) -> str:
    """The address under which people open a store's pages, without user and password; a store that is no server has
    those that ``twinrl ui`` serves by default."""
    if not uri.startswith(("http://", "https://")):
        return LOCAL
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


def resolve(uri: str | None, runs_dir: Path) -> str:
    """The store to use: ``uri``, else ``MLFLOW_TRACKING_URI``, else sqlite in ``runs_dir``."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(runs_dir)


def default_uri(runs_dir: Path) -> str:
    """The sqlite store that belongs to a folder of runs."""
    return f"sqlite:///{runs_dir.resolve() / DATABASE_NAME}"


def sqlite_path(uri: str) -> Path | None:
    """The database file of a sqlite URI, None for every other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def is_of_environment(uri: str) -> bool:
    """Whether ``MLFLOW_TRACKING_URI`` names this store, too."""
    return shown(uri) == shown(os.environ.get("MLFLOW_TRACKING_URI", ""))


def failures() -> tuple[type[Exception], ...]:
    """What a store that is away, locked or broken raises; imports mlflow."""
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError)


@contextmanager
def impatient() -> Iterator[None]:
    """Inside, HTTP stores get 5 s and no second try, unless the user set these, and loggers keep quiet."""
    added = {name: value for name, value in IMPATIENT.items() if name not in os.environ}
    loggers = [logging.getLogger(name) for name in CHATTY_LOGGERS]
    levels = [logger.level for logger in loggers]
    os.environ.update(added)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def connect(uri: str) -> Any:
    """An ``MlflowClient`` for ``uri``, once a database store answers; a missing sqlite store is made.

    MLflow's own start-up would retry for more than a minute on a database that is away. The first sqlite store
    takes it some 6 s to make.

    Raises:
        one of :func:`failures`: the store is away, locked, not writable or of another MLflow version.
    """
    probe(uri)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    database = sqlite_path(uri)
    if database is None:
        with impatient():
            return mlflow.MlflowClient(tracking_uri=uri)
    with impatient(), _alone_with(database):
        if not database.exists() or database.stat().st_size == 0:
            _make(database)
        _check_own(database)
        client = mlflow.MlflowClient(tracking_uri=uri)
        _keep_beside(database)
    return client


def _check_own(database: Path) -> None:
    """Raises sqlite3.DatabaseError for another program's, into which MLflow would put its tables."""
    with closing(sqlite3.connect(database, timeout=STORE_PATIENCE_SECONDS)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and "experiments" not in tables:
            raise sqlite3.DatabaseError(f"{database} is another program's database")


def _make(database: Path) -> None:
    """A new store, whole or not there: one that a kill has left half-made MLflow can't go on with.

    A copy of an empty one of this MLflow, which the cache keeps.
    """
    import mlflow

    empty = files.cache_dir() / f"mlflow-{mlflow.__version__}.db"
    with _nothing_left(database), files.publishing(database) as new:
        try:
            _copy(empty, new)
        except (OSError, sqlite3.Error):  # none yet, or a damaged one
            mlflow.MlflowClient(tracking_uri=f"sqlite:///{new}")
            with suppress(OSError, sqlite3.Error):  # a cache that cannot be written: the next store is made, too
                empty.parent.mkdir(parents=True, exist_ok=True)
                with files.publishing(empty) as kept:
                    _copy(new, kept)


@contextmanager
def _nothing_left(database: Path) -> Iterator[None]:
    """Where the block fails, as on a full disk, the empty file that :func:`probe` has made goes away."""
    try:
        yield
    except BaseException:
        if database.is_file() and database.stat().st_size == 0:
            database.unlink()
        raise


def _copy(store: Path, new: Path) -> None:
    """A whole store without its experiments, of which MLflow makes the first where a store lies."""
    files.check_plain(store)
    with closing(sqlite3.connect(f"file:{quote(str(store))}?mode=ro", uri=True)) as old:
        if old.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError(f"{store} is damaged")
        with closing(sqlite3.connect(new)) as made, made:
            old.backup(made)
            made.execute("DELETE FROM experiments")


@contextmanager
def _alone_with(database: Path) -> Iterator[None]:
    """Inside, no other process makes or migrates the store: of two at once, MLflow fails in one."""
    busy = sqlite3.OperationalError("another process is making it")
    with ExitStack() as stack:
        with suppress(OSError):  # in a folder that cannot be written none is made
            stack.enter_context(files.alone(database.with_name(f".{database.name}.lock"), busy, MAKING_SECONDS))
        yield


def _keep_beside(database: Path) -> None:
    """Let the experiments of a sqlite store, which may have been moved, keep their artifacts beside it."""
    with closing(sqlite3.connect(database, timeout=STORE_PATIENCE_SECONDS)) as connection, connection:
        for name, old in connection.execute("SELECT name, artifact_location FROM experiments").fetchall():
            new = _artifact_location(name, f"sqlite:///{database}")
            if new is None or old == new or _tail(old) != _tail(new):
                continue
            connection.execute("UPDATE experiments SET artifact_location = ? WHERE name = ?", (new, name))
            connection.execute(
                "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE substr(artifact_uri, 1, ?) = ?",
                (new, len(old) + 1, len(old) + 1, f"{old}/"),
            )


def _tail(location: str | None) -> list[str]:
    """The last two parts of a location: the folder of artifacts, and the experiment."""
    return (location or "").rsplit("/", 2)[1:]


def has_run(uri: str, run_id: str | None) -> bool:
    """Whether a sqlite store is there and has an active run of this id."""
    database = sqlite_path(uri)
    if run_id is None or database is None or not database.is_file():
        return False
    with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as connection:
        try:
            asked = "SELECT 1 FROM runs WHERE run_uuid = ? AND lifecycle_stage = 'active'"
            return connection.execute(asked, (run_id,)).fetchone() is not None
        except sqlite3.OperationalError:  # no table: a store that was never used
            return False


def delete_run(client: Any, run_id: str) -> None:
    """Delete a run, unless it is gone already."""
    from mlflow.exceptions import MlflowException

    try:
        if client.get_run(run_id).info.lifecycle_stage == "active":
            client.delete_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def probe(uri: str) -> None:
    """Raise OSError or sqlite3.Error within seconds if a database store is out of reach or locked."""
    if database := sqlite_path(uri):
        database.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(database, timeout=STORE_PATIENCE_SECONDS, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        return
    parts = urlsplit(uri)
    port = DATABASE_PORTS.get(parts.scheme.split("+")[0])
    if port and parts.hostname:
        socket.create_connection((parts.hostname, parts.port or port), timeout=STORE_PATIENCE_SECONDS).close()


def reach(uri: str) -> None:
    """Ask the store for anything; raises one of :func:`failures` where it is away."""
    connect(uri).search_experiments(max_results=1)


def experiment_id(client: Any, name: str, uri: str) -> str:
    """The id of experiment ``name``, made or restored if need be; several processes may ask at once."""
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(name)) is None:
        try:
            return client.create_experiment(name, _artifact_location(name, uri), tags=EXPERIMENT_TAGS)
        except MlflowException:
            if (found := client.get_experiment_by_name(name)) is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def _artifact_location(experiment: str, uri: str) -> str | None:
    """A folder beside a sqlite store, whatever the experiment's name is; every other store decides for itself."""
    database = sqlite_path(uri)
    inside = [part for part in experiment.split("/") if part not in ("", ".", "..")]
    return database.resolve().parent.joinpath(ARTIFACTS_NAME, *inside).as_uri() if database else None


def prepare(uri: str) -> None:
    """Make or migrate the store ahead of time, e.g. before several trials start at once.

    Raises:
        one of :func:`failures`.
    """
    with impatient():
        reach(uri)
