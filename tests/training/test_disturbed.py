"""What disturbs a training from outside: a second one, a closed terminal, an impatient Ctrl-C."""

import os
import pty
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import forked
from tests.fake_source import SMALL
from tests.logs import rows, the_run
from twinrl.run import layout
from twinrl.training.runs import RunDirectory
from twinrl.training.trainer import StepOutcome, Trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="terminals as Linux has them"),
]
PATIENCE = 300
QUIET = (*SMALL, "tracking.mlflow=false", "evaluation.every=0", "machine={device: cpu, threads: 1}")
SLOW_GIT = """#!/bin/sh
touch "$ASKED"
while [ ! -e "$ANSWERED" ]; do sleep 0.02; done
"""


def train(folder: Path, *more: str) -> tuple[str, ...]:
    """The command line of a run under a folder."""
    return "train", "twinflow", *QUIET, f"run.dir={folder / 'runs'}", *more


def run_of(folder: Path) -> RunDirectory:
    run = the_run(folder / "runs")
    assert run is not None
    return run


@pytest.mark.parametrize("fresh", [(), ("--fresh",)], ids=["new", "fresh"])
def test_of_two_trainings_of_a_run_directory_one_is_refused(tmp_path: Path, fresh: tuple[str, ...]) -> None:
    """The first one is held up before its run exists, by a git that does not answer."""
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text(SLOW_GIT)
    git.chmod(0o755)
    asked, answered = tmp_path / "asked", tmp_path / "answered"
    slow = {"PATH": f"{git.parent}:{os.environ['PATH']}", "ASKED": str(asked), "ANSWERED": str(answered)}
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    holder = forked.start(forked.command_line, *train(tmp_path, *fresh), output=first, **slow)
    try:
        forked.wait_until(lambda: asked.exists() or holder.poll() is not None, PATIENCE, first.read_text)
        late = forked.start(forked.command_line, *train(tmp_path, *fresh), output=second, **slow)
        assert late.wait(PATIENCE) == 2
        assert second.read_text().startswith("twinrl: another process is training this run: ")
    finally:
        answered.touch()
    assert holder.wait(PATIENCE) == 0, first.read_text()
    assert [row["step"] for row in rows(run_of(tmp_path))] == list(range(1, 13))


def in_terminal(terminal: str, *arguments: str) -> None:
    """The command line in a session of its own that a terminal belongs to."""
    os.setsid()
    opened = os.open(terminal, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(opened, stream)
    os.close(opened)
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which a training would heed
    forked.command_line(*arguments)


@contextmanager
def watched(terminal: int) -> Iterator[list[bytes]]:
    """Inside, what is printed is taken; then the terminal is closed, for which nobody may be reading any more."""
    closing, said = threading.Event(), list[bytes]()

    def read() -> None:
        while not closing.is_set():
            if select.select([terminal], [], [], 0.05)[0]:
                said.append(os.read(terminal, 1 << 16))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield said
    finally:
        closing.set()
        thread.join()
        os.close(terminal)


def test_a_closed_terminal_costs_no_step(tmp_path: Path) -> None:
    """Its SIGHUP comes from the system, and once more from the shell."""
    ours, its = pty.openpty()
    arguments = train(tmp_path, "train.steps=100000", "checkpoint={every: 5, keep: 1}")
    with watched(ours) as said:
        process = forked.start(in_terminal, os.ttyname(its), *arguments, output=tmp_path / "output.txt")
        begun = "runs/*/checkpoints/step-*"
        forked.wait_until(lambda: list(tmp_path.glob(begun)) or process.poll() is not None, PATIENCE)
    os.close(its)
    assert process.poll() is None, b"".join(said).decode()
    process.send_signal(signal.SIGHUP)
    assert process.wait(PATIENCE) == 130
    run = run_of(tmp_path)
    assert run.result is None
    assert layout.step_of(run.newest_checkpoint()) == rows(run)[-1]["step"]


def held_up(folder: str, *arguments: str) -> None:
    """The command line, whose sixth step ends only with the process; says with files what it has come to."""
    step = Trainer.train_step

    def train_step(trainer: Trainer) -> StepOutcome:
        while trainer.step == 5:
            Path(folder, "asked" if trainer.interrupted else "reached").touch()
            time.sleep(0.02)
        return step(trainer)

    Trainer.train_step = train_step  # type: ignore[method-assign]
    forked.command_line(*arguments)


@pytest.mark.parametrize(
    ("every", "said"),
    [
        (4, "stopped at once, at step 5; what came after the checkpoint of step 4 is lost; continue with: "),
        (5, "stopped at once, at step 5; continue with: "),
        (0, "stopped at once, at step 5; what came after the start is lost; continue with: "),
    ],
)
def test_a_second_ctrl_c_says_what_is_on_disk(tmp_path: Path, every: int, said: str) -> None:
    output = tmp_path / "output.txt"
    arguments = train(tmp_path, f"checkpoint.every={every or 1000}")
    process = forked.start(held_up, str(tmp_path), *arguments, output=output)
    for come_to in ("reached", "asked"):
        there = (tmp_path / come_to).exists
        forked.wait_until(lambda there=there: there() or process.poll() is not None, PATIENCE, output.read_text)
        process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == (130 if every == 5 else 1), output.read_text()
    text = " ".join(output.read_text().split())
    assert said in text
    assert "checkpoint written" not in text
