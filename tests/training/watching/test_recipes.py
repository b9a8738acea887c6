"""docs/watch.md: each file runs as it stands, with the real library, and its event names the loss that went wrong."""

import gc
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests import pages
from twinrl.run import layout

FILES = pages.files(pages.page("watch"))
RANKS = ("ddp.py", "fsdp.py")
ALONE = [name for name in FILES if name not in ("toy.py", *RANKS)]
LONGEST = 25
FAULTS = {"published": "strokes"}
"""Run → what goes wrong in it, where that is not the toy's reward."""
STEP = 51
PER_STEP = 16


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the page's files."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    return tmp_path


def check(folder: Path, text: str) -> None:
    """Every run of a file has finished, and its spike is ``reward``'s; samples are those of its batch."""
    gc.collect()  # Lightning's objects hold each other; the end of a program would end them
    runs = sorted(path.parent for path in (folder / "runs").rglob(layout.CONFIG))
    assert runs
    for run in runs:
        (event,) = [event for event in layout.read_events(run) if event["kind"] == "spike"]
        assert (event["terms"][0], event["step"]) == (FAULTS.get(run.name, "reward"), STEP)
        assert len(layout.read_rows(run)) == 60
        if "rows=rows" in text and "from toy" in text:
            assert sorted(event["rows"]) == [PER_STEP * (STEP - 1) % 512 + i for i in range(PER_STEP)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_the_file_runs_and_the_event_names_the_loss(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile by its first half, which is where a backward pass may not be repeated; no compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    runpy.run_path(str(folder / name), run_name="__main__")
    check(folder, FILES[name])


@pytest.mark.campaign
def test_the_compiled_model_s_file_with_a_compiler(folder: Path) -> None:
    runpy.run_path(str(folder / "compiled.py"), run_name="__main__")
    check(folder, FILES["compiled.py"])


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("name", RANKS)
def test_the_file_runs_on_two_processes(name: str, folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    check(folder, FILES[name])


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_short(name: str) -> None:
    assert len(FILES[name].splitlines()) <= LONGEST
