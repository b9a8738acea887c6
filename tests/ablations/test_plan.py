"""The timing run of a plan: any valid arm can be timed, in a few steps that stand for the whole run."""

import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ablations import fingerprint as prints
from ablations import plan as plans
from ablations import runner
from ablations import study as studies
from ablations.plan import MeasuredCost, Plan, Trial, Workspace, measure, remaining_seconds, shortened
from tests.ablations.tiny import TINY, without_figures, write
from tests.fake_source import register
from twinrl.cli import app
from twinrl.config.errors import InputError
from twinrl.training import schema
from twinrl.training.runs import dump
from twinrl.training.schema import RunConfig

STEPS = 2000
LONG = (f"train.steps={STEPS}", "checkpoint.every=500", "early_stop.patience=1", "evaluation.every=1")
ACTIONS = ("stability.policy=rollback", "stability.spike=rollback", "stability.drift=stop")
RAMP = "reward.schedule.weight={kind: linear, final: 1, start: 100, end: 50%}"
LATER = "reward.schedule.weight={kind: cosine, final: 1, start: after_renoise, end: after_renoise+600}"
BEYOND = "reward.schedule.weight={kind: hard, final: 1, start: 3000}"
RENOISE = "renoise={kind: beta, alpha: {kind: linear, initial: 4, final: 1, end: 600}, placement: [training]}"
MATCH = "gradients.terms.reward={match: {ratio: {kind: linear, initial: 1, final: 2, start: 300, end: 20%}}}"


def weights(settings: RunConfig, shares: tuple[float, ...]) -> list[float]:
    """The reward's weight at shares of the run."""
    steps, end = settings.train.steps, settings.renoise_end()
    assert settings.reward is not None
    return [settings.reward.schedule.weight_at(round(share * steps), steps, end) for share in shares]


@pytest.mark.parametrize("schedule", [RAMP, LATER, BEYOND])
def test_a_shortened_run_is_valid_and_its_schedules_shrink_with_it(tmp_path: Path, schedule: str) -> None:
    settings = schema.load("recommended", [*LONG, *ACTIONS, RENOISE, schedule])
    short = shortened(settings, 20, tmp_path)
    shares = (0.0, 0.05, 0.1, 0.3, 0.5, 0.8)
    assert weights(short, shares) == pytest.approx(weights(settings, shares), abs=1e-6)
    assert (short.train.steps, short.run.dir, short.early_stop.patience) == (20, tmp_path, None)
    assert not short.stability.decide(["nonfinite", "diverged", "spike", "drift"]).stop
    assert not short.stability.rolls_back
    assert dump(short) != dump(settings) == dump(schema.load("recommended", [*LONG, *ACTIONS, RENOISE, schedule]))


def test_moments_of_gradient_rules_shrink_too(tmp_path: Path) -> None:
    short = shortened(schema.load("recommended", [*LONG, MATCH]), 20, tmp_path)
    rule = short.gradients.terms["reward"]["match"]
    assert (rule.ratio.start, rule.ratio.end) == ("15%", "20%")


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., Plan]:
    """A plan of one trial, without its data being read."""

    def make(*overrides: str) -> Plan:
        settings = schema.load("twinflow", [f"{key}={value}" for key, value in TINY.items()] + list(overrides))
        trial = Trial("arm", {}, settings, settings.hash, "f" * 16, (), "")
        return Plan(studies.load(write(tmp_path / "study.yaml")), Workspace(tmp_path), [trial])

    return make


def test_a_timing_run_that_takes_too_long_is_one_line(
    plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "TIMING_PATIENCE_SECONDS", 0.01)
    with pytest.raises(
        InputError, match=r"arm arm took longer than 0\.01 s for 6 steps.*fix: give --no-timing"
    ) as caught:
        measure(plan_of())
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_arm_that_rolls_back_and_ramps_is_timed(
    plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is given to the command line here, on the fake source; each of its steps counts, the first aside."""
    register(monkeypatch)
    without_figures(monkeypatch)
    asked: list[list[str]] = []

    def here(command: list[str], **options: Any) -> Any:
        if command[1:3] != ["-m", "twinrl"]:
            return run(command, **options)
        asked.append(command[3:])
        return app(command[3:], standalone_mode=False)

    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", here)
    ramp = (
        "renoise={kind: beta, alpha: {kind: linear, initial: 4, final: 1, start: 100, end: 50%}, placement: [training]}"
    )
    long = ("train.steps=2000", "checkpoint.every=500", "stability.policy=rollback", "tracking.mlflow=false", ramp)
    timing = measure(plan_of(*long, "evaluation.every=0"))
    assert [words[0] for words in asked] == ["train"]
    assert timing.step > 0
    assert timing.fixed > 0


def test_the_cost_of_a_trial_is_what_is_fixed_and_its_steps(plan_of: Callable[..., Plan]) -> None:
    timing, made = MeasuredCost(step=0.5, fixed=10), plan_of("train.steps=100")
    assert timing.trial(100) == 60
    assert [remaining_seconds(made, timing, slots) for slots in (1, 2)] == [60, 30]


def test_trials_share_what_a_seed_does_not_change_and_are_what_their_settings_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, once = [], cache(prints.planned.__wrapped__)
    monkeypatch.setattr(plans, "content_hash", lambda settings: "content")
    monkeypatch.setattr(prints, "sources", lambda unused: listed.append(unused) or "sources")
    for module in (prints, plans):
        monkeypatch.setattr(module, "planned", once)
    plan = plans.make(studies.load(write(tmp_path / "study.yaml", seeds=3)), Workspace(tmp_path / "work"))
    runner.write_configurations(plan.trials, plan)
    assert len(listed) == 1, "the sources are read once for all trials of a kind"
    assert [trial.title for trial in plan.trials] == [
        f"rate={rate} s{seed}" for seed in range(3) for rate in ("small", "large")
    ]
    for trial in plan.trials:
        assert trial.config_hash == trial.settings.hash
        assert trial.run.path == trial.settings.directory
        assert trial.fingerprint == prints.fingerprint(trial.settings, "content")
        assert schema.load(runner.task_of(trial, plan).config) == trial.settings
    assert len({trial.key for trial in plan.trials}) == 6
