"""The report for a GPU: parts that fail, outlast their time or are stopped, and a whole one in small on the CPU."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests.benchmarks.scripts import FOLDER, script
from twinrl.machine.simulated.memory import Peak
from twinrl.machine.simulated.work import GPUS, Estimate
from twinrl.training.simulated import Report

gpu, simulated = script("gpu"), script("simulated")


def python(name: str, code: str, limit: float = 60) -> object:
    return gpu.Part(name, [sys.executable, "-c", code], limit)


def test_a_part_that_fails_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    chosen = [
        python("first", "print('in vain'); raise SystemExit(3)"),
        python("endless", "import time; print('waits', flush=True); time.sleep(600)", limit=1),
        python("last", "print('well')"),
    ]
    assert gpu.report("cpu", chosen, tmp_path / "report.md") == 1
    text = (tmp_path / "report.md").read_text()
    for said in ("first: failed, exit code 3", "in vain", "endless: failed: not finished after 1 s", "waits",
                 "last: passed", "well"):  # fmt: skip
        assert said in text, said
    assert "[2/3] endless" in capsys.readouterr().out


def test_stopped_it_keeps_what_it_has(tmp_path: Path) -> None:
    chosen = [python("first", "print('well')"), python("second", "import time; time.sleep(600)"), python("third", "")]
    pid = os.getpid()
    real, begun = gpu.run, threading.Event()

    def run(part: object) -> object:
        if part is chosen[1]:
            threading.Timer(1, lambda: os.kill(pid, signal.SIGINT)).start()
            begun.set()
        return real(part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "run", run)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a worker of the tests ignores
        try:
            assert gpu.report("cpu", chosen, tmp_path / "report.md") == 130
        finally:
            signal.signal(signal.SIGINT, before)
    assert begun.is_set()
    text = (tmp_path / "report.md").read_text()
    assert "first: passed" in text
    assert "second: stopped" in text
    assert "third: " not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "sees no CUDA device; fix: --device cpu" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--out", str(tmp_path), "--only", "nothing"])


def test_the_home_folder_is_not_told(tmp_path: Path) -> None:
    outcome = gpu.Outcome(python("one", ""), "failed", 1, f"in {Path.home()}/somewhere")
    assert str(Path.home()) not in gpu.page("cpu", [outcome.part], [outcome])


def test_both_stand_side_by_side() -> None:
    peaks = {"backward": Peak(11_000_000_000, "twinrl/training/trainer.py:1", {"student": 11_000_000_000})}
    report = Report(
        "sd35", 1, (8, 4), 1000, {}, peaks, 10, 10, 10, {name: Estimate(0.5, 0.4) for name in GPUS}, waits=[]
    )
    way = {"seconds": 2.0, "memory": 10_000_000_000, "waits": ["moving.py:1", "moving.py:2"]}
    measured = {"model": "m", "batch": 8, "micro_batch": 4, "ways": [way], "machine": {"device": "NVIDIA H200"}}
    text = simulated.table(report, measured)
    assert "| peak of memory, GB | 11 | 10 | +10.0% |" in text
    assert "| seconds of a step, on an H200 at least | 0.5 | 2 | × 4 |" in text
    assert "| waits of the host | 0 | 2 |" in text
    assert "- `moving.py:2`" in text


@pytest.mark.campaign
def test_the_whole_report_in_small(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(FOLDER / "gpu.py"), "--device", "cpu", "--out", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert done.returncode == 0, text
    assert json.loads((tmp_path / "large_model.json").read_text())["size"] == "tiny"
    assert "| peak of memory, GB |" in text
