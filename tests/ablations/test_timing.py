"""The timing of a plan: any valid arm can be timed in a few steps that stand for the whole run, once a machine."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ablations import commands, timing
from ablations import study as studies
from ablations.plan import Plan, Trial, Workspace
from ablations.timing import Timing, known, measure, shortened
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
def plan_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """A plan of one trial, without its data being read, beside an empty cache of timings."""
    monkeypatch.setattr(timing, "cache_dir", lambda: tmp_path / "cache")

    def make(*overrides: str) -> Plan:
        settings = schema.load("twinflow", [f"{key}={value}" for key, value in TINY.items()] + list(overrides))
        trial = Trial("arm", {}, settings, settings.hash, "f" * 16, (), "")
        return Plan(studies.load(write(tmp_path / "study.yaml")), Workspace(tmp_path), [trial])

    return make


def test_a_timing_run_that_takes_too_long_is_one_line(
    plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "PATIENCE_SECONDS", 0.01)
    with pytest.raises(
        InputError, match=r"arm arm took longer than 0\.01 s for 16 steps.*fix: leave out --measure"
    ) as caught:
        measure(plan_of(), 1)
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
    made = plan_of(*long, "evaluation.every=0")
    assert known(made, 1) is None
    found = measure(made, 1)
    assert [words[0] for words in asked] == ["train"]
    assert 0 < found.low <= found.step <= found.high
    assert found.fixed > 0 < found.validation
    assert known(made, 1) == found
    assert known(made, 2) is None
    assert known(plan_of(*long, "evaluation.every=0", "train.batch=8"), 1) is None


TIMED = Timing(step=0.5, low=0.25, high=1.0, validation=2, fixed=10, steps=15, at="2026-01-02")


@pytest.mark.parametrize(("every", "validations"), [(0, 1), (50, 2), (40, 3), (200, 1)])
def test_the_cost_of_a_trial_is_its_steps_its_validations_and_what_is_fixed(
    plan_of: Callable[..., Plan], every: int, validations: int
) -> None:
    made = plan_of("train.steps=100", f"evaluation.every={every}")
    took = tuple(seconds + 2 * validations for seconds in (60, 35, 110))
    assert TIMED.trial(made.trials[0].settings) == took
    assert TIMED.rest(made, 1) == took
    assert TIMED.rest(made, 2) == tuple(seconds / 2 for seconds in took)


@pytest.mark.parametrize("measured", [False, True])
def test_a_plan_says_how_sure_its_estimate_is_and_trains_nothing(
    plan_of: Callable[..., Plan], measured: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(commands, "planned", lambda *_: plan_of("train.steps=100"))
    monkeypatch.setattr(timing, "known", lambda plan, slots: TIMED if measured else None)
    monkeypatch.setattr(subprocess, "run", None)
    assert commands.plan("study", None, tmp_path, None, 1, measure=False) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert ("about 1 min 02 s" in said) == measured
    assert ("37 s to 1 min 52 s" in said) == measured
    assert ("measured here on 2026-01-02 over 15 steps" in said) == measured
    assert ("not measured on this machine; --measure" in said) != measured
