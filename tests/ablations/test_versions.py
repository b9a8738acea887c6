"""Reports about trials that another version of twinrl made."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ablations import commands, versions
from ablations import plan as plans
from ablations import study as studies
from ablations.ledger import TrialRecord
from ablations.plan import Plan, Trial, Workspace
from tests.ablations.tiny import TINY, write
from tests.analysis import simulated

OLD, OLDER = "01d01d01d01d01d0", "0de20de20de20de2"
STEPS = 80


@pytest.fixture(scope="module", autouse=True)
def _no_data() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "content_hash", lambda settings: "content")
        yield


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("versions")
    study = studies.load(write(folder / "rates.yaml", set=TINY | {"train.steps": STEPS}, seeds=3))
    return plans.make(study, Workspace(folder / "work"))


def record(trial: Trial, fingerprint: str | None = None, status: str = "finished", **where: str) -> TrialRecord:
    provenance = {"revision": "a" * 40, "at": "2026-01-02T03:04:05Z"} | where
    made = fingerprint or trial.fingerprint
    return TrialRecord(trial.settings.hash, trial.settings.seed, made, status, STEPS, where=provenance)


def with_records(plan: Plan, *records: TrialRecord) -> Plan:
    return replace(plan, records={found.key: found for found in records})


def test_todays_trials_are_reported_without_a_note(plan: Plan) -> None:
    version = versions.to_report(with_records(plan, *map(record, plan.trials)))
    assert (version.missing, version.note) == (0, "")
    assert set(version.fingerprints.values()) == {trial.fingerprint for trial in plan.trials}


def test_after_an_update_the_finished_trials_stay_visible_and_it_is_said(plan: Plan) -> None:
    old = [record(trial, OLD) for trial in plan.trials[:-1]]
    version = versions.to_report(with_records(plan, *old, record(plan.trials[0])))
    assert set(version.fingerprints.values()) == {OLD}
    assert version.missing == 1
    assert "the 5 trials shown were finished up to 2026-01-02 at revision aaaaaaaa." in version.note
    assert "Today's version has 1 of the study's 6" in version.note
    assert "may be one of the code" not in version.note
    assert "run makes today's" in versions.hint(with_records(plan, *old))
    assert versions.hint(with_records(plan, *map(record, plan.trials))) == ""


def test_todays_trials_are_preferred_once_they_are_as_many(plan: Plan) -> None:
    both = [record(trial, made) for trial in plan.trials for made in (OLD, None)]
    assert versions.to_report(with_records(plan, *both)).note == ""


def test_an_arm_never_mixes_versions_and_the_one_with_most_seeds_is_taken(plan: Plan) -> None:
    first = [trial for trial in plan.trials if trial.arm == plan.trials[0].arm]
    other = [trial for trial in plan.trials if trial.arm != first[0].arm]
    made = [record(first[0], OLD), *(record(trial, OLDER, revision="b" * 40) for trial in first[1:])]
    version = versions.to_report(with_records(plan, *made, *(record(trial, OLD) for trial in other)))
    assert version.fingerprints == {first[0].settings.hash: OLDER, other[0].settings.hash: OLD}
    assert version.missing == 1
    assert "revision bbbbbbbb, aaaaaaaa" in version.note
    assert "may be one of the code" in version.note


def test_failed_trials_and_other_seeds_do_not_count(plan: Plan) -> None:
    failed = record(plan.trials[0], OLD, status="failed")
    stranger = replace(record(plan.trials[1], OLD), seed=77)
    assert versions.to_report(with_records(plan, failed, stranger)).missing == len(plan.trials)


@pytest.mark.slow
def test_the_report_of_an_updated_study_shows_its_runs_and_no_others(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = Workspace(tmp_path / "work")
    for trial in plan.trials:
        simulated.make_run(
            workspace.root / OLD[:8], name="tiny", config_hash=trial.settings.hash, seed=trial.settings.seed,
            steps=STEPS, evaluation={"every": 20},
        )  # fmt: skip
        workspace.ledger.append(record(trial, OLD))
    extra = replace(record(plan.trials[0], OLD), seed=9, metrics={"val/quality": 1.0})
    workspace.ledger.append(extra)  # of a larger study on the same arms
    study = write(tmp_path / "rates.yaml", set=TINY | {"train.steps": STEPS}, seeds=3)
    assert commands.report(study, None, workspace.root, None, None, tmp_path / "out") == 0
    assert "the 6 trials shown were finished up to 2026-01-02" in " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "out/report.md").read_text()
    assert "**Made by what?** Another version of twinrl" in page
    assert "2 arms, 3 seeds an arm" in page
