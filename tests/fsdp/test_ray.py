"""``launch.workers=2``: Ray Train's processes make the run that torchrun's make, also when one of them is killed."""

import os
import signal
import threading
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests import forked
from tests.fake_source import small
from tests.fsdp import torchrun
from tests.fsdp.torchrun import PATIENCE, Ended
from tests.logs import rows, tensors, the_run
from twinrl.backends import NETWORKS
from twinrl.commands.processes import resume, train
from twinrl.config.errors import InputError
from twinrl.evaluation import figures
from twinrl.machine import cluster
from twinrl.run.layout import RANKS
from twinrl.terms import TERMS
from twinrl.training import schema
from twinrl.training.sources import SOURCES

pytestmark = [pytest.mark.slow, pytest.mark.processes]


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    """One Ray for the module; what importing the network changes is changed back afterwards."""
    import ray

    known = [(table, dict(table)) for table in (SOURCES, TERMS, NETWORKS)]
    drawn = {name: getattr(figures, name) for name in ("save_curves", "save_norms", "save_times")}
    cluster.connect(None, 2, "launch.address", cluster.QUIET | {"OMP_NUM_THREADS": "1"})
    yield
    ray.shutdown()
    for table, before in known:
        table.clear()
        table.update(before)
    for name, function in drawn.items():
        setattr(figures, name, function)


def kill_rank_1(folder: Path) -> None:
    """SIGKILL, once there is a checkpoint."""
    forked.wait_until(lambda: list(folder.glob("*/checkpoints/step-*")), PATIENCE)
    (output,) = folder.glob(".launch-*/rank-1.txt")
    os.kill(int(output.read_text().split("process ")[1].split()[0]), signal.SIGKILL)


def test_a_run_of_which_a_worker_is_killed_is_that_of_torchrun(
    undisturbed: tuple[Path, Ended, Ended], tmp_path: Path
) -> None:
    """To the last bit, since both are the same processes' work."""
    _, preset, *overrides = torchrun.command(tmp_path, "launch.workers=2")
    settings, output = schema.load(preset, overrides), StringIO()
    killer = threading.Thread(target=kill_rank_1, args=(tmp_path,))
    killer.start()
    code = train(settings, False, Console(file=output))
    killer.join()
    assert code == 0, output.getvalue()
    assert f"run directory {settings.directory}" in output.getvalue().replace("\n", "")
    assert "resuming at step" in output.getvalue()
    theirs, ours = the_run(undisturbed[0]), the_run(tmp_path)
    assert theirs is not None
    assert ours is not None
    assert ours.path == settings.directory
    assert ours.path.name == theirs.path.name  # how a run is launched changes no number, and not its hash
    assert rows(ours) == rows(theirs)
    assert ours.result == theirs.result
    expected, found = tensors(theirs), tensors(ours)
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    for rank in range(2):
        assert (ours.path / RANKS / f"rank-{rank}.txt").read_text().count(f"rank {rank} of 2: process") == 2
    assert not list(tmp_path.glob(".launch-*"))
    again = StringIO()
    assert resume(ours.path, Console(file=again)) == 0
    assert "nothing to resume" in again.getvalue()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(
            ("train.batch=18",), "the rows of branch e2e cannot be shared by 2 processes equally",
            marks=pytest.mark.campaign,  # the same line as under torchrun, through two more processes
        ),
        (("launch.cpus=9",), r"launch.workers=2 need more CPUs than there are; got 2; expected 18"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(small(tmp_path, "machine.device=cpu", "launch.workers=2", *overrides), False, Console(file=StringIO()))
    assert not list(tmp_path.glob("*"))
    assert not list(tmp_path.glob(".launch-*"))
