"""A study whose Ray dies, in whole or in part, ends within half a minute in one line, and leaves no process behind."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ablations.disturbing import Node, below, progress, start, wait_until, words
from tests.ablations.tiny import write

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.processes,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc"),
]
PATIENCE, PROMISED = 300, 30
SETTINGS = {
    "model.network": {"kind": "tests.ablations.fake_trial.Net", "width": 16, "depth": 1, "condition_width": 16},
    "train.init": "random", "train.batch": 16, "train.steps": 100_000, "checkpoint.every": 4,
    "evaluation": {"every": 0, "n": 20, "nfe": [1], "teacher_steps": 1, "velocity_rows": 5, "grid_samples": 1},
}  # fmt: skip
AGAIN = "continue with: twinrl ablate run"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, as names of sockets have to be."""
    with tempfile.TemporaryDirectory(prefix="loss-", ignore_cleanup_errors=True) as made:
        yield Path(made)


def begun(folder: Path, *options: str, retries: int = 0, **variables: str) -> subprocess.Popen[bytes]:
    """A study whose only trial has a checkpoint and will not end."""
    study = write(
        folder / "study.yaml", set=SETTINGS, factors={}, design={"kind": "arms", "arms": {"only": {}}}, seeds=1,
        retries=retries,
    )  # fmt: skip
    driver = start(study, folder / "work", *options, **variables)
    wait_until(lambda: progress(folder / "work") > 0 or driver.poll() is not None, PATIENCE)
    assert driver.poll() is None, said(folder)
    return driver


def said(folder: Path) -> str:
    return " ".join((folder / "work.txt").read_text().split())


def ends(driver: subprocess.Popen[bytes]) -> int:
    """The exit code, within the seconds that are promised."""
    began = time.monotonic()
    code = driver.wait(PATIENCE)
    assert time.monotonic() - began < PROMISED
    return code


def child(driver: subprocess.Popen[bytes], name: str) -> int:
    """The one of all that a study has started whose command line has ``name``."""
    (found,) = (pid for pid in below(driver.pid) if name in words(pid))
    return found


def gone(pids: list[int]) -> Callable[[], bool]:
    return lambda: not any(map(words, pids))


@pytest.mark.parametrize("name", ["raylet/raylet", "gcs_server", "RuntimeEnvAgent", "DashboardAgent"])
@pytest.mark.parametrize("asked", [(), (signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)], ids=["left", "term", "int"])
def test_its_own_session(folder: Path, name: str, asked: tuple[signal.Signals, ...]) -> None:
    driver = begun(folder, "--cpus", "1")
    own = below(driver.pid)
    os.kill(child(driver, name), signal.SIGKILL)
    for request in asked:
        time.sleep(0.5)
        driver.send_signal(request)
    assert ends(driver) in ((1, 130, -15) if asked else (1,)), said(folder)
    text = said(folder)
    assert asked or AGAIN in text
    assert "Traceback" not in text
    assert "Raylet is terminated" not in text
    wait_until(gone(own), PROMISED)


@pytest.mark.parametrize("lost", ["head", "agent"])
def test_a_machine_of_a_cluster(folder: Path, lost: str) -> None:
    """The head has no core, so that the trial is on the other one; the study itself runs beside the other one."""
    (folder / "token").write_text("0123456789abcdef" * 4)
    token = {"RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_AUTH_MODE": "token"}
    address = f"127.0.0.1:{free_port()}"
    port, store = f"--port={address.rpartition(':')[2]}", f"--temp-dir={folder}/ray"
    head = Node(folder, "head", "--head", port, store, "--num-cpus=0", "--include-dashboard=false", **token)
    agent = None
    try:
        wait_until(lambda: "Ray runtime started" in (folder / "head.txt").read_text(), PATIENCE)
        agent = Node(folder, "agent", f"--address={address}", "--num-cpus=1", **token)
        wait_until(lambda: "Ray runtime started" in (folder / "agent.txt").read_text(), PATIENCE)
        driver = begun(folder, "--address", address, retries=3, **token)
        (head if lost == "head" else agent).kill()
        assert ends(driver) == 1, said(folder)
        assert AGAIN in said(folder)
    finally:
        for node in (agent, head):
            if node is not None:
                node.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
