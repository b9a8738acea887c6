"""Seeds that share a process: grouped by arm, recorded one by one, alone in their failures, resumed after a kill."""

import json
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from disturbing import trials
from tiny import TINY, write

from ablations import packing, plan
from ablations import study as studies
from ablations.cluster import Machine
from ablations.fingerprint import fingerprint
from ablations.packing import PackError
from ablations.plan import Plan, Workspace
from ablations.runner import Runner
from ablations.trial import Task
from twinrl import schema
from twinrl.errors import InputError
from twinrl.schema import RunConfig
from twinrl.tracking import names, runlog

SMALL = TINY | {
    "model.network": {"kind": "mlp", "width": 16, "depth": 1, "condition_width": 16},
    "train.init": "random",
}


def task(arm: str, seed: int) -> Task:
    values: dict[str, object] = dict.fromkeys(Task.__dataclass_fields__, "")
    return Task(**values | {"config_hash": arm, "seed": seed, "title": f"{arm} s{seed}"})  # type: ignore[arg-type]


def test_groups_are_seeds_of_one_arm_in_the_order_of_the_plan() -> None:
    tasks = [task(arm, seed) for seed in range(5) for arm in "ab"]
    found = [[one.title for one in group] for group in packing.groups(tasks, 2)]
    assert found == [
        ["a s0", "a s1"], ["b s0", "b s1"], ["a s2", "a s3"], ["b s2", "b s3"], ["a s4"], ["b s4"],
    ]  # fmt: skip


def test_the_number_packed_is_part_of_a_trials_identity() -> None:
    base = schema.load("twinflow").model_dump(mode="json") | {"machine": {"device": "cpu", "threads": 1}}
    settings = RunConfig.model_validate(base)
    found = [fingerprint(settings, "content", packed=packed) for packed in (1, 2, 3)]
    assert len(set(found)) == 3
    assert found[0] == fingerprint(settings, "content")


def test_an_error_reaches_the_driver_with_everybodys_reason() -> None:
    error = pickle.loads(pickle.dumps(PackError({"key": "why"})))
    assert error.messages == {"key": "why"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"resources": {"packed": 2, "workers": 2}}, "packed seeds share one process"),
        ({"resources": {"packed": 2}, "stop": {"kind": "asha"}}, "packed seeds can't be halved"),
    ],
)
def test_what_can_not_be_packed_is_refused(tmp_path: Path, content: dict[str, object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        studies.load(write(tmp_path / "bad.yaml", **content))


# --- real studies -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(lab: object) -> Iterator[Runner]:
    """One Ray for the module; ``lab`` is built before, if need be."""
    with Runner(Machine(cpus=1), Console(file=StringIO(), width=120)) as started:
        yield started


def made(folder: Path, packed: int, **content: object) -> Plan:
    """Three seeds of one arm."""
    folder.mkdir(exist_ok=True)
    arms = {"kind": "arms", "arms": {"only": {}}}
    whole = {"set": SMALL, "factors": {}, "design": arms, "seeds": 3, "resources": {"packed": packed}} | content
    return plan.make(studies.load(write(folder / "packed.yaml", **whole)), Workspace(folder / "work"))


def lines(folder: Path) -> list[tuple[str, int]]:
    records = map(json.loads, (folder / "work" / "ledger.jsonl").read_text().splitlines())
    return sorted((record["status"], record["seed"]) for record in records)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_failing_seed_is_alone_and_tried_again_alone(runs: Runner, tmp_path: Path) -> None:
    """Seed 1 has a run directory that can't be resumed; the others of its process finish."""
    study = made(tmp_path, 3)
    broken = study.trials[1].run
    broken.start(study.trials[1].settings, fresh=False)
    torn = broken.checkpoints / "step-00000004"
    torn.mkdir()
    (torn / "state.json").write_text("torn")
    done, failures = runs.run(study)
    assert lines(tmp_path) == [("failed", 1), ("finished", 0), ("finished", 2)]
    assert [line.split("only s")[1][0] for line in failures] == ["1"]
    assert [done.state(trial) for trial in done.trials] == ["finished", "failed", "finished"]
    shutil.rmtree(broken.path)
    done, failures = runs.run(done)
    assert (failures, done.missing) == ([], [])
    assert lines(tmp_path) == [("failed", 1), ("finished", 0), ("finished", 1), ("finished", 2)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_process_is_resumed_and_equals_separate_runs(runs: Runner, tmp_path: Path) -> None:
    """Against the same seeds without packing, which are other trials to the ledger; in double precision to 1e-8."""
    double = SMALL | {"train.precision": "float64"}
    quiet, failures = runs.run(made(tmp_path / "quiet", 1, set=double))
    assert (failures, quiet.missing) == ([], [])
    killer = threading.Thread(target=_kill_once, args=(tmp_path / "killed" / "work",))
    killer.start()
    killed, failures = runs.run(made(tmp_path / "killed", 3, set=double, retries=1))
    killer.join()
    assert (failures, killed.missing) == ([], [])
    outputs = list((tmp_path / "killed" / "work").glob("studies/packed/outputs/*-s?.txt"))
    assert [path.read_text().count("3 packed into one process") for path in outputs] == [2, 2, 2]
    for one, other in zip(quiet.trials, killed.trials, strict=True):
        assert one.key != other.key
        a, b = ([row[names.LOSS_TOTAL] for row in runlog.read(t.run.log)] for t in (one, other))
        assert len(a) == 20
        assert b == pytest.approx(a, rel=1e-8)
    assert lines(tmp_path / "killed") == [("finished", seed) for seed in range(3)]


def _kill_once(root: Path) -> None:
    """SIGKILL the training process once it has made a checkpoint."""
    _wait(lambda: list(root.glob("????????/*-s?/checkpoints/step-*")) and trials(root))
    os.kill(trials(root)[0], signal.SIGKILL)


def _wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 600
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
