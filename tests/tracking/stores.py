"""One migrated MLflow store for all tests: making one takes seconds."""

import os
from pathlib import Path

import pytest

from twinrl.machine import files
from twinrl.tracking import store


def empty(factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty sqlite store to copy, made once even where several workers ask for it."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # the parent is this session's own
    database = shared / "empty-store" / store.DATABASE_NAME
    with (shared / "empty-store.lock").open("a") as lock:
        files.lock(lock, TimeoutError("another worker makes the store"), patience=120)
        if not database.exists():
            database.parent.mkdir()
            made = database.with_suffix(".made")
            store.prepare(f"sqlite:///{made}")
            made.rename(database)
    return database
