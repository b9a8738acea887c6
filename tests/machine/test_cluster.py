"""A Ray that has gone is noticed; tests/ablations/test_loss.py kills real ones."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray._private import worker

from twinrl.machine import aftermath, cluster
from twinrl.machine.cluster import LostError, Watch


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[socket.socket, socket.socket]]:
    """What listens in the places of Ray's node on this machine and of the cluster's head."""
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0)
    monkeypatch.setattr(cluster, "LOSS_SECONDS", 0.2)
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as node, socket.socket() as head:
        node.bind(f"{folder}/raylet")  # short: names of sockets have at most 107 characters
        head.bind(("127.0.0.1", 0))
        for one in (node, head):
            one.listen()
        place = SimpleNamespace(raylet_socket_name=f"{folder}/raylet", gcs_address=f"127.0.0.1:{head.getsockname()[1]}")
        monkeypatch.setattr(worker, "_global_node", place)
        yield node, head


def look(watch: Watch, seconds: float) -> None:
    """Check for some time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        watch.check()
        time.sleep(0.01)


def test_a_node_that_closes_its_connection_has_gone(places: tuple[socket.socket, socket.socket]) -> None:
    watch = Watch()
    served, _ = places[0].accept()
    look(watch, 0.5)
    served.close()
    with pytest.raises(LostError, match="Ray's node on this machine has gone"):
        look(watch, 60)


def test_a_head_may_be_away_for_a_moment(places: tuple[socket.socket, socket.socket]) -> None:
    watch = Watch()
    port = places[1].getsockname()[1]
    places[1].close()
    watch.check()
    with socket.create_server(("127.0.0.1", port)) as again:
        look(watch, 0.5)
        again.close()
        with pytest.raises(LostError, match=f"the head of the Ray cluster at 127.0.0.1:{port} has gone"):
            look(watch, 60)


@pytest.mark.usefixtures("places")
def test_a_cluster_without_a_machine_for_a_trial() -> None:
    with pytest.raises(LostError, match="the last machine of the cluster that a trial fits on has gone"):
        look(Watch(lambda: False), 60)


@pytest.mark.usefixtures("places")
def test_a_question_that_ray_does_not_answer_is_no_loss() -> None:
    def fails() -> bool:
        raise ConnectionError

    look(Watch(fails), 0.5)


@pytest.mark.slow
def test_what_a_session_leaves_is_ended_with_its_starter(tmp_path: Path) -> None:
    """And nothing else is, nor before."""
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    server, other = (subprocess.Popen([*sleeping, f"--dir={tmp_path / name}/logs"]) for name in ("session", "other"))
    worker = subprocess.Popen(sleeping, env=os.environ | {"RAY_RAYLET_PID": "12345678"})
    (tmp_path / "session").mkdir()
    with (tmp_path / "session" / "agent.log").open("w") as log:
        agent = subprocess.Popen(["ray::Agent", *sleeping[1:]], executable=sys.executable, stdout=log)
    try:
        waiting = subprocess.Popen(
            [sys.executable, "-m", aftermath.NAME, str(tmp_path / "session"), "12345678"], stdin=subprocess.PIPE
        )
        time.sleep(0.5)
        assert [process.poll() for process in (server, worker, agent)] == [None] * 3
        waiting.communicate(timeout=60)  # closes its standard input, as the end of its starter does
        assert [process.wait(60) for process in (server, worker, agent)] == [-9] * 3
        assert other.poll() is None
    finally:
        for process in (server, worker, agent, other):
            process.kill()
            process.wait()
