"""A study on a Ray cluster that was started by hand: two nodes, of which one is killed half-way."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from disturbing import REPOSITORY, below, lines, numbers, progress, rows, start, trials, wait_until
from tiny import TINY, write

from ablations.ledger import Ledger
from twinrl import cluster
from twinrl.errors import InputError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300 if "NODES" not in os.environ else 1800),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc"),
]
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
STORE = "--object-store-memory=80000000"
STEPS = 80
PATIENCE = 240


class Node:
    """One Ray node of this machine; leaving its block kills it and all that it started."""

    def __init__(self, folder: Path, name: str, *arguments: str, **variables: str):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | variables
        with (folder / f"{name}.txt").open("wb") as output:
            self.process = subprocess.Popen(
                [*RAY, STORE, f"--node-name={name}", *arguments],
                cwd=REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        """SIGKILL to the raylet and its workers, as when the machine loses power; trials have to notice."""
        for pid in [*below(self.process.pid, stop="ablations.lifeline"), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


minutes = pytest.mark.skipif("NODES" not in os.environ, reason="two nodes take minutes to start and lose: set NODES=1")


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("token") / "auth_token"
    path.write_text("0123456789abcdef" * 4)
    return path


@pytest.fixture(scope="module")
def head(token: Path) -> Iterator[tuple[str, Path, Node]]:
    """A cluster of one node that asks for ``token``: its address, its folder and the node."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: names of sockets have at most 107 characters
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    node = Node(folder, "first", "--head", f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false",
                RAY_AUTH_TOKEN_PATH=str(token))  # fmt: skip
    address = f"127.0.0.1:{port}"
    try:
        wait_until(lambda: b"Ray runtime started" in (folder / "first.txt").read_bytes(), PATIENCE)
        yield address, folder, node
    finally:
        node.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def roots(
    tmp_path_factory: pytest.TempPathFactory, lab: object, head: tuple[str, Path, Node], token: Path
) -> tuple[Path, Path]:
    """Workspaces of a study on one machine, and on two nodes of which the second is lost with a trial on it."""
    place = tmp_path_factory.mktemp("nodes")
    study = write(place / "nodes.yaml", set=TINY | {"train.steps": STEPS}, retries=1, seeds=2)
    quiet, disturbed = place / "quiet", place / "disturbed"
    assert start(study, quiet, "--cpus", "2").wait(PATIENCE) == 0, (place / "quiet.txt").read_text()
    address, folder, _ = head
    second = Node(folder, "second", f"--address={address}", RAY_AUTH_TOKEN_PATH=str(token), RAY_AUTH_MODE="token")
    try:
        wait_until(lambda: b"Ray runtime started" in (folder / "second.txt").read_bytes(), PATIENCE)
        driver = start(study, disturbed, "--address", address, RAY_AUTH_TOKEN_PATH=str(token))
        wait_until(lambda: progress(disturbed) >= STEPS // 2 and _on(second, disturbed), PATIENCE)
    finally:
        second.kill()
    assert driver.wait(PATIENCE) == 0, (place / "disturbed.txt").read_text()
    assert "2 machines" in (place / "disturbed.txt").read_text()
    return quiet, disturbed


def _on(node: Node, root: Path) -> bool:
    """Whether a trial of a workspace runs on a node."""
    return bool(set(trials(root)) & set(below(node.process.pid)))


@minutes
def test_a_lost_node_changes_no_number(roots: tuple[Path, Path]) -> None:
    quiet, disturbed = roots
    runs = sorted(path.relative_to(quiet) for path in quiet.glob("????????/*-s?"))
    assert len(runs) == 4
    for run in runs:
        assert rows(disturbed / run) == rows(quiet / run)
    ours, theirs = (Ledger(root / "ledger.jsonl").read() for root in roots)
    assert {key: numbers(record) for key, record in ours.items()} == {k: numbers(r) for k, r in theirs.items()}


@minutes
def test_every_trial_finished_once_and_the_lost_one_went_on(roots: tuple[Path, Path]) -> None:
    assert [line["status"] for line in lines(roots[1])] == ["finished"] * 4
    outputs = [path.read_text() for path in (roots[1] / "studies" / "nodes" / "outputs").glob("*.txt")]
    assert sorted(text.count("$ twinrl train") for text in outputs) == [1, 1, 1, 1]
    assert sum(text.count("$ twinrl resume") for text in outputs) == 1
    assert trials(roots[1]) == []


# --- joining ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables", [{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another token"}, {"RAY_AUTH_MODE": "disabled"}]
)
def test_another_token_is_refused_in_one_line(
    head: tuple[str, Path, Node], variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="does not take this machine's authentication token") as caught:
        cluster.probe(head[0], "--address")
    assert "\n" not in str(caught.value)
    assert "fix: copy ~/.ray/auth_token" in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere", ":80"])
def test_an_unreachable_cluster_is_refused(address: str) -> None:
    with pytest.raises(InputError, match=r"no Ray cluster at 127|is no address"):
        cluster.probe(address, "--address")
