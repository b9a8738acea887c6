"""Parts of a trial that need no training: the lifeline, comparable metrics, divergence, an arm's curve."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ablations import publish, trial
from ablations.ledger import Record
from ablations.trial import WORST

SLEEPER = (
    "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_trial_and_what_it_started_die_with_their_starter(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-m", "ablations.lifeline", "sleeper"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    child = int(process.stdout.readline())
    assert alive(child)
    process.stdin.close()  # what the system does when the starter dies
    assert process.wait(10) == -9
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(child)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_metrics_are_the_worst_at_a_rung(value: float, tmp_path: Path) -> None:
    assert trial.comparable(value) == WORST
    (tmp_path / "log.jsonl").write_text('{"step": 2, "m": 0.5}\n{"step": 4, "m": "nan"}\n{"step": 6, "m": 0.1}\n')
    assert [trial.at_rung(tmp_path, "m", rung) for rung in (1, 3, 5, 7)] == [WORST, 0.5, WORST, 0.1]


def test_divergence_is_the_trainers_verdict_or_what_stopped_the_run(tmp_path: Path) -> None:
    spike, verdict = {"step": 5, "kind": "spike"}, {"step": 8, "kind": "diverged", "series": "val/quality"}
    (tmp_path / "events.jsonl").write_text(json.dumps(spike) + "\n")
    assert trial.divergence(tmp_path, {"status": "finished", "step": 20}) is None
    assert trial.divergence(tmp_path, {"status": "diverged", "step": 6}) == {"step": 6, "kind": "spike"}
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in (spike, verdict)))
    assert trial.divergence(tmp_path, {"status": "finished", "step": 20}) == {"step": 8, "kind": "quality"}


def test_an_arms_curve_is_the_median_of_the_living() -> None:
    def log(*values: float) -> list[dict[str, float]]:
        return [{"step": step, "m": value} for step, value in enumerate(values, start=1)]

    def record(step: int | None) -> Record:
        diverged = None if step is None else {"step": step, "kind": "x"}
        return Record("c", 0, "f", "finished", diverged=diverged)

    logs = [(log(1, 2, 3), record(None)), (log(3, 4, 5), record(None)), (log(5, math.nan), record(2))]
    points = list(publish.curve(logs, "m"))
    assert [(p.step, p.median, p.alive) for p in points] == [(1, 3, 3), (2, 3, 2), (3, 4, 2)]
    assert all(p.low <= p.median <= p.high for p in points)
    assert list(publish.curve(logs, "absent")) == []


def test_long_curves_are_thinned() -> None:
    rows = [{"step": step, "m": 1.0} for step in range(1, 5001)]
    assert len(list(publish.curve([(rows, None)], "m"))) <= publish.MOST_POINTS
