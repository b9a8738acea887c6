"""Fixtures and the order shared by all tests."""

import os
from pathlib import Path

import pytest

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:  # side by side: the cores are shared, also by the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

PROCESSES = "processes"
"""Group of what starts Ray or several ranks: under ``pytest -n`` one worker runs them all, one after the other."""


class _Grouping:
    """A file stays on one worker, for its fixtures. Before pytest-xdist looks for groups."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        together = _files_of(items, PROCESSES)
        for item in items:
            item.add_marker(pytest.mark.xdist_group(PROCESSES if item.path in together else str(item.path)))


class _LongFirst:
    """Long files first, so that no worker ends long after the others."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        together, slow = _files_of(items, PROCESSES), _files_of(items, "slow")
        place = {item.path: -index for index, item in enumerate(reversed(items))}
        items.sort(key=lambda item: (item.path not in together, item.path not in slow, place[item.path]))


def _files_of(items: list[pytest.Item], marker: str) -> set[Path]:
    return {item.path for item in items if item.get_closest_marker(marker)}


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Grouping())
    config.pluginmanager.register(_LongFirst())


@pytest.fixture(scope="session")
def lab():
    """The digits lab from the normal cache; built once, on first use."""
    from twinrl.lab import load_lab

    return load_lab(progress=False)
