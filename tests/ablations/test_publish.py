"""The MLflow view of a study, from made-up run directories: live, repeatable, described, and drawn in a browser."""

import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest

from ablations import pages, publish
from ablations import plan as plans
from ablations import study as studies
from ablations.ledger import TrialRecord
from ablations.plan import Plan, Trial, Workspace
from ablations.publish import StudyView, following
from ablations.summary import curves, logs_of
from ablations.trial import durable_log
from analysis.frames import load_study
from analysis.mlflow_store import from_mlflow
from tests.ablations.tiny import TINY, write
from tests.tracking.conftest import browser, empty_store  # noqa: F401 (fixtures)
from tests.tracking.pages import drawn, keep_screenshot, wait_for
from tests.tracking.synthetic import SPIKE_AT, make_row
from twinrl.config.errors import InputError
from twinrl.run import names, runlog
from twinrl.run.runlog import RunLog
from twinrl.stability import verdict
from twinrl.stability.events import Event
from twinrl.tracking import store, thinning, ui
from twinrl.tracking.mlflow_view import MLflowView
from twinrl.tracking.thinning import Thinner
from twinrl.training.runs import dump

STEPS = 1500
METRICS = (names.VAL_QUALITY, names.LOSS_TOTAL)
OF_MLFLOW = ("users/current", "ResizeObserver loop")
"""What MLflow's own pages log: its server has no answer to who the user is; a layout that took two rounds."""
pytestmark = pytest.mark.slow


@pytest.fixture
def workspace(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:  # noqa: F811
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(thinning, "REGULAR_BUCKETS", 25)
    monkeypatch.setattr(plans, "content_hash", lambda settings: "content")
    (tmp_path / "work").mkdir()
    shutil.copy(empty_store, tmp_path / "work")
    return Workspace(tmp_path / "work")


def plan_of(workspace: Workspace, name: str = "first", steps: int = STEPS, **content: object) -> Plan:
    path = workspace.root.parent / f"{name}.yaml"
    return plans.make(studies.load(write(path, set=TINY | {"train.steps": steps}, **content)), workspace)


def train(trial: Trial, until: int, durable: int, only: tuple[str, ...] = ()) -> None:
    """Rows up to ``until`` with a checkpoint at ``durable``; what was behind the last checkpoint is written anew."""
    run = trial.run
    run.samples.mkdir(parents=True, exist_ok=True)
    (run.path / "config.yaml").write_text(dump(trial.settings))
    with RunLog(run.log) as log:
        log.trim(offset if (offset := durable_log(run.path)) is not None else 0)
        done = len(list(runlog.rows(run.log)))
        for iteration in range(done, until):
            if iteration == durable:
                _checkpoint(trial, durable, log.sync())
            row = make_row(iteration, trial.settings.seed)
            log.append({k: v for k, v in row.items() if not only or k in (*only, "iteration", "step")})
        if until == durable:
            _checkpoint(trial, durable, log.sync())


def _checkpoint(trial: Trial, step: int, offset: int) -> None:
    folder = trial.run.checkpoints / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"log_offset": offset}))


def end(plan: Plan, trial: Trial, diverged: dict[str, Any] | None = None) -> None:
    metrics = verdict.final_values(runlog.read(trial.run.log), METRICS.__contains__)
    who = trial.settings.hash, trial.settings.seed, trial.fingerprint
    record = TrialRecord(*who, "finished", STEPS, metrics=metrics, diverged=diverged)
    note(plan, trial, replace(record, status="diverged") if diverged else record)


def note(plan: Plan, trial: Trial, record: TrialRecord) -> None:
    """A trial's end, in its run directory and in the ledger."""
    (trial.run.path / "result.json").write_text(json.dumps({"status": record.status, "step": record.step}))
    plan.workspace.ledger.append(record)


def seed_run(view: StudyView, trial: Trial) -> Any:
    """The one MLflow run of a trial."""
    wanted = f"tags.config_hash = '{trial.settings.hash}' and tags.seed = '{trial.settings.seed}'"
    (found,) = view.client.search_runs([view.experiment], filter_string=wanted)
    return found


def arm_run(view: StudyView, arm: str, level: str = "arm") -> Any:
    wanted = f"tags.level = '{level}' and tags.arm = '{arm}'"
    (found,) = view.client.search_runs([view.experiment], filter_string=wanted)
    return found


def points(view: StudyView, run: Any, metric: str) -> list[tuple[int, float]]:
    return sorted((p.step, p.value) for p in view.client.get_metric_history(run.info.run_id, metric))


def thinned_log(trial: Trial, metric: str) -> list[tuple[int, float]]:
    thinner = Thinner(STEPS)
    found = [point for row in runlog.read(trial.run.log) for point in thinner.feed(row)] + thinner.flush()
    return sorted((point.iteration, point.value) for point in found if point.name == metric)


def test_a_running_trial_is_shown_by_its_durable_rows_and_never_twice(workspace: Workspace) -> None:
    plan = plan_of(workspace)
    trial, view = plan.trials[0], StudyView(plan)
    view.try_live()
    assert view.client.search_runs([view.experiment]) == []
    train(trial, until=900, durable=500)
    view.try_live()
    run = seed_run(view, trial)
    assert run.info.status == "RUNNING"
    assert 400 < max(step for step, _ in points(view, run, names.LOSS_TOTAL)) < 500
    assert run.data.params["factor.rate"] == "small"
    arm = arm_run(view, trial.arm)
    assert (run.data.tags["study"], run.data.tags["mlflow.parentRunId"]) == ("first", arm.info.run_id)
    assert run.info.run_id in arm.data.tags[publish.NOTE_TAG]
    assert run.info.run_name == "rate=small · s0"

    train(trial, until=1400, durable=1000)  # killed at 900, resumed from 500
    view.try_live()
    train(trial, until=STEPS, durable=STEPS)
    StudyView(plan).try_live()  # as of a study that was started again
    end(plan, trial)
    view.trial(trial)
    run = seed_run(view, trial)
    assert run.info.status == "FINISHED"
    for metric in METRICS:
        assert points(view, run, metric) == thinned_log(trial, metric)
    assert (SPIKE_AT, 1000.0) in points(view, run, "grad/total/norm_raw")


def test_an_interrupted_study_leaves_interrupted_runs(workspace: Workspace) -> None:
    plan = plan_of(workspace)
    view = StudyView(plan)
    train(plan.trials[0], until=700, durable=600)
    view.try_live()
    assert view.try_summaries() is None
    assert seed_run(view, plan.trials[0]).info.status == "KILLED"


def test_following_publishes_what_ends_and_what_runs(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "LIVE_SECONDS", 0.05)
    plan = plan_of(workspace)
    view, (ended, running) = StudyView(plan), plan.trials[:2]
    train(running, until=300, durable=200)
    train(ended, until=STEPS, durable=STEPS)
    end(plan, ended)
    with following(view) as tell:
        assert wait_for(lambda: view.client.search_runs([view.experiment], filter_string="tags.seed = '0'"), 30)
        tell(ended)
    assert seed_run(view, ended).info.status == "FINISHED"
    assert seed_run(view, running).info.status == "RUNNING"


def test_a_divergence_is_a_metric_and_tags(workspace: Workspace) -> None:
    plan = plan_of(workspace)
    trial, view = plan.trials[0], StudyView(plan)
    train(trial, until=1000, durable=1000)
    (trial.run.events).write_text(json.dumps(Event(999, 998, "spike", (), (), "m").as_dict()) + "\n")
    end(plan, trial, diverged={"step": 999, "kind": "nonfinite"})
    for _ in range(2):
        view.trial(trial)
    run = seed_run(view, trial)
    expected = {"status": "diverged", "diverged": "true", "diverged.step": "999", "diverged.kind": "nonfinite"}
    assert expected.items() <= run.data.tags.items()
    assert [value for _, value in points(view, run, "diverged/step")] == [999]


def test_a_study_reads_back_as_its_ledger_has_it(workspace: Workspace) -> None:
    plan = plan_of(workspace)
    _, went_on, _, _ = plan.trials
    ends: list[dict[str, Any]] = [
        {"status": "diverged", "step": 700, "diverged": {"step": 600, "kind": "quality"}},
        {"diverged": {"step": 900, "kind": "nonfinite"}},
        {"status": "stopped", "step": 1200},
        {},
    ]
    for trial, ended in zip(plan.trials, ends, strict=True):
        step = ended.get("step", STEPS)
        train(trial, until=step, durable=step, only=METRICS)
        if trial is went_on:
            with RunLog(trial.run.log) as log:
                log.append({"iteration": STEPS, "step": STEPS, names.VAL_QUALITY: math.nan})
        metrics = verdict.final_values(runlog.read(trial.run.log), METRICS.__contains__)
        record = TrialRecord(
            trial.settings.hash, trial.settings.seed, trial.fingerprint, "finished", STEPS, metrics=metrics
        )
        note(plan, trial, replace(record, **ended))
    view = StudyView(plan)
    assert view.try_summaries() is None
    assert [seed_run(view, trial).info.status for trial in plan.trials] == ["FAILED", *3 * ["FINISHED"]]

    columns = ["config_hash", "seed", "status", "step", "planned", "diverged", "time", "kind", *METRICS]
    index = {"arms": [{"name": a.name, "config_hash": a.settings.hash, "steps": STEPS} for a in plan.study.arms]}
    ledger = load_study(workspace.root / "ledger.jsonl", index=index).trials[columns].set_index(["config_hash", "seed"])
    store_of = from_mlflow(view.uri, "ablations/first").trials[columns].set_index(["config_hash", "seed"])
    pandas.testing.assert_frame_equal(store_of.sort_index(), ledger.sort_index())


def test_without_a_studys_tags_mlflows_own_status_is_read(workspace: Workspace) -> None:
    """Runs that were published by themselves, as ``twinrl train`` does."""
    view = StudyView(plan := plan_of(workspace))
    for trial, status in zip(plan.trials, ("FAILED", "KILLED", "KILLED", "FINISHED"), strict=True):
        train(trial, until=300, durable=300)
        tags = {"seed": trial.settings.seed, "arm": trial.arm}
        MLflowView(trial.run.path, view.uri, experiment="alone", tags=tags).close(status)
    trials = from_mlflow(view.uri, "alone").trials
    assert sorted(trials["status"]) == ["diverged", "finished", "unfinished", "unfinished"]
    assert (trials["diverged"] == (trials["status"] == "diverged")).all()
    ended = trials["status"] != "unfinished"
    assert set(trials["time"][ended]) == {300.0}
    assert trials["time"][~ended].between(150, 299).all()  # as far as its open bucket


def test_a_reused_trial_stays_where_it_was_and_is_linked(workspace: Workspace) -> None:
    first, trial = (plan := plan_of(workspace)), plan.trials[0]
    train(trial, until=100, durable=100)
    end(first, trial)
    own = StudyView(first).trial(trial)
    second = plan_of(workspace, "second", design={"kind": "arms", "arms": {"again": {"rate": "small"}}}, seeds=1)
    view = StudyView(second)
    assert second.trials[0].key == trial.key
    assert view.trial(second.trials[0]) == own
    assert arm_run(view, "again").data.tags["reused.s0"] == own
    tags = view.client.get_run(own).data.tags
    assert (tags["study"], tags["arm"], tags["study.second"]) == ("first", trial.arm, "again")


def test_summaries_hold_every_series_and_the_pages_are_laid_out(workspace: Workspace) -> None:
    """Also that publishing again adds nothing: no run, no point."""
    plan, steps = plan_of(workspace, steps=200), 200
    arms: dict[str, list[Trial]] = {}
    for trial in plan.trials:
        train(trial, until=steps, durable=steps)
        end(plan, trial, diverged={"step": 100, "kind": "quality"} if trial is plan.trials[-1] else None)
        arms.setdefault(trial.arm, []).append(trial)
    for _ in range(2):  # the second takes the place of the first
        (view := StudyView(plan)).summarise()
    for arm, trials in arms.items():
        run = arm_run(view, arm, "summary")
        assert run.info.run_name == f"{arm} · 2 seeds"
        whole = dict(curves(logs_of(plan.reread(), trials)))
        assert {"grad/rectify/norm_raw", "grad/rectify/share", "loss/base", "val/velocity_mse"} <= set(whole)
        for metric in (*METRICS, "grad/rectify/norm_raw"):
            for suffix, wanted in {"": "median", "/low": "low", "/high": "high"}.items():
                values = getattr(whole[metric], wanted).tolist()
                assert points(view, run, f"{metric}{suffix}") == list(
                    zip(whole[metric].step.tolist(), values, strict=True)
                )
    assert points(view, arm_run(view, "rate=large", "summary"), pages.ALIVE) == [(0, 2), (99, 2), (100, 1), (199, 1)]
    found = view.client.search_runs([view.experiment])
    levels = Counter(run.data.tags.get("level", "seed") for run in found)
    assert levels == {"study": 1, "arm": 2, "summary": 2, "seed": 4}
    own = {run.info.run_id: run.data.tags["arm"] for run in found if run.data.tags.get("level") == "arm"}
    for run in found:
        if run.data.tags.get("level", "seed") in ("seed", "summary"):
            assert own[run.data.tags["mlflow.parentRunId"]] == run.data.tags["arm"]
            assert run.data.params["factor.rate"] == run.data.tags["arm"].removeprefix("rate=")
    (study,) = (run for run in found if run.data.tags.get("level") == "study")
    assert study.data.metrics == {"trials": 4, "diverged": 1}
    assert study.data.tags["factor.rate"] == "small, large"
    names_of = {run.info.run_name for run in found if "seed" in run.data.tags}
    assert names_of == {f"rate={rate} · s{seed}" for rate in ("small", "large") for seed in (0, 1)}


def test_an_arm_is_summed_up_when_its_last_trial_has_ended_and_not_again(workspace: Workspace) -> None:
    plan = plan_of(workspace, steps=100)
    view = StudyView(plan)
    for trial in plan.trials[:3]:
        train(trial, until=100, durable=100, only=METRICS)
        end(plan, trial)
        view.try_trial(trial)
    before = arm_run(view, "rate=small", "summary")
    assert not view.client.search_runs(
        [view.experiment], filter_string="tags.level = 'summary' and tags.arm = 'rate=large'"
    )
    assert view.try_summaries() is None
    assert arm_run(view, "rate=small", "summary").info.run_id == before.info.run_id
    assert arm_run(view, "rate=large", "summary").info.run_name == "rate=large · 1 seed"


def test_a_store_that_is_away_is_left_alone_for_a_while(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_of(workspace)
    view, calls = StudyView(plan), []
    for trial in plan.trials:
        train(trial, until=100, durable=50)

    def away(uri: str) -> None:
        calls.append(uri)
        raise OSError("away")

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(store, "probe", away)
        for _ in range(3):
            view.try_live()
    assert len(calls) == 1
    assert caplog.records == []
    view._paused_until = 0
    view.try_live()
    assert len(view.client.search_runs([view.experiment], filter_string="tags.seed LIKE '%'")) == 4


def test_links_of_a_study_hold_no_password() -> None:
    view = StudyView.__new__(StudyView)
    view.uri = "http://me:pw-handed@host:5000/"
    assert view._base == "http://host:5000"


def test_a_foreign_store_is_refused(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, but a text that is long enough to be read as one" * 20)
    with pytest.raises(InputError, match="can't be used"):
        StudyView(plan_of(workspace), f"sqlite:///{tmp_path / 'mlflow.db'}")


# --- pages ------------------------------------------------------------------------------------------------


@pytest.fixture
def summarised(workspace: Workspace) -> Iterator[tuple[StudyView, ui.Server]]:
    """A study with summaries of two arms, and a server over its store."""
    plan = plan_of(workspace)
    for trial in plan.trials:
        train(trial, until=STEPS, durable=STEPS)
        end(plan, trial)
    view = StudyView(plan)
    view.summarise()
    with ui.Server(view.uri, port=0) as server:
        yield view, server


def severe(browser: Any) -> list[str]:  # noqa: F811
    """The console's errors, but for what MLflow's own pages cause everywhere."""
    entries = browser.get_log("browser")
    return [entry["message"] for entry in entries if not any(word in entry["message"] for word in OF_MLFLOW)]


@pytest.mark.browser
def test_the_page_that_a_study_links_to_draws_norms_by_term_and_arm(
    summarised: tuple[StudyView, ui.Server],
    browser: Any,  # noqa: F811
) -> None:
    """Every arm by its levels with its band in a chart a term, logarithmic; no chart is empty."""
    view, server = summarised
    (study,) = view.client.search_runs([view.experiment], filter_string="tags.level = 'study'")
    browser.get(study.data.tags["compare"].replace(store.LOCAL, server.url))
    arms, owners = ("rate=small", "rate=large"), ("total", "base", "adversarial", "rectify")
    shown = [names.VAL_QUALITY, *(names.grad(owner, "norm_raw") for owner in owners)]
    expected = {f"{arm} · 2 seeds ({band})" for arm in arms for name in shown for band in pages.bands(name)}
    expected |= {f"{arm} · 2 seeds ({pages.ALIVE})" for arm in arms}
    wait_for(lambda: expected <= set(drawn(browser)))
    keep_screenshot(browser, "study-norms")
    curves = drawn(browser)
    assert set(curves) == expected
    norm = names.grad("rectify", "norm_raw")
    steps, values = curves[f"rate=small · 2 seeds ({norm})"]
    assert list(zip(steps, values, strict=True)) == points(view, arm_run(view, "rate=small", "summary"), norm)
    assert sorted(axes(browser)) == ["linear", "linear", *4 * ["log"]]
    assert severe(browser) == []
    browser.get("about:blank")  # a page that goes on asking for runs would miss its server


@pytest.mark.browser
@pytest.mark.campaign
def test_a_studys_own_run_links_to_its_pages_and_each_opens(
    summarised: tuple[StudyView, ui.Server],
    browser: Any,  # noqa: F811
) -> None:
    view, server = summarised
    (study,) = view.client.search_runs([view.experiment], filter_string="tags.level = 'study'")
    browser.get(ui.run_url(server.url, view.experiment, study.info.run_id, ""))
    wait_for(lambda: len(links(browser)) == len(pages.TITLES))
    assert [text for text, _ in links(browser)] == list(pages.TITLES.values())
    (_, _), (_, quality), (_, diverged) = links(browser)
    browser.get(quality)
    wait_for(lambda: f"rate=small · 2 seeds ({names.VAL_QUALITY})" in drawn(browser))
    keep_screenshot(browser, "study-quality")
    assert f"rate=small · 2 seeds ({names.VAL_QUALITY})" in drawn(browser)
    browser.get(diverged)
    seeds = [f"rate={rate} · s{seed}" for rate in ("small", "large") for seed in (0, 1)]
    wait_for(lambda: all(seed in browser.page_source for seed in seeds))
    keep_screenshot(browser, "study-diverged")
    assert all(seed in browser.page_source for seed in seeds)
    assert severe(browser) == []


def axes(browser: Any) -> list[str]:  # noqa: F811
    """The vertical axis of every chart."""
    found = "return [...document.querySelectorAll('.js-plotly-plot')].map(plot => plot.layout.yaxis.type)"
    return list(browser.execute_script(found))


def links(browser: Any) -> list[tuple[str, str]]:  # noqa: F811
    """(text, address) of the links to laid-out pages."""
    found = "return [...document.querySelectorAll('a[href*=viewStateShareKey]')].map(a => [a.innerText, a.href])"
    return [(text, address) for text, address in browser.execute_script(found)]
