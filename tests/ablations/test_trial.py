"""Parts of a trial that need no training: the lifeline, comparable metrics, divergence, the durable log."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ablations import plan as plans
from ablations import study as studies
from ablations import trial
from ablations.plan import Workspace
from ablations.trial import WORST
from analysis import frames
from tests.ablations.tiny import TINY, write
from tests.fake_source import register, small
from tests.training.trainers import make
from twinrl.config.errors import InputError
from twinrl.evaluation import PromptTable
from twinrl.run import names, runlog
from twinrl.stability import verdict

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
        [sys.executable, "-m", "twinrl.machine.lifeline", "sleeper"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    child = int(process.stdout.readline())
    assert alive(child)
    process.stdin.close()  # what the system does when the starter dies
    assert process.wait(120) == -9
    until(lambda: not alive(child))


RANK = "import os, pathlib, time; pathlib.Path(f'{os.getpid()}.pid').touch(); time.sleep(600)"


@pytest.mark.processes
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "killed",
    [pytest.param("starter", marks=pytest.mark.slow), pytest.param("launcher", marks=pytest.mark.campaign)],
)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_the_processes_of_a_trial_die_with_their_starter_and_with_their_launcher(tmp_path: Path, killed: str) -> None:
    """Torchrun gives each of them a session of its own, so that no signal to the launcher's group reaches them."""
    (tmp_path / "rank.py").write_text(RANK)
    values: dict[str, object] = dict.fromkeys(trial.Task.__dataclass_fields__, "")
    task = trial.Task(**values | {"workers": 2, "output": str(tmp_path / "out.txt")})  # type: ignore[arg-type]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-m", *trial._launcher(task), "twinrl.machine.lifeline", "rank"],
        stdin=subprocess.PIPE, cwd=tmp_path, env=environment, start_new_session=True,
    )  # fmt: skip
    assert process.stdin
    until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    ranks = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert all(alive(pid) and os.getsid(pid) != process.pid for pid in ranks)
    if killed == "starter":
        process.stdin.close()  # what the system does when the starter dies
    else:
        process.kill()
        process.wait()
        trial.end(process)
    until(lambda: not any(alive(pid) for pid in [process.pid, *ranks]))
    process.wait()


@pytest.mark.slow
def test_edited_sources_are_refused_before_anything_starts(tmp_path: Path) -> None:
    """Their numbers would be filed under those that the study was planned with."""
    values: dict[str, object] = dict.fromkeys(trial.Task.__dataclass_fields__, "")
    values |= {"unused": (), "deadline": None, "cwd": str(tmp_path), "directory": "run", "stop": str(tmp_path / "stop")}
    with pytest.raises(trial.TrialError, match="have changed"):
        trial.advance(trial.Task(**values | {"sources": "of yesterday"}))  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


def until(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_metrics_are_the_worst_at_a_rung(value: float, tmp_path: Path) -> None:
    assert trial.comparable(value) == WORST
    rows = [(1, 2, "0.5"), (3, 4, '"nan"'), (5, 6, "0.1")]
    lines = (f'{{"iteration": {iteration}, "step": {step}, "m": {m}}}\n' for iteration, step, m in rows)
    (tmp_path / "log.jsonl").write_text("".join(lines))
    assert [trial.at_rung(tmp_path, "m", rung) for rung in (1, 3, 5, 7)] == [WORST, 0.5, WORST, 0.1]


@pytest.mark.slow
@pytest.mark.parametrize("term", ["planted={at: 14, size: nan, row: 9, branches: [any]}", "poison={at: 14}"])
def test_a_run_that_a_rollback_rescued_has_not_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    """Trained for real: the planted nan is not in the next data order, the poison is in every one."""
    register(monkeypatch)
    rescue = ("stability.policy=rollback", "stability.rollbacks=2", "stability.rollback_margin=5")
    trainer = make(small(tmp_path, f"terms.{term}", *rescue, "train.steps=24", "checkpoint.every=5"))
    outcome = trainer.train()
    trainer.run.finish({"status": outcome.status, "step": outcome.step, "message": outcome.message})
    rows, events = runlog.read(trainer.run.log), runlog.read(trainer.run.events)
    rescued = term.startswith("planted")
    assert [row["step"] for row in rows].count(15) == (2 if rescued else 3)
    assert "diverged" in {event["kind"] for event in events}  # what happened stays on record
    found = verdict.of_run(trainer.run.path, rows)
    assert (found and (found.step, found.kind)) == (None if rescued else (15, "nonfinite"))
    line = frames.trial_of(frames.load_run(trainer.run.path))
    assert (line["status"], line["diverged"]) == ("finished", False) if rescued else ("diverged", True)
    assert (line["time"], math.isfinite(line["loss/total"])) == ((24.0, True) if rescued else (15.0, False))


@pytest.mark.slow
def test_arms_of_a_seed_are_paired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first update all arms of a seed have one loss: the same weights, data, times and noise."""
    register(monkeypatch)
    monkeypatch.setattr(plans, "_HASHES", {})
    network = {"kind": "mlp", "width": 16, "depth": 1, "condition_width": 16}
    study = studies.load(write(tmp_path / "pairs.yaml", set=TINY | {"train.steps": 1, "model.network": network}))
    loss = {}
    for one in plans.make(study, Workspace(tmp_path / "work")).trials:
        trainer = make(one.settings)
        trainer.train()
        loss[one.title] = runlog.read(trainer.run.log)[0][names.LOSS_TOTAL]
    assert loss["rate=small s0"] == loss["rate=large s0"] != loss["rate=small s1"] == loss["rate=large s1"]


def test_what_was_taken_back_is_no_value_at_a_rung(tmp_path: Path) -> None:
    rows = [(0, 4, 0.5), (1, 8, 9.0), (2, 5, 0.4)]
    lines = [json.dumps({"iteration": iteration, "step": step, "m": value}) for iteration, step, value in rows]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    assert trial.at_rung(tmp_path, "m", 8) == 0.4
    (tmp_path / "log.jsonl").write_text("\n".join([*lines[:2], lines[2].replace("m", "other")]) + "\n")
    assert trial.at_rung(tmp_path, "m", 8) == 0.5


def test_only_what_a_checkpoint_has_made_durable_counts(tmp_path: Path) -> None:
    assert trial.durable_log(tmp_path) is None
    for step, offset in ((8, 100), (4, 50)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"log_offset": offset}))
    assert trial.durable_log(tmp_path) == 100
    for damage in ("{", "{}", '{"log_offset": "100"}', '{"log_offset": -1}'):
        (tmp_path / "checkpoints" / "step-00000008" / "state.json").write_text(damage)
        with pytest.raises(InputError, match=r"state\.json is damaged"):
            trial.durable_log(tmp_path)


def task_in(folder: Path) -> trial.Task:
    """A trial whose run directory is there and empty."""
    words = dict.fromkeys(("title", "config", "output", "ledger", "stop"), "x")
    task = trial.Task(
        config_hash="c", seed=0, fingerprint="f", sources="s", unused=(), revision=None, directory="run",
        cwd=str(folder), steps=20, metric="m", workers=1, threads=1, **words,
    )  # fmt: skip
    task.path.mkdir()
    return task


def test_a_pruned_trial_is_censored_unless_it_had_diverged(tmp_path: Path) -> None:
    task = task_in(tmp_path)
    (task.path / "log.jsonl").write_text('{"iteration": 7, "step": 8, "m": 0.5, "perf/step_seconds": 0.25}\n')
    record = trial.pruned(task, 8)
    assert (record.status, record.step, record.message) == ("pruned", 8, "halved at step 8")
    assert (record.diverged, record.metrics, record.seconds, record.final) == (None, {"m": 0.5}, 0.25, False)
    (task.path / "log.jsonl").write_text(
        '{"iteration": 3, "step": 4, "m": 0.1}\n{"iteration": 4, "step": 5, "loss/total": "nan"}\n'
        '{"iteration": 7, "step": 8}\n'
    )
    broken = trial.pruned(task, 8)
    assert broken.diverged == {"step": 5, "kind": "nonfinite", "after": 4, "recovered": False}
    assert math.isnan(broken.metrics["m"]), "0.1 is from before"
    assert trial.at_rung(task.path, "m", 4) == 0.1
    assert trial.at_rung(task.path, "m", 8) == WORST


def test_the_table_of_a_family_gives_metrics_too() -> None:
    table = PromptTable({1: {"fd": 2.5, "score/edges": math.nan}, 4: {"fd": 1.5}}, n=20).as_dict()
    plain = json.loads(json.dumps(table, allow_nan=False))
    found = trial.table_metrics(plain)
    assert math.isnan(found.pop("test/score/edges_1nfe"))
    assert found == {"test/fd_1nfe": 2.5, "test/fd_4nfe": 1.5}
    assert trial.table_metrics(None) == {}


@pytest.mark.parametrize("rows", [3, [3], [{}], [{"name": "student"}], {"1": [2]}, {"1": {"fd": "low"}}])
def test_a_damaged_table_is_no_record(rows: object, tmp_path: Path) -> None:
    task = task_in(tmp_path)
    (task.path / "log.jsonl").write_text('{"iteration": 7, "step": 8}\n')
    (task.path / "result.json").write_text(json.dumps({"status": "finished", "step": 8, "table": {"rows": rows}}))
    with pytest.raises(InputError, match=r"result\.json is damaged; got table: .*; fix: delete it"):
        trial.record(task)
