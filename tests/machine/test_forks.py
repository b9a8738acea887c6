"""Programs that are forks of one which has made the imports: their output, exit codes, and whom they outlive."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from twinrl.machine import forks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="trials fork on Linux alone")

IMPORTED = "print('imported')\nimport os\nMAKER = os.getpid()\n"
PROGRAM = """
import os, sys, time, made
print(sys.argv[1:], made.MAKER != os.getpid(), flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[forks.Server]:
    (tmp_path / "made.py").write_text(IMPORTED)
    (tmp_path / "program.py").write_text(PROGRAM)
    with (tmp_path / "imports.txt").open("ab") as output:
        made = forks.Server(["made"], str(tmp_path), os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, output)
        yield made
    for pipe in (made.process.stdin, made.process.stdout):
        assert pipe
        pipe.close()
    made.process.wait(60)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_programs_share_the_imports_and_nothing_else(server: forks.Server, tmp_path: Path) -> None:
    for number, code in enumerate((0, 3)):
        program = server.start(["program", "0", str(code)], tmp_path / f"{number}.txt")
        assert program.wait() == code
        assert program.poll() == code
        assert (tmp_path / f"{number}.txt").read_text() == f"['0', '{code}'] True\n"
    assert (tmp_path / "imports.txt").read_text() == "imported\n"


def test_a_program_is_signalled_alone(server: forks.Server, tmp_path: Path) -> None:
    program = server.start(["program", "600", "0"], tmp_path / "out.txt")
    assert program.poll() is None
    assert os.getsid(program.pid) == program.pid
    program.send_signal(signal.SIGTERM)
    assert program.wait() == -signal.SIGTERM
    program.send_signal(signal.SIGTERM)  # nobody's by now
    assert server.alive


def test_a_program_ends_with_whoever_asked_for_it(server: forks.Server, tmp_path: Path) -> None:
    program = server.start(["program", "600", "0"], tmp_path / "out.txt")
    assert server.process.stdin
    server.process.stdin.close()  # what the system does when they die
    assert program.wait() in (-signal.SIGKILL, forks.SIGKILLED)
    assert server.process.wait(60) == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_server_that_is_killed_says_so(server: forks.Server, tmp_path: Path, when: str) -> None:
    if when == "after":
        program = server.start(["program", "600", "0"], tmp_path / "out.txt")
        server.process.kill()
        assert program.wait() == forks.SIGKILLED
        os.killpg(program.pid, signal.SIGKILL)
    server.process.kill()
    until(lambda: not server.alive)
    with pytest.raises(ChildProcessError, match="imports failed"):
        server.start(["program", "0", "0"], tmp_path / "out.txt")


def test_imports_that_fail_are_in_the_output(tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text("raise OSError('no such library')")
    with (tmp_path / "imports.txt").open("ab") as output:
        server = forks.Server(["made"], str(tmp_path), os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, output)
    with pytest.raises(ChildProcessError):
        server.start(["program"], tmp_path / "out.txt")
    assert "no such library" in (tmp_path / "imports.txt").read_text()
