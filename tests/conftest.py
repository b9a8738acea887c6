"""Fixtures and the order shared by all tests."""

import os

import pytest

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:  # side by side: the cores are shared, also by the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

PROCESSES = "processes"
"""Group of what starts Ray or several ranks: under ``pytest -n`` one worker runs them all, one after the other."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that no worker ends long after the others; a file stays on one worker, for its fixtures."""
    files = {item.path: index for index, item in enumerate(reversed(items))}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    together = {item.path for item in items if item.get_closest_marker(PROCESSES)}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(PROCESSES if item.path in together else str(item.path)))
    items.sort(key=lambda item: (item.path not in together, item.path not in slow, -files[item.path]))


@pytest.fixture(scope="session")
def lab():
    """The digits lab from the normal cache; built once, on first use."""
    from twinrl.lab import load_lab

    return load_lab(progress=False)
