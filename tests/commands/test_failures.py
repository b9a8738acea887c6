"""What ends a run from outside is one line and exit code 1; a bug keeps its traceback."""

import errno

import pytest

from twinrl.commands.failures import in_one_line
from twinrl.run.checkpoints import SaveError


def failing(error: Exception) -> int:
    @in_one_line
    def command() -> int:
        raise error

    return command()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SaveError("no checkpoint can be written"), "no checkpoint can be written"),
        (OSError(errno.ENOSPC, "No space left on device", "log.jsonl"), "No space left on device"),
        (RuntimeError("[gloo/tcp/pair.cc:553] Connection closed by peer"), "another process of this training has gone"),
    ],
)
def test_one_line(error: Exception, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert failing(error) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("twinrl: ")
    assert words in line


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "no such file")])
def test_bugs_stay_bugs(error: Exception) -> None:
    with pytest.raises(type(error)):
        failing(error)
