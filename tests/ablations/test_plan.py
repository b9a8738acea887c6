"""A plan's trials: what they share, and that they are what their settings say."""

from functools import cache
from pathlib import Path

import pytest

from ablations import fingerprint as prints
from ablations import plan as plans
from ablations import runner
from ablations import study as studies
from ablations.plan import Workspace
from tests.ablations.tiny import write
from twinrl.training import schema


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
