"""Studies in Ray, with real trials in processes of their own; what becomes of many outcomes is in test_running.py."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from ablations import plan as plans
from ablations import study as studies
from ablations.cluster import Machine
from ablations.plan import Plan, Trial, Workspace
from ablations.runner import Runner
from tests.ablations.disturbing import COMMAND, REPOSITORY, lines, start, trials, wait_until
from tests.ablations.planted import plant
from tests.ablations.tiny import without_figures, write
from tests.fake_source import FakeSource
from tests.logs import rows, tensors
from twinrl.commands.train import train
from twinrl.config.errors import InputError
from twinrl.machine import cluster
from twinrl.run import names
from twinrl.training.runs import dump
from twinrl.training.sources import SOURCES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc"),
]
PATIENCE = 240
SMALL = {
    "model.network": {"kind": "tests.ablations.fake_trial.Net", "width": 16, "depth": 1, "condition_width": 16},
    "train.init": "random",
    "train.batch": 16,
    "checkpoint.every": 4,
    "evaluation": {"every": 8, "n": 20, "nfe": [1], "teacher_steps": 1, "velocity_rows": 5, "grid_samples": 1},
}


@pytest.fixture(scope="module", autouse=True)
def _fake_source() -> Iterator[None]:
    """For this process; those of the trials import it by the network's name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOURCES, "digits", lambda root: FakeSource())
        without_figures(patch)
        patch.setattr(plans, "_HASHES", {})
        yield


@pytest.fixture(scope="module")
def runs() -> Iterator[Runner]:
    """One Ray for the module."""
    with Runner(Machine(cpus=2), Console(file=StringIO(), width=120)) as started:
        yield started


def make(folder: Path, arms: Mapping[str, dict[str, object]], steps: int, **content: object) -> Plan:
    settings = SMALL | {"train.steps": steps}
    path = write(folder / "study.yaml", set=settings, factors={}, design={"kind": "arms", "arms": arms}, **content)
    return plans.make(studies.load(path), Workspace(folder / "work"))


@pytest.fixture(scope="module")
def halved(runs: Runner, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, list[str]]:
    """One trial at a time: the first is halted at the rung and goes on, the next ones fail and are halved there."""
    arms: dict[str, dict[str, object]] = {
        "fine": {}, "broken": {"train.init": "nowhere"}, "worse": {"optim.eps": 1e-7}
    }  # fmt: skip
    asked = make(
        tmp_path_factory.mktemp("halved"), arms, 20, seeds=1, retries=1, resources={"cpus": 2},
        stop={"kind": "asha", "grace_steps": 8, "reduction": 3},
    )  # fmt: skip
    worse = asked.trials[2].run
    worse.path.mkdir(parents=True)
    (worse.path / "config.yaml").write_text(dump(asked.trials[2].settings))
    plant(worse.path, 8, 1e6, 0.9)  # as a trial that has come to the rung and waits for the verdict
    return runs.run(asked)


def commands(plan: Plan, trial: Trial) -> list[str]:
    """What was started for a trial."""
    folder = plan.workspace.study_folder(plan.study) / "outputs"
    texts = [path.read_text() for path in folder.glob(f"*-{trial.run.path.name}.txt")]
    return [line.split()[2] for text in texts for line in text.splitlines() if line.startswith("$ twinrl")]


def test_a_trial_goes_on_from_its_rung_to_its_end(halved: tuple[Plan, list[str]]) -> None:
    fine = halved[0].trials[0]
    record = halved[0].record(fine)
    assert record
    assert (record.status, record.step, record.diverged) == ("finished", 20, None)
    assert {names.VAL_QUALITY, "test/fd_1nfe", names.LOSS_TOTAL} <= set(record.metrics)
    assert [row["step"] for row in rows(fine.run)] == list(range(1, 21))
    assert commands(halved[0], fine) == ["train", "resume"]


def test_a_failing_trial_is_tried_again_and_stays_alone(halved: tuple[Plan, list[str]]) -> None:
    done, failures = halved
    assert len(failures) == 1
    assert "broken s0" in failures[0]
    assert "train.init is 'nowhere'" in done.records[done.trials[1].key].message
    assert done.state(done.trials[1]) == "failed"
    assert commands(done, done.trials[1]) == ["train", "train"]


def test_the_worst_at_a_rung_is_pruned(halved: tuple[Plan, list[str]]) -> None:
    done, _ = halved
    record = done.record(done.trials[2])
    assert record
    assert (record.status, record.step, record.metrics[names.VAL_QUALITY]) == ("pruned", 8, 1e6)
    assert commands(done, done.trials[2]) == []


def test_a_killed_study_goes_on_and_ends_with_the_numbers_of_a_quiet_run(
    runs: Runner, halved: tuple[Plan, list[str]], tmp_path: Path
) -> None:
    """The command joins this module's Ray by its address, and gets SIGKILL once its trial has a checkpoint."""
    import ray

    steps = 200
    arms = {"only": {"evaluation.every": 0, "checkpoint.every": 10}}
    asked = make(tmp_path, arms, steps, seeds=1)
    (trial,), root = asked.trials, asked.workspace.root
    driver = start(str(tmp_path / "study.yaml"), root, "--address", ray.get_runtime_context().gcs_address)
    output = tmp_path / "work.txt"
    wait_until(lambda: list(trial.run.checkpoints.glob("step-*")) or driver.poll() is not None, PATIENCE)
    assert driver.poll() is None, output.read_text()
    driver.kill()
    driver.wait()
    assert "joined the Ray cluster" in output.read_text()
    wait_until(lambda: not trials(root), PATIENCE)
    assert trial.run.result is None
    done, failures = runs.run(asked.reread())
    assert (failures, done.missing) == ([], [])
    assert commands(done, trial) == ["train", "resume"]
    assert [line["status"] for line in lines(root)] == ["finished"]

    threads = torch.get_num_threads()
    quiet = trial.settings.model_copy(update={"run": trial.settings.run.model_copy(update={"dir": tmp_path / "quiet"})})
    assert train(quiet, True, Console(quiet=True)) == 0
    torch.set_num_threads(threads)
    assert rows(quiet.directory) == rows(trial.run)
    assert [row["step"] for row in rows(trial.run)] == list(range(1, steps + 1))
    expected, found = tensors(quiet.directory), tensors(trial.run)
    assert set(expected) == set(found)
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


def test_the_demo_in_small_ends_with_its_answer(runs: Runner, halved: tuple[Plan, list[str]], tmp_path: Path) -> None:
    """Its arms on a source that is there at once, started where no checkout is, without a terminal."""
    import ray

    demo = yaml.safe_load((studies.STUDIES / "demo.yaml").read_text())
    rates = {"train.steps": 8, "reward.model": "brightness", "reward.gradient.estimator": "autograd"}
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(demo | {"set": SMALL | rates, "seeds": 1}))
    done = subprocess.run(
        [*COMMAND, "demo.yaml", "--root", "work", "--no-mlflow", "--address", ray.get_runtime_context().gcs_address],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    *before, answer, report, picture = done.stdout.splitlines()
    folder = "work/studies/demo/report"
    assert (report, picture) == (f"report: {folder}/report.html", f"picture: {folder}/figures/norms.svg")
    assert (tmp_path / folder / "report.html").is_file()
    assert (tmp_path / folder / "figures" / "norms.svg").is_file()
    assert answer in (tmp_path / folder / "report.md").read_text()
    counted = [line.split()[0] for line in before if ": ended; " in line]
    assert counted == ["1/4", "2/4", "3/4", "4/4"]
    (first,) = (line.removeprefix("first samples: ") for line in before if line.startswith("first samples"))
    assert (tmp_path / first).is_file()


@pytest.mark.parametrize("variables", [{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another token"}])
def test_another_token_is_refused_in_one_line(
    runs: Runner, halved: tuple[Plan, list[str]], variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="does not take this machine's authentication token") as caught:
        cluster.probe(ray.get_runtime_context().gcs_address, "--address")
    assert "\n" not in str(caught.value)
    assert "fix: copy ~/.ray/auth_token" in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere", ":80"])
def test_an_unreachable_cluster_is_refused(address: str) -> None:
    with pytest.raises(InputError, match=r"no Ray cluster at 127|is no address"):
        cluster.probe(address, "--address")
