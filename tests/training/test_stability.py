"""Trouble in training: named, acted upon as configured, kept for a replay."""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import logs
from tests.fake_source import FakeSource, register, small
from tests.training.trainers import At, finish, kill, make, rows, state
from twinrl.commands.replay import verdict
from twinrl.config.errors import InputError
from twinrl.flow import draws
from twinrl.run import checkpoints, names, runlog
from twinrl.stability.detectors import Watch, scan
from twinrl.stability.events import Event
from twinrl.training import schema
from twinrl.training.capsules import Capsules
from twinrl.training.replay import ReplayValidation, changed, replay
from twinrl.training.schema import RunConfig
from twinrl.training.trainer import Trainer

pytestmark = pytest.mark.slow

AT, STEPS = 20, 30
"""0-based step at which the planted term goes wrong, step 21 of the log; the steps of a run."""


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def planted(runs: Path, *overrides: str, size: float = 1000.0, branch: str = "any", row: int = 9) -> RunConfig:
    """30 steps of twinflow with a term that spikes at step 21 in one row."""
    term = f"terms.planted={{at: {AT}, size: {size}, branches: [{branch}], row: {row}}}"
    shared = (f"train.steps={STEPS}", "evaluation.every=0", "checkpoint.every=5", "checkpoint.keep=6")
    watched = "stability={capsules: {every: 5, before: 3}, watch: {spike: {warmup: 10}}}"
    return small(runs, term, *shared, watched, *overrides)


@pytest.fixture(scope="module")
def spiked(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run with the planted spike, finished; for tests that only read it."""
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        return finish(planted(tmp_path_factory.mktemp("spiked")))


def events(trainer: Trainer) -> list[Event]:
    return [Event.from_dict(event) for event in logs.events(trainer.run)]


def test_a_spike_is_an_event_that_names_term_step_and_row(spiked: Trainer) -> None:
    trainer = spiked
    (event,) = events(trainer)
    assert (event.kind, event.step, event.iteration, event.terms[0]) == ("spike", AT + 1, AT, "planted")
    data_rows = draws.shuffled_rows(40, 16, seed=0, step=AT)
    assert event.rows[0] == data_rows[9]  # the largest loss first
    batch = trainer.feed.batch(AT, seed=0).batch
    branch = {int(data_rows[k]): name for name, at in batch.branch.items() for k in at}
    t = dict(zip(data_rows.tolist(), batch.rows.t.tolist(), strict=True))
    assert event.branches == tuple(branch[row] for row in event.rows)
    assert event.t == pytest.approx([t[row] for row in event.rows], abs=1e-6)
    assert set(event.shares) == {"base", "adversarial", "rectify", "planted"}
    assert event.shares["planted"][-1] == pytest.approx(1, abs=0.05)
    assert rows(trainer)[AT][names.event("spike")] == 1


def test_one_nan_row_is_named_with_its_term(tmp_path: Path) -> None:
    trainer = make(planted(tmp_path, "stability.policy=stop", size=math.nan))
    outcome = trainer.train()
    assert (outcome.status, outcome.step) == ("diverged", AT + 1)
    event = events(trainer)[0]
    assert (event.kind, event.step, event.terms) == ("nonfinite", AT + 1, ("planted",))
    assert event.rows == (int(draws.shuffled_rows(40, 16, seed=0, step=AT)[9]),)


@pytest.mark.parametrize("size", [1000.0, math.nan])
def test_skip_drops_the_gradient_and_nothing_else(tmp_path: Path, size: float) -> None:
    kind = "policy" if math.isnan(size) else "spike"
    settings = planted(tmp_path, f"stability.{kind}=skip", "stability.divergence.nonfinite_steps=2", size=size)
    trainer = make(settings)
    before: dict[str, torch.Tensor] = {}
    trainer.observers.append(At(AT, lambda: before.update({k: v.clone() for k, v in state(trainer).items()})))
    compared: list[bool] = []
    parts = ("student", "optimizer")
    trainer.observers.append(
        At(AT + 1, lambda: compared.append(all(torch.equal(v, before[k]) for k, v in state(trainer).items()
                                               if k.startswith(parts))))
    )  # fmt: skip
    assert trainer.train().status == "finished"
    assert compared == [True]
    assert [bool(row.get(names.SKIPPED)) for row in rows(trainer)] == [i == AT for i in range(STEPS)]
    assert all(v.isfinite().all() for v in state(trainer).values())


def test_cut_lr_lowers_the_rate_from_the_spike_on(tmp_path: Path) -> None:
    trainer = finish(planted(tmp_path, "stability.spike=cut_lr", "stability.lr_cut=0.25"))
    rates = [row[names.LR] for row in rows(trainer)]
    assert rates[:AT] == [3e-3] * AT
    assert rates[AT:] == pytest.approx([0.75e-3] * (STEPS - AT))


def test_decay_on_spike_cuts_and_recovers(tmp_path: Path) -> None:
    policy = "lr_policy={kind: decay_on_spike, cut: 0.25, recovery: 5}"
    rates = [row[names.LR] for row in rows(finish(planted(tmp_path, policy)))]
    assert rates[AT - 1] == 3e-3
    assert rates[AT] == pytest.approx(3e-3 * 0.25**0.9)
    assert rates[AT + 4] == pytest.approx(3e-3 * 0.25**0.5)  # half is won back in 5 steps
    assert rates[AT + 9] == pytest.approx(3e-3)
    assert rates[-1] == pytest.approx(3e-3)


def test_rollback_returns_bit_exactly_and_goes_on_with_other_data(tmp_path: Path) -> None:
    settings = planted(tmp_path, "stability.spike=rollback", "stability.rollback_margin=5")
    trainer = make(settings)
    at_15: dict[str, torch.Tensor] = {}
    trainer.observers.append(At(15, lambda: at_15.update({k: v.clone() for k, v in state(trainer).items()})))
    restored: list[bool] = []
    original = trainer._roll_back

    def watched(event: Event) -> Any:
        outcome = original(event)
        restored.append(all(torch.equal(v, at_15[k]) for k, v in state(trainer).items()))
        return outcome

    trainer._roll_back = watched  # type: ignore[method-assign]
    assert trainer.train().status == "finished"
    assert restored == [True]
    logged = rows(trainer)
    assert [row["iteration"] for row in logged] == list(range(len(logged)))
    assert [row["step"] for row in logged] == [*range(1, 22), *range(16, 31)]
    assert logged[21][names.LOSS_TOTAL] != logged[15][names.LOSS_TOTAL]  # another data order
    assert [event.kind for event in events(trainer)] == ["spike"]
    assert checkpoints.load_state(trainer.run.newest_checkpoint())["attempt"] == 1


def test_a_rollback_survives_a_kill(tmp_path: Path) -> None:
    policy = ("stability.spike=rollback", "stability.rollback_margin=5")
    undisturbed = finish(planted(tmp_path / "a", *policy))
    disturbed = planted(tmp_path / "b", *policy)
    kill(disturbed, 21)  # as the spike was logged: the rollback is made again
    kill(disturbed, 28)  # in the second data order
    again = finish(disturbed)
    assert rows(again) == rows(undisturbed)
    assert all(torch.equal(v, state(again)[k]) for k, v in state(undisturbed).items())


def test_a_log_gives_what_the_run_found_also_after_a_rollback(tmp_path: Path) -> None:
    settings = planted(tmp_path, "stability.spike=rollback", "stability.rollback_margin=5")
    kill(settings, 28)  # in the second data order
    trainer = finish(settings)
    assert trainer.attempt == 1
    watch = Watch(settings.stability.watch, settings.gradient_owners)
    for row in runlog.read(trainer.run.log):
        watch.observe(row["step"], row)
    assert watch.state()["detectors"] == trainer.monitor.watch.state()["detectors"]


@pytest.mark.parametrize("margin", [10, 0])
def test_too_many_rollbacks_stop_the_run(tmp_path: Path, margin: int) -> None:
    """Also where the trouble comes back within the cooldown of its first episode."""
    always = "terms.poison={at: 21, branches: [any]}"  # whatever the data order
    policy = ("stability={policy: rollback, rollbacks: 2}", "stability.divergence.nonfinite_steps=9")
    settings = planted(tmp_path, always, *policy, f"stability.rollback_margin={margin}", "terms.planted=null")
    trainer = make(settings)
    outcome = trainer.train()
    assert (outcome.status, outcome.step) == ("diverged", 22)
    assert "2 rollbacks did not help" in outcome.message
    assert trainer.attempt == 2


# --- a limit on what is known after the step only -----------------------------------------------------------------

THROWN = 10
QUIET = "stability.watch.spike={ratio: 1e9, z: 1e9}"


def thrown(runs: Path, *overrides: str) -> RunConfig:
    """16 steps, at the 11th of which Adam's g²/v is 3.23 whatever else the gradient is; around it at most 2.05 over
    three seeds."""
    term = f"terms.planted={{at: {THROWN}, row: 9, branches: [any]}}"
    watched = ("stability.watch={rms_limit: 2.6, spike: {warmup: 4}}", "stability.capsules={every: 5, before: 2}")
    return small(runs, term, "train.steps=16", "evaluation.every=0", *watched, *overrides)


def test_an_rms_spike_is_an_event_of_its_step(tmp_path: Path) -> None:
    trainer = finish(thrown(tmp_path, QUIET))
    (event,) = events(trainer)
    row = rows(trainer)[THROWN]
    assert (event.kind, event.step, event.iteration, event.series) == ("spike", THROWN + 1, THROWN, names.RMS_MAX)
    assert (event.value, row[names.event("spike")]) == (row[names.RMS_MAX], 1)
    (finding,) = scan(runlog.read(trainer.run.log), trainer.settings.stability.watch)
    assert (finding.step, finding.series, finding.value) == (event.step, event.series, event.value)
    again = replay(trainer.run, 1, ["terms.planted=null"], load, after=1)
    assert [again.recurs(trace) for trace in again.traces] == [True, False]


@pytest.mark.parametrize(
    "policy", [("stability.spike=cut_lr", "stability.lr_cut=0.25"), ("lr_policy={kind: decay_on_spike, cut: 0.25}",)]
)
def test_an_rms_spike_lowers_the_rate_from_the_next_step_on(tmp_path: Path, policy: tuple[str, ...]) -> None:
    rates = [row[names.LR] for row in rows(finish(thrown(tmp_path, QUIET, *policy)))]
    assert rates == pytest.approx([3e-3] * (THROWN + 1) + [0.75e-3] * (15 - THROWN))


def test_a_gradient_spike_with_an_rms_spike_is_one_event_and_one_cut(tmp_path: Path) -> None:
    trainer = finish(thrown(tmp_path, "stability.spike=cut_lr", "stability.lr_cut=0.25"))
    found = scan(runlog.read(trainer.run.log), trainer.settings.stability.watch)
    assert {f.series for f in found if f.step == THROWN + 1} > {names.RMS_MAX, names.GRAD_TOTAL_RAW}
    (event,) = events(trainer)
    assert event.terms[0] == "planted"
    assert [row[names.LR] for row in rows(trainer)] == pytest.approx([3e-3] * THROWN + [0.75e-3] * (16 - THROWN))


def test_an_rms_spike_stops_a_run_or_takes_it_back(tmp_path: Path) -> None:
    stopped = make(thrown(tmp_path / "stop", QUIET, "stability.spike=stop"))
    outcome = stopped.train()
    assert (outcome.status, outcome.step) == ("diverged", THROWN + 1)
    assert outcome.message.startswith(f"spike of opt/rms_max at step {THROWN + 1}")
    trainer = finish(thrown(tmp_path / "back", QUIET, "stability={spike: rollback, rollback_margin: 5}"))
    assert trainer.attempt == 1
    assert [row["step"] for row in rows(trainer)] == [*range(1, 12), *range(6, 17)]


def test_a_limit_on_what_is_never_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rms_limit limits opt/rms_max.*got gradients\.telemetry\.rms_every 0; fix"):
        make(thrown(tmp_path, "gradients.telemetry.rms_every=0"))


def test_rollback_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rollback has no checkpoint.*checkpoint\.every 30.*train\.steps 30"):
        planted(tmp_path, "stability.spike=rollback", "checkpoint.every=30")


# --- capsules and replay ------------------------------------------------------------------------------------------


def load(settings: RunConfig) -> tuple[FakeSource, torch.device]:
    return FakeSource(), torch.device("cpu")


def test_a_replay_repeats_the_log_and_removing_the_cause_removes_the_spike(spiked: Trainer) -> None:
    result = replay(spiked.run, 1, ["terms.planted=null"], load, after=5)
    assert result.exact
    unchanged, without = result.traces
    assert len(result.logged) == len(unchanged.rows) == len(without.rows)
    assert unchanged.rows[-1]["iteration"] == AT + 5
    assert (result.recurs(unchanged), result.recurs(without)) == (True, False)
    assert unchanged.found["spike"] == AT + 1
    assert result.event.value == pytest.approx(result.peak(unchanged))
    assert result.peak(without) is None or result.peak(without) < result.event.value / 3
    for placebo in result.placebos:  # a spike that has a cause stays under a change that does not remove it
        assert result.recurs(placebo)
        assert placebo.rows[-1][names.LOSS_TOTAL] != unchanged.rows[-1][names.LOSS_TOTAL]
    assert not any("shows no cause" in line for line in verdict(result))
    hanging = replace(result, placebos=[replace(without, label="learning rate × 0.99")])
    assert "removes this spike, too" in verdict(hanging)[-1]


@pytest.mark.parametrize("action", ["skip", "zero", "cut_lr+skip", "rollback", "stop"])
def test_the_unchanged_replay_repeats_the_log_under_every_policy(tmp_path: Path, action: str) -> None:
    trainer = make(planted(tmp_path, f"stability.spike={action}"))
    trainer.train()
    result = replay(trainer.run, 1, [], load, after=5)
    assert result.exact
    assert result.recurs(result.traces[0])
    assert result.traces[0].rows[-1]["iteration"] == AT + 5


@pytest.mark.parametrize("preset", ["published", "corrected", "recommended"])
def test_the_change_that_help_and_docs_name_turns_the_reward_off(preset: str) -> None:
    settings = schema.load(preset)
    off = changed(settings, ["reward.schedule.weight=0"])
    schedules = [version.reward.schedule for version in (settings, off)]
    largest = [max(schedule.weight_at(step, 100, Fraction(30)) for step in range(100)) for schedule in schedules]
    assert largest == [pytest.approx(1), 0]


def test_a_change_that_changes_nothing_is_refused(spiked: Trainer) -> None:
    with pytest.raises(InputError, match=r"changes nothing.*terms\.reward=null.*reward\.schedule\.weight=0"):
        replay(spiked.run, 1, ["terms.reward=null"], load)


def test_every_trace_starts_from_the_same_state(spiked: Trainer) -> None:
    """Training writes into what a checkpoint was loaded to: its optimizer must not go on into the next trace."""
    result = replay(spiked.run, 1, ["tracking.experiment=other"], load, after=5)
    unchanged, same = ([row[names.LOSS_TOTAL] for row in trace.rows] for trace in result.traces)
    assert result.exact
    assert same == unchanged


def far(network: torch.nn.Module, step: int) -> dict[str, float]:
    """A quality that is bad once the weights are far away; with a short memory Adam throws them there after a spike.

    Over five seeds the largest is 0.39 before it, 0.45 to 0.48 at step 30, 3.4 to 4.2 at step 35.
    """
    size = max(float(p.detach().abs().max()) for p in network.parameters())
    return {names.VAL_QUALITY: 0.1 if size < 1 else size}


def test_a_judged_replay_says_whether_the_run_would_have_lived(tmp_path: Path) -> None:
    thrown = (
        "teacher={kind: live, allow_live: true}", "optim={lr: 0.001, betas: [0.9, 0.2]}", "evaluation.every=5",
        "train.steps=40",
        "stability={policy: record, divergence: {accuracy_floor: 0, recall_floor: 0}}",
    )  # fmt: skip
    trainer = finish(planted(tmp_path, *thrown, size=1e6), validate=far)
    told: list[tuple[str, int, int]] = []
    result = replay(
        trainer.run, 1, ["terms.planted=null"], load, 19, ReplayValidation(5, far), lambda *what: told.append(what)
    )
    unchanged, without = result.traces
    assert result.judged
    assert [row["step"] for row in unchanged.rows if names.VAL_QUALITY in row] == list(range(20, 41, 5))
    assert all(result.before[-1]["step"] < row["step"] for row in unchanged.rows)
    falls = [result.fell(trace) for trace in (unchanged, *result.placebos)]
    assert [fall.step for fall in falls if fall is not None] == [35, 35, 35]
    assert result.fell(without) is None
    assert told[-1] == ("learning rate × 1.01", 25, 25)
    assert verdict(result)[-4:] == [
        "unchanged: fell apart at step 35",
        "terms.planted=null: whole to the last of these steps",
        "learning rate × 0.99: fell apart at step 35",
        "learning rate × 1.01: fell apart at step 35",
    ]
    hanging = replace(result, placebos=[replace(without, label="learning rate × 0.99")])
    assert verdict(hanging)[-1].endswith("a change saves it shows no cause")
    blunt = replace(result, traces=[replace(without, label="unchanged"), without])
    assert "even unchanged" in verdict(blunt)[-1]


@pytest.mark.parametrize(
    ("change", "recurs"),
    [("seed=5", True), ("train.precision=float64", True), ("terms.rectify=null", True),
     ("gradients.terms.planted.clip.max_norm=0.1", True), ("terms.planted.size=1", False)],
)  # fmt: skip
def test_interventions(spiked: Trainer, change: str, recurs: bool) -> None:
    """The planted spike does not depend on batch, precision or another term; pre-clip norms see through a clip."""
    result = replay(spiked.run, 1, [change], load, after=3)
    assert result.recurs(result.traces[1]) is recurs
    if "clip" in change:
        row = result.traces[1].rows[AT - result.traces[1].rows[0]["iteration"]]
        assert row[names.grad("planted", "norm_clipped")] == pytest.approx(0.1)


def test_another_teacher_takes_over_from_the_student_of_the_capsule(tmp_path: Path) -> None:
    trainer = finish(planted(tmp_path, "teacher={kind: live, allow_live: true}"))
    result = replay(trainer.run, 1, ["teacher={kind: ema, decay: 0.9}"], load, after=3)
    live, averaged = (trace.rows for trace in result.traces)
    assert result.exact
    assert averaged[0]["loss/rectify"] == live[0]["loss/rectify"]  # the same student, whose copy the average is
    assert averaged[-1]["loss/base"] != live[-1]["loss/base"]


def test_capsules_are_kept_for_the_first_events_only_and_follow_a_resume(tmp_path: Path) -> None:
    settings = planted(tmp_path, "stability.capsules.most=1", "terms.poison={at: 25, branches: [any]}",
                       "stability.policy=record")  # fmt: skip
    kill(settings, 23)
    trainer = finish(settings)
    assert [event.kind for event in events(trainer)][:2] == ["spike", "nonfinite"]
    capsules = Capsules(trainer.run.path, settings.stability.capsules)
    assert capsules.numbers() == [1]
    event, checkpoint = capsules.load(1)
    assert (event.step, checkpoint.state["step"]) == (AT + 1, 15)  # 20 is closer than `before`
    with pytest.raises(InputError, match=r"event 2 of .* has no capsule.*capsules of events 1"):
        replay(trainer.run, 2, [], load)


def test_a_change_that_does_not_fit_is_one_line(spiked: Trainer) -> None:
    with pytest.raises(InputError, match=r"the change does not fit"):
        replay(spiked.run, 1, ["model.network.width=8"], load)
    with pytest.raises(InputError, match=r"unknown key terms\.planted\.sise"):
        replay(spiked.run, 1, ["terms.planted.sise=8"], load)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stability.spike=explode", "stability.spike"),
        ("stability.watch.spike.ratio=0.5", "stability.watch.spike.ratio"),
        ("stability.lr_cut=2", "stability.lr_cut"),
        ("stability.policy=retry", "stability.policy"),
    ],
)
def test_bad_settings(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        schema.load("twinflow", [override])
