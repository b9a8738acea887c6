"""Run directories that were moved or copied, alone or with their store: each has one MLflow run, and it is here.

A default store lies beside its run directories, so a move takes it along or leaves it behind.
"""

import os
from contextlib import suppress
from pathlib import Path

from twinrl.config.errors import InputError
from twinrl.machine import known
from twinrl.run.layout import MLFLOW
from twinrl.tracking import store
from twinrl.tracking.mlflow_state import ViewState


def find_again(state: ViewState) -> None:
    """Let the bookkeeping speak of the store that was moved along, or, in a copy, of no MLflow run yet."""
    beside = store.default_uri(state.folder.resolve().parent)
    if state.store != store.shown(beside) and store.has_run(beside, state.run_id):
        state.asked_for = state.asked_for and beside
        state.store = store.shown(beside)
    elif copied(state):
        state.start_over(replaces=False)


def copied(state: ViewState) -> bool:
    """Whether the directory in which the state was written is another one that has it still."""
    if state.home is None or state.home == state.here:
        return False
    with suppress(OSError, InputError):  # not there, not ours to read, or of something else
        there = Path(state.home)
        return (
            (there / MLFLOW).is_file()
            and not os.path.samefile(there, state.folder)
            and ViewState.load(there).key == state.key
        )
    return False


def published(folder: Path) -> ViewState | None:
    """What shows a run directory in MLflow; None where nothing does, or what it says of that is not to be followed.
    Another program's log is no folder, and nowhere shown.

    Raises:
        InputError: its bookkeeping is damaged.
    """
    if not folder.is_dir():
        return None
    state = ViewState.load(folder)
    find_again(state)
    if state.store is None or state.run_id is None or is_strange(state.store):
        return None
    beside = store.shown(store.default_uri(folder.resolve().parent))
    by_default = state.asked_for is None and store.sqlite_path(state.store) is not None
    return None if by_default and _moved(state) and state.store != beside else state


def is_strange(uri: str) -> bool:
    """Whether a store that a run directory names is not to be followed: a server that this user has never named may be
    anybody's, and is sent reports, and this user's token."""
    return store.sqlite_path(uri) is None and not store.is_of_environment(uri) and not known.has(uri)


def check_own(folder: Path, uri: str) -> None:
    """Raises InputError where the store that a run directory names :func:`is_strange`."""
    if is_strange(uri):
        raise InputError(
            f"{folder} names the MLflow store {uri}, which you have not named yet",
            fix="name it with --tracking-uri if you trust it",
        )


def check_there(state: ViewState, asked_for: str) -> None:
    """Raises InputError where a run directory names a strange server (:func:`check_own`), or has been moved and names a
    sqlite store that is gone: it would be made anew there."""
    check_own(state.folder, asked_for)
    database = store.sqlite_path(asked_for)
    if _moved(state) and state.run_id is not None and database is not None and not database.is_file():
        raise InputError(
            f"the MLflow store {database}, which has the run that was moved to {state.folder}, is gone",
            fix="name its new place, or another store, with --tracking-uri",
        )


def _moved(state: ViewState) -> bool:
    """Whether the state was written elsewhere; unknown, and so not, of older versions' states."""
    return state.home not in (None, state.here)


def leave(state: ViewState) -> None:
    """Delete the MLflow run that a moved run directory has in the default store of its old place.

    Raises:
        one of :func:`twinrl.tracking.store.failures`.
    """
    database = store.sqlite_path(state.store or "")
    if _moved(state) and state.run_id is not None and database is not None and database.is_file():
        store.delete_run(store.connect(f"sqlite:///{database}"), state.run_id)
