"""Fixtures and the order shared by all tests."""

import os
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Also for the processes that tests start. More threads make small tensors no faster, on a busy machine much slower."""

os.environ.setdefault("RAY_worker_niceness", "0")
"""Ray gives its workers the lowest priority but four; beside other work the trials of a test would stand still."""

if "ATEN_CPU_CAPABILITY" in os.environ:
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
"""On a processor with AMX, torch 2.13 asks oneDNN whether to pack bf16 matrices, and its own portable code cannot."""

TOGETHER = ("processes", "laboratory")
"""Markers of files that one worker of ``pytest -n`` runs, one after the other: those that start Ray or several ranks,
and those that need the digits' laboratory, which the others would wait for while it is built."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests for GPUs skip where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first, then those of many tests, so that no worker ends long after the others."""
    if config.pluginmanager.hasplugin("randomly"):
        return
    marked = {name: {item.path for item in items if item.get_closest_marker(name)} for name in (*TOGETHER, "slow")}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda i: (*(i.path not in paths for paths in marked.values()), -tests[i.path], i.path))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """A file stays on one worker, for its fixtures (marks of groups do not reach pytest-xdist 3.8 under pytest 9)."""

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(config.rootpath / nodeid.partition("::")[0])

    return ByFile(config, log)


@cache
def _group(file: Path) -> str:
    return next((name for name in TOGETHER if f"mark.{name}" in file.read_text()), str(file))


@pytest.fixture(scope="session")
def whole_lab():
    """The digits' laboratory from the normal cache; built once, on first use, in minutes."""
    from twinrl.lab import load_lab

    return load_lab(progress=False)


@pytest.fixture(scope="session")
def quick_lab():
    """The digits' laboratory, built in a few steps: judge and codec know digits, text means nothing."""
    from twinrl.lab import load_lab
    from twinrl.lab.load import DEFAULT

    steps = {"codec": 60, "judge": 40, "clip": 20, "hps": 20, "preference_judge": 20, "teacher": 20}
    short = {name: replace(getattr(DEFAULT, name), steps=count) for name, count in steps.items()}
    return load_lab(progress=False, recipe=replace(DEFAULT, **short))


@pytest.fixture(scope="session", params=["quick_lab", pytest.param("whole_lab", marks=pytest.mark.campaign)])
def lab(request: pytest.FixtureRequest):
    """The digits' laboratory, the quick one and, in a campaign, that of everybody."""
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def _servers_of_tests_alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests name as servers is not what their user has named."""
    from twinrl.machine import known

    monkeypatch.setattr(known, "place", lambda: tmp_path_factory.getbasetemp() / "servers")
