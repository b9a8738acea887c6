"""A rank that is stuck is named, with the collective in which the others wait, and all processes end."""

import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import forked
from tests.fsdp import torchrun
from tests.fsdp.torchrun import PATIENCE
from twinrl.fsdp import mesh, watchdog
from twinrl.fsdp.watchdog import Beat, Progress, line_of, verdict

pytestmark = pytest.mark.processes
SECONDS = 6  # of silence: a quarter of them is long enough for a thread that waits its turn on a busy machine
AT_WORK = "forward and backward passes, step 12"
WAITING = Beat(9, 40, "all-reduce", AT_WORK, "engine.py:1 in backward")
WORKING = Beat(9, 39, "", AT_WORK, "reward.py:7 in score")


def test_the_rank_that_is_behind_is_named_with_its_line() -> None:
    line = verdict({0: WAITING, 1: WORKING, 2: WAITING, 3: WAITING}, silent=[], seconds=60)
    assert line.startswith(
        "rank 1 has not joined all-reduce (forward and backward passes, step 12) for 60 s; it is at reward.py:7 in "
        "score; ranks 0, 2, 3 wait there"
    )


def test_a_silent_rank_is_named_rather_than_one_that_is_behind() -> None:
    line = verdict({0: WAITING, 1: WAITING, 2: WORKING}, silent=[1], seconds=5)
    assert line.startswith("rank 1 gives no sign of life and has not joined all-reduce")


def test_a_rank_that_has_ended_is_said_to() -> None:
    ended = Beat(9, 40, left=True)
    assert "rank 2 has not joined all-reduce" in (line := verdict({0: WAITING, 1: WAITING, 2: ended}, [], 60))
    assert "it has ended" in line


def test_nobody_is_blamed_where_all_wait() -> None:
    assert verdict({0: WAITING, 1: WAITING}, [], 60).startswith("no rank has left all-reduce")


def test_the_line_is_the_innermost_outside_torch() -> None:
    line = line_of(threading.get_ident())
    assert line.startswith("watchdog.py")  # this thread is looking at itself
    asleep = threading.Thread(target=time.sleep, args=(0.5,))
    asleep.start()
    assert " in " in line_of(asleep.ident or 0)
    asleep.join()
    assert line_of(asleep.ident or 0) == "its end"


def test_progress_remembers_what_is_around() -> None:
    progress = Progress(3, "passes")
    with progress.during("losses of all ranks"):
        assert str(progress) == "losses of all ranks, step 3"
    assert progress.doing == "passes"


@pytest.mark.slow
def test_a_sleeping_rank_ends_the_run_by_name(tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    sleeping = "terms.sleeping={kind: sleeping, branches: [e2e, mul, any, adv], at: 3}"
    launcher = torchrun.start(torchrun.command(tmp_path, f"fsdp.watchdog={SECONDS}", sleeping), output)
    assert launcher.wait(PATIENCE) == 1
    lines = [line for line in output.read_text().splitlines() if line.startswith("twinrl: ")]
    assert len(lines) == 1
    waited = f"(forward and backward passes, step 3) for {SECONDS} s"
    assert f"rank 1 has not joined all-gather {waited}" in lines[0]
    assert "it is at torchrun.py" in lines[0]
    assert "rank 0 waits there" in lines[0]


def counting(folder: Path) -> None:
    """A process that does something together with the others again and again."""
    with mesh.process_group(torch.device("cpu")), watchdog.watching(SECONDS, Progress(0, "counting")):
        while True:
            dist.all_reduce(torch.ones(1))
            (folder / f"counts-{dist.get_rank()}").touch()
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.campaign)])
def test_a_stopped_process_does_not_keep_the_others(tmp_path: Path, stopped: int) -> None:
    """Neither does the one that holds the store through which they talk, which is rank 0's without torchrun."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(torchrun.free_port()), "WORLD_SIZE": "2"}
    output = tmp_path / "output.txt"
    started = [forked.start(counting, tmp_path, output=output, RANK=str(rank), **shared) for rank in range(2)]
    try:
        forked.wait_until(lambda: len(list(tmp_path.glob("counts-*"))) == 2, PATIENCE, output.read_text)
        started[stopped].send_signal(signal.SIGSTOP)
        assert started[1 - stopped].wait(PATIENCE) == 1
        expected = (
            "rank 1 gives no sign of life" if stopped else "ranks' store (rank 0, or the launcher) does not answer"
        )
        assert expected in output.read_text()
    finally:
        for process in started:
            process.kill()
