"""A study on a Ray cluster that was started by hand: two nodes, of which one is killed half-way.

test_ray.py joins a study to a running Ray, loses its driver, and is refused with another token.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ablations.ledger import Ledger
from ablations.trial import checkpointed, ranks_folder
from tests.ablations.disturbing import REPOSITORY, Node, below, lines, numbers, start, trials, wait_until, words
from tests.ablations.tiny import TINY, write
from tests.logs import rows
from twinrl.config.errors import InputError
from twinrl.machine import cluster

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.processes,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc"),
]
STEPS = 80
PATIENCE = 600


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
    node = Node(folder, "first", "--head", "--num-cpus=2", f"--port={port}", f"--temp-dir={folder}",
                "--include-dashboard=false", RAY_AUTH_TOKEN_PATH=str(token))  # fmt: skip
    address = f"127.0.0.1:{port}"
    try:
        wait_until(lambda: b"Ray runtime started" in (folder / "first.txt").read_bytes(), PATIENCE)
        yield address, folder, node
    finally:
        node.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", params=[1, 2], ids=["one process a trial", "two processes a trial"])
def lost(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    lab: object,
    head: tuple[str, Path, Node],
    token: Path,
) -> tuple[int, Path, Path]:
    """Processes of a trial, and workspaces of a study on one machine, and on two nodes of which one gets lost.

    The head has two cores and the other one as many as a trial needs, so the study keeps both nodes busy.
    """
    place, workers = tmp_path_factory.mktemp("nodes"), request.param
    study = write(
        place / "nodes.yaml", set=TINY | {"train.steps": STEPS}, retries=2, seeds=4 - workers, factors={},
        design={"kind": "arms", "arms": {"only": {}}}, resources={"workers": workers},
    )  # fmt: skip
    quiet, disturbed = place / "quiet", place / "disturbed"
    assert start(study, quiet, "--cpus", "2").wait(PATIENCE) == 0, (place / "quiet.txt").read_text()
    address, folder, _ = head
    second = Node(folder, f"second-{workers}", f"--num-cpus={workers}", f"--address={address}",
                  RAY_AUTH_TOKEN_PATH=str(token), RAY_AUTH_MODE="token")  # fmt: skip
    try:
        wait_until(lambda: b"Ray runtime started" in (folder / f"second-{workers}.txt").read_bytes(), PATIENCE)
        driver = start(study, disturbed, "--address", address, RAY_AUTH_TOKEN_PATH=str(token))
        wait_until(lambda: _on_its_way(second, disturbed), PATIENCE)
    finally:
        second.kill()
    assert driver.wait(PATIENCE) == 0, (place / "disturbed.txt").read_text()
    assert "2 machines" in (place / "disturbed.txt").read_text()
    return workers, quiet, disturbed


def _on_its_way(node: Node, root: Path) -> bool:
    """Whether a trial of a workspace runs on a node and has made a third of its steps, as its checkpoints say."""
    here = " ".join(words(pid) for pid in set(trials(root)) & set(below(node.process.pid)))
    runs = [run for run in root.glob("????????/*-s?") if run.name in here]
    return any(STEPS // 3 <= checkpointed(run) < STEPS for run in runs)


def test_a_lost_node_changes_no_number(lost: tuple[int, Path, Path]) -> None:
    workers, quiet, disturbed = lost
    runs = sorted(path.relative_to(quiet) for path in quiet.glob("????????/*-s?"))
    assert len(runs) == 4 - workers
    for run in runs:
        assert rows(disturbed / run) == rows(quiet / run)
        assert len(rows(quiet / run)) == STEPS
    ours, theirs = (Ledger(root / "ledger.jsonl").read() for root in (quiet, disturbed))
    assert {key: numbers(record) for key, record in ours.items()} == {k: numbers(r) for k, r in theirs.items()}


def test_every_trial_finished_once_and_the_lost_one_went_on(lost: tuple[int, Path, Path]) -> None:
    workers, _, disturbed = lost
    assert [line["status"] for line in lines(disturbed)] == ["finished"] * (4 - workers)
    outputs = [path.read_text() for path in (disturbed / "studies" / "nodes" / "outputs").glob("*.txt")]
    assert [text.count("$ twinrl train") for text in outputs] == [1] * (4 - workers)
    assert sum(text.count("$ twinrl resume") for text in outputs) == 1
    assert trials(disturbed) == []


def test_every_process_of_a_trial_trained_at_every_start(lost: tuple[int, Path, Path]) -> None:
    workers, *roots = lost
    for output in [path for root in roots for path in (root / "studies" / "nodes" / "outputs").glob("*.txt")]:
        others = list(ranks_folder(str(output)).rglob("1/stdout.log"))
        assert len(others) == (workers - 1) * output.read_text().count("$ twinrl")


# --- one run over two nodes ---------------------------------------------------------------------------------


def test_a_run_over_two_nodes_goes_on_when_one_is_replaced(
    head: tuple[str, Path, Node], token: Path, lab: object, tmp_path: Path
) -> None:
    """``launch.workers``: a process reserves a whole node, so the two must be on different ones."""
    address, folder, _ = head
    joining = ["--num-cpus=2", f"--address={address}"]
    variables = {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_AUTH_MODE": "token"}
    lost = Node(folder, "lost", *joining, **variables)
    nodes = [lost]
    try:
        wait_until(lambda: b"Ray runtime started" in (folder / "lost.txt").read_bytes(), PATIENCE)
        launcher = launch(tmp_path, f"launch={{workers: 2, cpus: 2, retries: 9, address: '{address}'}}", **variables)
        wait_until(lambda: any(checkpointed(run) >= STEPS // 3 for run in tmp_path.glob("twinflow-*")), PATIENCE)
        lost.kill()
        nodes.append(Node(folder, "new", *joining, **variables))
        assert launcher.wait(PATIENCE) == 0, (tmp_path / "output.txt").read_text()
    finally:
        for node in nodes:
            node.kill()
    (run,) = tmp_path.glob("twinflow-*")
    assert len(rows(run)) == STEPS
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    assert "resuming at step" in (tmp_path / "output.txt").read_text()


def launch(folder: Path, *overrides: str, **variables: str) -> subprocess.Popen[bytes]:
    """``twinrl train``, with runs and output in ``folder``."""
    settings = [f"{key}={json.dumps(value)}" for key, value in (TINY | {"train.steps": STEPS}).items()]
    command = [sys.executable, "-m", "twinrl", "train", "twinflow", *settings, "tracking.mlflow=false"]
    with (folder / "output.txt").open("wb") as output:
        return subprocess.Popen(
            [*command, f"run.dir={folder}", "machine.device=cpu", *overrides], cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | variables, stdout=output, stderr=output,
        )  # fmt: skip


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
