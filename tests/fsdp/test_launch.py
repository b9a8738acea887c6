"""``torchrun -m twinrl``: one console, one line for bad input, exit codes of all processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_source import SMALL
from twinrl import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MAIN = """
import sys
from tests.fsdp.cases import register
from twinrl.cli import main
register()
sys.argv[0] = "twinrl"
main()
"""


def together(world: int, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """The command line in ``world`` processes, started as torchrun would."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(world):
        environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": os.getcwd()}
        command = [sys.executable, "-c", MAIN, *arguments]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    results = []
    for process in started:
        out, err = process.communicate(timeout=120)
        results.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return results


def alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    return together(1, *arguments)[0]


def small(runs: Path, *overrides: str) -> tuple[str, ...]:
    return ("train", "twinflow", *SMALL, f"run.dir={runs}", "machine.device=cpu", *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.batch=18",), "the rows of branch e2e cannot be shared by 2 processes equally; got 5 of 18 rows"),
        (("fsdp.blocks=[Blok]",), "fsdp.blocks names Blok, of which the network has none"),
        (("fsdp.replicate=3",), "fsdp.replicate does not divide the processes; got 3 copies on 2 processes"),
        (("train.precision=float64",), "train.precision=float64 is for one process"),
        (("optim.lrr=1",), "did you mean lr?"),
    ],
)
def test_bad_input_is_one_line_of_the_first_process(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    first, second = together(2, *small(tmp_path, *overrides))
    assert (first.returncode, second.returncode) == (2, 2)
    lines = [line for line in first.stderr.splitlines() if line.startswith("twinrl: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "twinrl: " not in second.stderr
    assert "Traceback" not in first.stderr + second.stderr
    assert not list(tmp_path.glob("*/config.yaml"))


def test_a_run_of_two_processes(tmp_path: Path) -> None:
    """From start to the final table; one process then samples from its sharded checkpoint."""
    first, second = together(2, *small(tmp_path))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert "run directory" in first.stdout
    assert "student" in first.stdout
    assert second.stdout == ""
    (run,) = tmp_path.iterdir()
    newest = checkpoints.newest(run / "checkpoints")
    assert newest is not None
    assert (newest / checkpoints.SHARDS).is_dir()
    assert (run / "result.json").is_file()
    picture = tmp_path / "samples.png"
    sampled = alone("sample", str(run), "--out", str(picture), "-n", "2")
    assert sampled.returncode == 0, sampled.stderr
    assert picture.is_file()
    other = "model.network={kind: mlp, width: 24, depth: 1, condition_width: 16}"
    refused = together(2, *small(tmp_path / "other", f"train.init={run}", other))
    assert [process.returncode for process in refused] == [2, 2]
    (line,) = [line for line in refused[0].stderr.splitlines() if line.startswith("twinrl: ")]
    assert "belong to another network" in line
    assert "Traceback" not in refused[0].stderr + refused[1].stderr
