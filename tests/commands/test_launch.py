"""``launch.workers=2``: Ray Train's processes make the run that one process makes, also when one of them is killed."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.fake_source import small
from tests.fsdp.cases import rows
from twinrl import checkpoints, cluster
from twinrl.backends import NETWORKS
from twinrl.commands.launch import QUIET, RANKS, _python_path
from twinrl.commands.train import resume, train
from twinrl.data import SOURCES
from twinrl.errors import InputError
from twinrl.schema import RunConfig
from twinrl.terms import TERMS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 60
NETWORK = "{kind: tests.commands.launched.Net, width: 16, depth: 2, condition_width: 16}"


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    """One Ray for the module; what importing the network registers is forgotten afterwards."""
    import ray

    before = SOURCES["digits"]
    cluster.connect(None, 2, QUIET | {"PYTHONPATH": _python_path(), "OMP_NUM_THREADS": "1"}, "launch.address")
    yield
    ray.shutdown()
    SOURCES["digits"] = before
    TERMS.pop("planted", None), NETWORKS.pop("scaled", None)


def settings_of(folder: Path, *overrides: str) -> RunConfig:
    return small(
        folder, f"train.steps={STEPS}", f"model.network={NETWORK}", "optim.lr=1e-4", "evaluation.every=0",
        "stability.capsules.every=0", "machine.device=cpu", *overrides,
    )  # fmt: skip


def trained(folder: Path, *overrides: str) -> tuple[RunConfig, int, str]:
    settings, output = settings_of(folder, *overrides), StringIO()
    return settings, train(settings, False, Console(file=output)), output.getvalue()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, int, str]:
    return trained(tmp_path_factory.mktemp("two"), "launch.workers=2")


def test_two_workers_make_the_run_of_one_process(two: Any, tmp_path: Path) -> None:
    settings, code, output = two
    assert code == 0
    assert f"run directory {settings.directory}" in output.replace("\n", "")
    alone, _, _ = trained(tmp_path)
    assert alone.hash == settings.hash  # how a run is launched changes no number
    for ours, theirs in zip(rows(settings), rows(alone), strict=True):
        for name in ("loss/total", "grad/total/norm_raw"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (ours["step"], name)
    newest = checkpoints.newest(settings.directory / "checkpoints")
    assert newest is not None
    assert (newest / checkpoints.SHARDS).is_dir()
    for rank in range(2):
        assert f"rank {rank} of 2: process" in (settings.directory / RANKS / f"rank-{rank}.txt").read_text()
    assert not list(settings.run.dir.glob(".launch-*"))
    again = StringIO()
    assert resume(settings.directory, Console(file=again)) == 0
    assert "nothing to resume" in again.getvalue()


def test_a_killed_worker_changes_no_number(two: Any, tmp_path: Path) -> None:
    killer = threading.Thread(target=kill_rank_1, args=(tmp_path,))
    killer.start()
    settings, code, output = trained(tmp_path, "launch.workers=2")
    killer.join()
    assert code == 0
    assert "resuming at step" in output
    assert (settings.directory / RANKS / "rank-1.txt").read_text().count("rank 1 of 2: process") == 2
    assert rows(settings) == rows(two[0])


def kill_rank_1(folder: Path) -> None:
    """SIGKILL, once there is a checkpoint."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not list(folder.glob("*/checkpoints/step-*")):
        time.sleep(0.01)
    (output,) = folder.glob(".launch-*/rank-1.txt")
    os.kill(int(output.read_text().split("process ")[1].split()[0]), signal.SIGKILL)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.batch=18",), "the rows of branch e2e cannot be shared by 2 processes equally"),
        (("launch.cpus=9",), r"launch.workers=2 need more CPUs than there are; got 2; expected 18"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trained(tmp_path, "launch.workers=2", *overrides)
    assert not list(tmp_path.glob("*"))
    assert not list(tmp_path.glob(".launch-*"))
