"""What a study does with its trials' outcomes, which are planted: nothing is repeated, halving and bisection decide by
the numbers, failures stay alone, divergence is on record. test_ray.py does it with Ray and real trials.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from ablations import cluster, margin, plan, runner
from ablations import study as studies
from ablations.cluster import Machine
from ablations.ledger import Ledger
from ablations.plan import Plan, Workspace
from ablations.runner import Runner
from ablations.study import Resources
from ablations.trial import TrialError
from tests.ablations.planted import STEP_SECONDS, Planted
from tests.ablations.tiny import TINY, write
from twinrl.config.errors import InputError
from twinrl.run import names
from twinrl.training.schema import RunConfig

Make = Callable[..., Plan]
Run = Callable[..., tuple[Plan, list[str]]]


def by_rate(settings: RunConfig, step: int) -> float:
    """Falls with the steps, faster at a larger learning rate."""
    return 1 / (1 + step * settings.optim.lr)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Planted:
    made = Planted(by_rate)
    made.install(monkeypatch)
    return made


@pytest.fixture
def run(planted: Planted) -> Run:
    """Runs what is missing of a plan, as a new ``ablate run`` does."""
    return lambda asked, ended=None: runner_of().run(asked, ended)


def runner_of() -> Runner:
    return Runner(Machine(cpus=1), Console(file=StringIO(), width=120))


@pytest.fixture
def make(tmp_path: Path, planted: Planted) -> Make:
    def made(name: str = "first", seeds: int | None = None, **content: object) -> Plan:
        path = tmp_path / f"{name}.yaml"
        return plan.make(studies.load(write(path, **content), seeds), Workspace(tmp_path / "work"))

    return made


def ledger(folder: Path) -> bytes:
    return (folder / "work" / "ledger.jsonl").read_bytes()


# --- nothing is computed twice ------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_trial_has_one_record_and_running_again_starts_nothing(
    run: Run, make: Make, planted: Planted, tmp_path: Path
) -> None:
    told: list[str] = []
    done, failures = run(make(), ended=lambda trial: told.append(trial.title))
    assert (failures, done.missing) == ([], [])
    titles = ["rate=small s0", "rate=large s0", "rate=small s1", "rate=large s1"]  # complete seeds first
    assert planted.trained == [(title, 0, 20) for title in titles]
    assert told == titles
    records = [done.record(trial) for trial in done.trials]
    assert [(r.status, r.step, r.diverged, r.seconds) for r in records if r] == [
        ("finished", 20, None, 5 * STEP_SECONDS)
    ] * 4
    for trial, record in zip(done.trials, records, strict=True):
        assert record
        quality = by_rate(trial.settings, 20)
        assert record.metrics == {names.VAL_QUALITY: quality, "test/accuracy_1nfe": 0.9}
    before = ledger(tmp_path)
    assert before.count(b"\n") == 4
    again, failures = run(make())
    assert (again.missing, failures, planted.begun) == ([], [], titles)
    assert ledger(tmp_path) == before


def test_more_seeds_run_the_new_ones_only_under_any_name(run: Run, make: Make, planted: Planted) -> None:
    run(make())
    wider = make("second", seeds=3, factors={"rate": {"small": {"optim.lr": 1e-4}, "huge": {"optim.lr": 1e-2}}})
    assert [t.title for t in wider.missing] == ["rate=huge s0", "rate=huge s1", "rate=small s2", "rate=huge s2"]
    planted.trained.clear()
    extended, failures = run(make(seeds=3))
    assert (extended.missing, failures) == ([], [])
    assert planted.trained == [("rate=small s2", 0, 20), ("rate=large s2", 0, 20)]


def test_other_numbers_are_other_trials(make: Make, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other steps, threads, data or sources: nothing of them is in the ledger, nor in the same run directory."""
    first, _ = run(make())
    others = [make(set=TINY | {"train.steps": 24}), make(resources={"cpus": 2})]
    monkeypatch.setattr(plan, "content_hash", lambda settings: "other data")
    others.append(make())
    for other in others:
        assert len(other.missing) == 4
        assert {t.run.path for t in other.trials}.isdisjoint(t.run.path for t in first.trials)


def test_a_run_that_ended_unrecorded_is_recorded_without_running(
    run: Run, make: Make, planted: Planted, tmp_path: Path
) -> None:
    """As after a kill between the result and the ledger's line, or with the ledger lost."""
    first, _ = run(make())
    planted.begun.clear()
    again, failures = run(Plan(first.study, Workspace(tmp_path / "work", (tmp_path / "other.jsonl",)), first.trials))
    assert (again.missing, failures, planted.begun) == ([], [], [])
    for trial in first.trials:
        before, after = first.record(trial), again.record(trial)
        assert before
        assert after
        assert replace(after, where=before.where) == before


def test_a_budget_ends_a_run_and_the_next_one_goes_on(run: Run, make: Make, planted: Planted) -> None:
    limited = make(budget={"trials": 3})
    for started, left in ((3, 1), (4, 0)):
        limited, failures = run(limited)
        assert (len(planted.trained), len(limited.missing), failures) == (started, left, [])


# --- failures and divergence ----------------------------------------------------------------------------------

ARMS = {
    "broken": {"train.init": "nowhere"},
    "exploding": {"optim.lr": 1e30, "stability.policy": "stop"},
    "fine": {"optim.lr": 1e-4},
}


def fragile(settings: RunConfig, step: int) -> float:
    if settings.train.init == "nowhere":
        raise TrialError("it is broken")
    return math.nan if settings.optim.lr > 1 and step > 4 else by_rate(settings, step)


def test_failures_stay_alone_and_divergence_is_an_outcome(run: Run, make: Make, planted: Planted) -> None:
    planted.quality = fragile
    asked = make(factors={}, design={"kind": "arms", "arms": ARMS}, seeds=1)
    done, failures = run(asked)
    broken, exploding, fine = done.trials
    assert len(failures) == 1
    assert "broken s0: it is broken" in failures[0]
    assert (done.state(broken), done.records[broken.key].message) == ("failed", "it is broken")
    record = done.record(exploding)
    assert record
    assert record.status == "diverged"
    assert record.diverged == {"step": 8, "kind": "nonfinite", "after": 7, "recovered": False}
    assert done.state(fine) == "finished"
    planted.trained.clear()
    planted.quality = by_rate
    mended, failures = run(make(factors={}, design={"kind": "arms", "arms": ARMS}, seeds=1))
    assert (planted.trained, mended.missing, failures) == ([("broken s0", 0, 20)], [], [])


@pytest.mark.parametrize(("retries", "state"), [(0, "failed"), (1, "finished")])
def test_a_failed_trial_is_tried_again_as_often_as_the_study_says_and_goes_on(
    run: Run, make: Make, planted: Planted, retries: int, state: str
) -> None:
    failing = iter([12])

    def once(settings: RunConfig, step: int) -> float:
        if step == 12 and next(failing, None):
            raise TrialError("killed")
        return by_rate(settings, step)

    planted.quality = once
    only = {"kind": "arms", "arms": {"only": {}}}
    done, failures = run(make(factors={}, design=only, seeds=1, retries=retries))
    assert (done.state(done.trials[0]), len(failures)) == (state, 1 - retries)
    assert planted.trained == [("only s0", 8, 20)] * retries  # from its checkpoint


# --- halving ----------------------------------------------------------------------------------------------------


def test_halving_prunes_the_worse_and_the_non_finite_and_censors_them(
    run: Run, make: Make, planted: Planted, tmp_path: Path
) -> None:
    """One after the other: who is better than those before goes on, the others are censored at the rung."""
    levels = {"good": 1e-2, "better": 1e-1, "worse": 1e-3, "exploding": 1e30, "best": 1.0}
    rates = {name: {"optim.lr": rate} for name, rate in levels.items()}
    planted.quality = lambda settings, step: math.nan if settings.optim.lr > 1e6 else by_rate(settings, step)
    evaluation = TINY["evaluation"] | {"every": 8}  # type: ignore[operator]
    content = {"factors": {"rate": rates}, "seeds": 1, "set": TINY | {
        "evaluation": evaluation, "stability.policy": "record"}}  # fmt: skip
    halved = make("halved", stop={"kind": "asha", "grace_steps": 8, "reduction": 2}, **content)
    done, failures = run(halved)
    assert failures == []
    found = {trial.levels["rate"]: done.record(trial) for trial in done.trials}
    assert {name: (r.status, r.step) for name, r in found.items() if r} == {
        "good": ("finished", 20), "better": ("finished", 20), "worse": ("pruned", 8), "exploding": ("pruned", 8),
        "best": ("finished", 20),
    }  # fmt: skip
    worse, exploding = found["worse"], found["exploding"]
    assert worse
    assert exploding
    assert (worse.message, worse.diverged) == ("halved at step 8", None)
    assert worse.metrics[names.VAL_QUALITY] == by_rate(done.trials[2].settings, 8)
    lost = {"step": 4, "kind": "nonfinite", "after": 3, "recovered": False}
    assert exploding.diverged == lost, "what diverged before stays a divergence"
    before, begun = len(planted.trained), list(planted.begun)
    assert (run(halved.reread())[0].missing, planted.begun) == ([], begun)
    exhaustive = make("whole", **content)
    assert [trial.arm for trial in exhaustive.missing] == ["rate=worse", "rate=exploding"]  # pruned is no result
    run(exhaustive)
    assert planted.trained[before:] == [("rate=worse s0", 8, 20), ("rate=exploding s0", 8, 20)]


# --- the critical learning rate -----------------------------------------------------------------------------------

EDGES = {("steady", 0): 3e-3, ("steady", 1): 2e-2, ("shaky", 0): 1.5e-4, ("shaky", 1): 8e-5}
MARGIN = {"low": 1e-5, "high": 1e-1, "tolerance": 4, "steps": 12}


def edged(settings: RunConfig, step: int) -> float:
    """Diverges above the planted edge of the arm, which its batch tells, and the seed."""
    arm = "steady" if settings.train.batch == 16 else "shaky"
    return math.nan if settings.optim.lr > EDGES[arm, settings.seed] else 0.5


def search(make: Make, **content: object) -> margin.Search:
    """Of one ``ablate margin``."""
    arms = {"kind": "arms", "arms": {"steady": {}, "shaky": {"train.batch": 32}}}
    whole = {"seeds": 2, "factors": {}, "design": arms, "margin": MARGIN, "set": TINY | {"stability.policy": "stop"}}
    asked = make("edge", **whole | content)
    return margin.Search(asked.study, asked.workspace, runner_of().run)


@pytest.mark.slow
def test_margin_brackets_every_edge_and_goes_on_from_the_ledger(run: Run, make: Make, planted: Planted) -> None:
    planted.quality = edged
    limited = search(make, budget={"trials": 5})
    open_ends, _ = limited.complete()
    assert len(planted.trained) == 5
    assert any(bracket.next for bracket in open_ends)
    sought = search(make)
    brackets, failures = sought.complete()
    assert failures == []
    assert {(b.arm, b.seed) for b in brackets} == set(EDGES)
    for bracket in brackets:
        assert bracket.next is None
        assert bracket.healthy
        assert bracket.diverged
        assert bracket.healthy <= EDGES[bracket.arm, bracket.seed] < bracket.diverged <= 4 * bracket.healthy
        assert bracket.healthy < bracket.critical < bracket.diverged
    halvings = math.ceil(math.log2(math.log(1e4) / math.log(4)))
    titles = [title for title, _, _ in planted.trained]
    assert len(titles) == len(set(titles)) == 4 * (2 + halvings)  # no probe is made twice
    assert sought.complete()[0] == sought.known() == brackets
    assert len(planted.trained) == len(titles)


def test_a_run_that_is_never_whole_is_not_healthy(run: Run, make: Make, planted: Planted) -> None:
    planted.accuracy = 0.4
    brackets, _ = search(make, seeds=1).complete()
    assert [(b.healthy, b.diverged, b.next) for b in brackets] == [(None, 1e-5, None)] * 2


def test_a_failed_probe_ends_the_search(run: Run, make: Make, planted: Planted) -> None:
    def failing(settings: RunConfig, step: int) -> float:
        raise TrialError("no disk")

    planted.quality = failing
    brackets, failures = search(make).complete()
    assert (len(failures), [bracket.next for bracket in brackets]) == (4, [1e-5] * 4)
    assert all("no disk" in line for line in failures)


@pytest.mark.slow
def test_probes_of_a_seed_start_from_one_warm_up(run: Run, make: Make, planted: Planted) -> None:
    planted.quality = edged
    warm = search(make, margin=MARGIN | {"warmup_steps": 8, "tolerance": 200})
    assert warm.known() == []
    brackets, failures = warm.complete()
    assert (failures, [bracket.next for bracket in brackets]) == ([], [None] * 4)
    assert planted.trained[:2] == [("warm-up s0", 0, 8), ("warm-up s1", 0, 8)]
    assert sum(title.startswith("warm-up") for title, _, _ in planted.trained) == 2
    for seed in (0, 1):
        start = warm.probe(warm.study.arms[1], seed, 1e-5).settings.train.init
        assert Path(start).name.endswith(f"-s{seed}")
        assert max(Path(start, "checkpoints").iterdir()).name == "step-00000008"


# --- refusals before any trial ----------------------------------------------------------------------------


def test_a_workspace_serves_one_study_at_a_time(make: Make, run: Run, tmp_path: Path) -> None:
    with runner.lock(tmp_path / "work"), pytest.raises(InputError, match="another study is running"):
        run(make())


def test_trials_fit_on_whole_machines_and_a_larger_one_is_refused() -> None:
    nodes = [{"Alive": alive, "Resources": {"CPU": cores}} for alive, cores in ((True, 5.0), (True, 2.0), (False, 99))]
    assert [cluster.slots(nodes, Resources(cpus=n)) for n in (1, 2, 3)] == [7, 3, 1]
    assert cluster.slots(nodes, Resources(cpus=1, workers=2)) == 3
    with pytest.raises(InputError, match="one trial needs more CPUs than a machine has; got 5; expected 6"):
        cluster.slots(nodes, Resources(cpus=3, workers=2))


def test_a_record_of_a_stopped_study_is_left_to_the_next_run(run: Run, make: Make, planted: Planted) -> None:
    """A request to stop between two trials: what has ended is on record, the rest is untouched."""
    asked = make()

    def stop_after_one(settings: RunConfig, step: int) -> float:
        if step == 20:
            runner.stop_request(asked).touch()
        return by_rate(settings, step)

    planted.quality = stop_after_one
    done, failures = run(asked)
    assert (len(done.missing), failures, runner.interrupted(done)) == (3, [], True)
    assert len(Ledger(asked.workspace.root / "ledger.jsonl").read()) == 1
    planted.quality = by_rate
    done, _ = run(done)
    assert (done.missing, runner.interrupted(done)) == ([], False)
