"""Real studies on the lab under one Ray: nothing is repeated, failures stay alone, divergence is on record."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from tiny import TINY, write

from ablations import margin, plan, runner
from ablations import study as studies
from ablations.cluster import Machine
from ablations.plan import Plan, Workspace
from ablations.publish import EXPERIMENT, StudyView
from ablations.runner import Runner
from twinrl.errors import InputError
from twinrl.tracking import names, runlog

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Make = Callable[..., Plan]


@pytest.fixture(scope="module")
def runs(lab: object) -> Iterator[Runner]:
    """One Ray for the module; ``lab`` is built before, if need be."""
    with Runner(Machine(cpus=2), Console(file=StringIO(), width=120)) as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def make(folder: Path) -> Make:
    def made(name: str = "first", seeds: int | None = None, **content: object) -> Plan:
        path = folder / f"{name}.yaml"
        return plan.make(studies.load(write(path, **content), seeds), Workspace(folder / "work"))

    return made


@pytest.fixture(scope="module")
def first(runs: Runner, make: Make) -> Plan:
    done, failures = runs.run(make())
    assert failures == []
    return done


def ledger_lines(folder: Path) -> int:
    return (folder / "work" / "ledger.jsonl").read_bytes().count(b"\n")


def test_every_trial_has_one_record(first: Plan, folder: Path) -> None:
    records = [first.record(trial) for trial in first.trials]
    assert [(r.status, r.step, r.diverged) for r in records if r] == [("finished", 20, None)] * 4
    assert ledger_lines(folder) == 4
    assert all(r and {"val/quality", "test/fd_1nfe", names.LOSS_TOTAL} <= set(r.metrics) for r in records)


def test_seeds_are_paired(first: Plan) -> None:
    """Before the first update all arms of a seed have the same loss: the same weights, data, times and noise."""
    start = {t.title: runlog.read(t.run.log)[0][names.LOSS_TOTAL] for t in first.trials}
    assert start["rate=small s0"] == start["rate=large s0"] != start["rate=small s1"] == start["rate=large s1"]


def test_running_again_starts_nothing(first: Plan, runs: Runner, make: Make, folder: Path) -> None:
    before, started = (folder / "work" / "ledger.jsonl").read_bytes(), runs.started
    again, failures = runs.run(make())
    assert (again.missing, failures, runs.started) == ([], [], started)
    assert (folder / "work" / "ledger.jsonl").read_bytes() == before


def test_more_seeds_run_the_new_ones_only_under_any_name(first: Plan, runs: Runner, make: Make, folder: Path) -> None:
    wider = make("second", seeds=3, factors={"rate": {"small": {"optim.lr": 1e-4}, "huge": {"optim.lr": 1e-2}}})
    assert [t.title for t in wider.missing] == ["rate=huge s0", "rate=huge s1", "rate=small s2", "rate=huge s2"]
    extended = make(seeds=3)
    assert [t.title for t in extended.missing] == ["rate=small s2", "rate=large s2"]
    extended, failures = runs.run(extended)
    assert (extended.missing, failures, ledger_lines(folder)) == ([], [], 6)


def test_failures_stay_alone_and_divergence_is_an_outcome(first: Plan, runs: Runner, make: Make) -> None:
    arms = {
        "broken": {"train.init": "nowhere"},
        "exploding": {"optim.lr": 1e30, "stability.policy": "stop"},
        "fine": {"rate": "small"},
    }
    done, failures = runs.run(make("third", design={"kind": "arms", "arms": arms}, seeds=1))
    broken, exploding, fine = done.trials
    assert len(failures) == 1
    assert "broken s0" in failures[0]
    assert "train.init is 'nowhere'" in failures[0]
    assert done.state(broken) == "failed"
    assert "train.init" in done.records[broken.key].message
    record = done.record(exploding)
    assert record is not None
    assert record.diverged is not None
    assert (record.status, record.diverged["kind"], record.diverged["step"] <= 20) == ("diverged", "nonfinite", True)
    assert done.record(fine) is not None


def test_a_run_that_ended_unrecorded_is_recorded_without_running(first: Plan, runs: Runner, folder: Path) -> None:
    """As after a kill between the result and the ledger's line, or with the ledger lost."""
    started, other = runs.started, folder / "other.jsonl"
    again, failures = runs.run(Plan(first.study, Workspace(folder / "work", (other,)), first.trials))
    assert (again.missing, failures, runs.started) == ([], [], started)
    for trial in first.trials:
        before, after = first.record(trial), again.record(trial)
        assert before is not None
        assert after is not None
        assert replace(after, where=before.where) == before


def test_halving_prunes_the_worse_and_the_non_finite_and_censors_them(runs: Runner, make: Make) -> None:
    """One at a time, so that which trial meets which at the rung is no matter of luck."""
    evaluation = TINY["evaluation"] | {"every": 8}  # type: ignore[operator]
    rates = {"quick": {"optim.lr": 0.03}, "slow": {"optim.lr": 3e-4}, "exploding": {"optim.lr": 1e30}}
    halved = make(
        "halved", seeds=1, factors={"rate": rates}, stop={"kind": "asha", "grace_steps": 8, "reduction": 3},
        set=TINY | {"evaluation": evaluation, "stability.policy": "record"}, resources={"cpus": 2},
    )  # fmt: skip
    done, failures = runs.run(halved)
    assert failures == []
    quick, slow, exploding = (done.record(trial) for trial in done.trials)
    assert quick
    assert slow
    assert exploding
    assert (quick.status, quick.step, quick.diverged) == ("finished", 20, None)
    assert (slow.status, slow.step, slow.message, slow.diverged) == ("pruned", 8, "halved at step 8", None)
    assert slow.metrics["val/quality"] > 40 > quick.metrics["val/quality"]
    assert (exploding.status, exploding.step) == ("pruned", 8)
    assert exploding.diverged, "what had diverged before it was pruned stays a divergence"
    assert exploding.diverged["kind"] == "nonfinite"
    assert runs.run(halved.reread())[0].missing == []
    exhaustive = make("whole", seeds=1, factors={"rate": rates}, set=halved.study.config.set, resources={"cpus": 2})
    assert [trial.arm for trial in exhaustive.missing] == ["rate=slow", "rate=exploding"]  # pruned is no result


def test_margin_brackets_the_edge_and_goes_on_from_the_ledger(runs: Runner, make: Make) -> None:
    asked = make(
        "edge", seeds=1, factors={}, design={"kind": "arms", "arms": {"only": {}}},
        set=TINY | {"stability.policy": "stop"},
        margin={"low": 1e-3, "high": 1e30, "tolerance": 1e20, "steps": 12, "warmup_steps": 4},
    )  # fmt: skip
    search = margin.Search(asked.study, asked.workspace, runs.run)
    (bracket,), failures = search.complete()
    assert failures == []
    assert (bracket.arm, bracket.seed, bracket.next) == ("only", 0, None)
    assert bracket.healthy
    assert bracket.diverged
    assert bracket.healthy < bracket.critical < bracket.diverged <= 1e20 * bracket.healthy
    started = runs.started
    assert search.complete()[0] == [bracket]
    assert runs.started == started
    assert search.known() == [bracket]


def test_mlflow_has_study_arms_seeds_and_summaries(first: Plan, folder: Path) -> None:
    view = StudyView(first, f"sqlite:///{folder / 'mlflow.db'}")
    for _ in range(2):  # publishing twice adds nothing
        view.summarise()
    found = view.client.search_runs([view.client.get_experiment_by_name(EXPERIMENT).experiment_id])
    by_level = {level: [r for r in found if r.data.tags.get("level", "seed") == level] for level in
                ("study", "arm", "summary", "seed")}  # fmt: skip
    assert {level: len(runs) for level, runs in by_level.items()} == {"study": 1, "arm": 2, "summary": 2, "seed": 4}
    arms = {r.info.run_id: r.data.tags["arm"] for r in by_level["arm"]}
    for run in by_level["seed"] + by_level["summary"]:
        assert arms[run.data.tags["mlflow.parentRunId"]] == run.data.tags["arm"]
        assert run.data.params["factor.rate"] == run.data.tags["arm"].removeprefix("rate=")
    assert {r.data.tags["seed"] for r in by_level["seed"]} == {"0", "1"}
    assert all("/#/metric?runs=" in r.data.tags["compare"] for r in by_level["arm"] + by_level["study"])
    alive = view.client.get_metric_history(by_level["summary"][0].info.run_id, f"{names.LOSS_TOTAL}/alive")
    assert [(point.step, point.value) for point in alive] == [(step, 2) for step in range(1, 21)]


# --- refusals before any trial ----------------------------------------------------------------------------


def test_a_workspace_serves_one_study_at_a_time(make: Make, runs: Runner, folder: Path) -> None:
    with runner.exclusive(folder / "work"), pytest.raises(InputError, match="another study is running"):
        runs.run(make(seeds=9))


def test_a_trial_larger_than_the_machine_is_refused(make: Make, runs: Runner) -> None:
    with pytest.raises(InputError, match="one trial needs more CPUs than a machine has; got 2; expected 99"):
        runs.run(make("large", resources={"cpus": 99}))
