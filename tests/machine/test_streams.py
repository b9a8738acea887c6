"""Standard streams that are closed, full, of an encoding without letters, or whose reader has gone."""

import subprocess
import sys
from pathlib import Path

import pytest

PREPARED = "from twinrl.machine import streams; streams.prepare()"


def run(code: str, redirection: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A Python process that prepares its streams and goes on with ``code``, started by a shell."""
    path = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"}
    script = f'"$0" -c "$1" {redirection}'
    command = ["sh", "-c", script, sys.executable, f"{PREPARED}\n{code}"]
    return subprocess.run(command, cwd=folder, env=path | environment, capture_output=True, check=False)


@pytest.mark.slow
def test_a_file_takes_no_closed_stream_s_number(tmp_path: Path) -> None:
    code = "file = open('log', 'w')\nfile.write(str(file.fileno()))\nprint('said')\nprint('said', file=sys.stderr)"
    done = run(f"import sys\n{code}", "<&- >&- 2>&-", tmp_path)
    assert done.returncode == 0
    assert int((tmp_path / "log").read_text()) > 2


def test_what_is_started_has_streams(tmp_path: Path) -> None:
    code = "import subprocess\nopen('rc', 'w').write(str(subprocess.call(['sh', '-c', 'echo said && echo said >&2'])))"
    run(code, "<&- >&- 2>&-", tmp_path)
    assert (tmp_path / "rc").read_text() == "0"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_is_full_is_an_input_error_once(tmp_path: Path, unbuffered: str) -> None:
    code = """
from twinrl.config.errors import InputError
import sys
sys.stdout.write("")
try:
    print("said")
except InputError as error:
    streams.say(str(error))
print("lost")
"""
    done = run(code, "> /dev/full", tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 0
    assert done.stderr == b"twinrl: standard output cannot be written; got No space left on device; fix: make room\n"


@pytest.mark.slow
def test_a_line_for_people_is_said_where_it_can_be(tmp_path: Path) -> None:
    done = run("streams.say('a\\nline')", "", tmp_path)
    assert done.stderr == b"twinrl: a line\n"
    assert run("streams.say('a line')", "2> /dev/full", tmp_path).returncode == 0
    assert (
        run(r"streams.say('\x1b]0;title\x07\u202e')", "", tmp_path).stderr == rb"twinrl: \x1b]0;title\x07\u202e" + b"\n"
    )


@pytest.mark.slow
def test_a_reader_that_has_gone_is_no_failure(tmp_path: Path) -> None:
    done = run("for i in range(100000): print(i)\nopen('end', 'w')", "| head -1", tmp_path)
    assert done.stdout == b"0\n"
    assert done.stderr == b""
    assert (tmp_path / "end").exists()


def test_letters_that_the_encoding_lacks_are_escaped(tmp_path: Path) -> None:
    done = run("print('\u2016g\u2016')", "", tmp_path, PYTHONIOENCODING="ascii")
    assert done.stdout == rb"\u2016g\u2016" + b"\n"


@pytest.mark.parametrize("where", ["", "import threading; run = lambda what: threading.Thread(target=what).start()"])
def test_what_nobody_has_foreseen_is_told_without_passwords(tmp_path: Path, where: str) -> None:
    code = f"""
run = lambda what: what()
{where}
def fails():
    raise OSError("http://me:pw-handed@host is away")
run(fails)
"""
    done = run(code, "", tmp_path)
    assert b"Traceback" in done.stderr
    assert b"OSError: http://me:***@host is away" in done.stderr
    assert b"pw-handed" not in done.stderr.replace(b'raise OSError("http://me:pw-handed@host is away")', b"")
