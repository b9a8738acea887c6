"""``torchrun -m twinrl``: one console, one line for bad input, exit codes of all processes."""

from pathlib import Path

import pytest

from tests import forked
from tests.fsdp import torchrun
from tests.fsdp.torchrun import PATIENCE, Ended, together
from tests.logs import the_run
from twinrl.run import layout

pytestmark = [pytest.mark.slow, pytest.mark.processes]


def refused(first: Ended, second: Ended) -> str:
    """The one line that the first of two processes says."""
    assert (first.code, second.code) == (2, 2)
    (line,) = [line for line in first.errors.splitlines() if line.startswith("twinrl: ")]
    assert "twinrl: " not in second.errors
    assert "Traceback" not in first.errors + second.errors
    return line


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
    first, second = together(2, tmp_path / "output", *torchrun.command(tmp_path, *overrides))
    assert message in refused(first, second)
    assert not list(tmp_path.glob("*/config.yaml"))


def test_a_run_of_two_processes(undisturbed: tuple[Path, Ended, Ended]) -> None:
    folder, first, second = undisturbed
    assert (first.code, second.code) == (0, 0), first.errors
    assert "run directory" in first.output
    assert "student" in first.output
    assert second.output == ""
    run = the_run(folder)
    assert run is not None
    assert (run.newest_checkpoint() / layout.SHARDS).is_dir()
    assert run.result is not None
    assert run.result["step"] == torchrun.STEPS


def test_one_process_samples_from_its_checkpoint(undisturbed: tuple[Path, Ended, Ended], tmp_path: Path) -> None:
    run, picture, output = the_run(undisturbed[0]), tmp_path / "samples.png", tmp_path / "output.txt"
    assert run is not None
    sample = ("sample", str(run.path), "--out", str(picture), "-n", "2")
    assert forked.start(forked.command_line, *sample, output=output).wait(PATIENCE) == 0, output.read_text()
    assert picture.is_file()


def test_weights_of_another_network_are_refused_in_one_line(
    undisturbed: tuple[Path, Ended, Ended], tmp_path: Path
) -> None:
    run = the_run(undisturbed[0])
    assert run is not None
    other = "model.network={kind: mlp, width: 24, depth: 1, condition_width: 16}"
    started = torchrun.command(tmp_path, f"train.init={run.path}", other)
    assert "belong to another network" in refused(*together(2, tmp_path / "output", *started))
