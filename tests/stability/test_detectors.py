import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.stability.simulate import TERMS, Simulated, simulate
from twinrl.config.errors import InputError
from twinrl.run import names, runlog
from twinrl.stability.detectors import (
    Finding,
    Leading,
    Watch,
    episodes,
    leading_term,
    scan,
    term_of,
    terms_in,
)
from twinrl.stability.events import Event, Suspects

RMS = {"rms_limit": 2.3}


def events_of(rows: list[dict[str, Any]], watch: Watch | None = None) -> list[Event]:
    """As the trainer asks for them."""
    watch = watch or Watch(Watch.Config(), TERMS)
    found = ((row, watch.observe(row["step"], row)) for row in rows)
    return [event for row, findings in found for event in watch.events(findings, row["iteration"], row)]


def found(step: int, series: str, score: float | None = 9.0, kind: str = "spike") -> Finding:
    return Finding(step, kind, series, 1.0, 1.0, score, True)


def norm(term: str) -> str:
    return names.grad(term, "norm_raw")


@pytest.fixture(scope="module")
def troubled() -> Simulated:
    """Three spikes, a burst of non-finite values, a drift of one term and RMS spikes: everything at once."""
    run = simulate(seed=1, steps=700, spikes=3)
    for row in run.rows:
        row[names.loss("base")] = math.nan if 350 <= row["step"] < 353 else 1.0
        row["opt/rms_max"] = 5.0 if row["step"] % 97 == 0 else 1.0
        if row["step"] > 400:
            row[names.grad("rectify", "norm_raw")] *= 30
        if row["step"] == 351:
            row[names.GRAD_TOTAL_RAW] = math.inf
    return run


# --- planted spikes -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("runs", [40, pytest.param(200, marks=pytest.mark.campaign)])
def test_events_name_the_planted_term(runs: int) -> None:
    """Every second run with 1–3 spikes of 15–200 times in a random term; the others answer weakly."""
    named = right = planted = 0
    for seed in range(runs):
        run = simulate(seed, spikes=1 + seed // 2 % 3 if seed % 2 == 0 else 0)
        truth = {(spike.step, (spike.term,)) for spike in run.planted}
        spikes = [(event.step, event.terms) for event in events_of(run.rows) if event.kind == "spike"]
        named, planted, right = named + len(spikes), planted + len(truth), right + len(truth & set(spikes))
    assert planted >= 0.95 * runs
    assert right >= 0.95 * named  # precision
    assert right >= 0.95 * planted  # recall


def test_an_event_carries_what_a_study_needs() -> None:
    run = simulate(seed=2, spikes=1)
    (spike,) = run.planted
    (event,) = [e for e in events_of(run.rows) if e.kind == "spike"]
    row = run.rows[spike.step - 1]
    assert (event.step, event.iteration, event.terms) == (row["step"], row["iteration"], (spike.term,))
    assert (event.series, event.value) == (f"grad/{spike.term}/norm_raw", row[f"grad/{spike.term}/norm_raw"])
    assert event.value is not None
    assert event.reference is not None
    assert event.reference < event.value / 10
    before = run.rows[spike.step - 8 : spike.step]
    assert event.shares == {t: tuple(r[f"grad/{t}/share"] for r in before) for t in TERMS}
    assert event.shares[spike.term][-1] > 0.5  # the planted term makes the total
    assert event.series in event.message


def test_rows_are_asked_for_the_first_term_and_only_for_events() -> None:
    steady = dict.fromkeys((norm("base"), names.GRAD_TOTAL_RAW, names.LOSS_TOTAL), 1.0)
    rows: list[dict[str, Any]] = [{"step": i, **steady} for i in range(60)]
    rows[40] |= {norm("base"): 20.0, names.GRAD_TOTAL_RAW: 50.0}
    rows[45][names.LOSS_TOTAL] = math.nan
    asked: list[tuple[str, str | None]] = []
    suspects = Suspects((3, 1), (0.5, 1.0), ("mul", "e2e"))
    watch = Watch(Watch.Config(), TERMS)
    for row in rows:
        found = watch.observe(row["step"], row)
        for event in watch.events(found, 0, row, lambda *about: asked.append(about) or suspects):  # type: ignore[func-returns-value]
            assert (event.rows, event.t, event.branches) == suspects
    assert asked == [("spike", "base"), ("nonfinite", None)]


def test_terms_that_spike_together_are_named_by_conspicuousness() -> None:
    rows = [{"step": i, "iteration": i, norm("base"): 1.0, norm("rectify"): 1.0} for i in range(60)]
    rows[40] |= {norm("base"): 20.0, norm("rectify"): 50.0}
    (event,) = events_of(rows)
    assert (event.terms, event.series, event.value) == (("rectify", "base"), norm("rectify"), 50.0)


def test_without_gradients_by_term_the_total_is_watched() -> None:
    run = simulate(seed=2, spikes=1)
    rows = [{k: v for k, v in row.items() if k in ("step", "iteration", names.GRAD_TOTAL_RAW)} for row in run.rows]
    (event,) = events_of(rows)
    assert (event.step, event.terms, event.series, event.shares) == (
        run.planted[0].step,
        (),
        names.GRAD_TOTAL_RAW,
        {},
    )


def test_each_kind_has_episodes_of_its_own(troubled: Simulated) -> None:
    """The drift is named after the term whose norm rose; its new level is one spike before that."""
    events = events_of(troubled.rows)
    kinds = [event.kind for event in events]
    assert (kinds.count("nonfinite"), kinds.count("drift")) == (1, 1)
    (bad,) = [event for event in events if event.kind == "nonfinite"]
    assert (bad.step, bad.terms, bad.series, bad.reference) == (350, ("base",), "loss/base", None)
    (drift,) = [event for event in events if event.kind == "drift"]
    assert drift.terms == ("rectify",)
    assert 490 < drift.step < 520
    assert [e.terms for e in events if e.kind == "spike" and e.step == 401] == [("rectify",)]


def test_unscored_images_are_one_event_and_hide_no_other_trouble() -> None:
    """At every step for 30 steps, then again: two events; a loss that is not finite meanwhile is one of its own."""
    bad = {*range(5, 35), *range(60, 62)}
    rows = [{"step": i, "iteration": i, "loss/base": 1.0, names.REWARD_NONFINITE: 0.25 * (i in bad)} for i in range(80)]
    rows[20]["loss/base"] = math.nan
    watch, suspects = Watch(Watch.Config(), TERMS), Suspects((7, 3), (0.5, 1.0), ("mul", "e2e"))
    found = ((row, watch.observe(row["step"], row)) for row in rows)
    begun = [event for row, now in found for event in watch.events(now, 0, row, lambda *_: suspects)]
    assert [(event.kind, event.step) for event in begun] == [("unscored", 5), ("nonfinite", 20), ("unscored", 60)]
    assert begun[0].message == "the reward is not finite for data row 7, 3 at step 5; it did not pull there"
    assert (begun[0].terms, begun[0].series, begun[0].value) == (("reward",), names.REWARD_NONFINITE, 0.25)
    assert {f.step for f in scan(rows) if f.kind == "unscored"} == bad
    assert [[f.kind for f in episode] for episode in episodes(scan(rows))] == [["nonfinite"]]


# --- resuming and logs --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_resume_at_any_step_changes_nothing(troubled: Simulated) -> None:
    """The watch is saved, thrown away and loaded after every second step."""
    config = Watch.Config(**RMS)
    watch = Watch(config, TERMS)
    straight = [event.as_dict() for event in events_of(troubled.rows, watch)]
    resumed, state = [], json.dumps(Watch(config, TERMS).state(), allow_nan=False)
    for start in range(0, len(troubled.rows), 2):
        again = Watch(config, TERMS)
        again.load(json.loads(state))
        resumed += [event.as_dict() for event in events_of(troubled.rows[start : start + 2], again)]
        state = json.dumps(again.state(), allow_nan=False)
    assert resumed == straight
    assert json.loads(state) == watch.state()
    assert {event["kind"] for event in straight} == {"spike", "drift", "nonfinite"}


@pytest.mark.parametrize("at", [1, 24, 100, 351, 405, 600])
def test_findings_after_a_resume_are_bit_equal(troubled: Simulated, at: int) -> None:
    watch = Watch(Watch.Config(**RMS), TERMS)
    for row in troubled.rows[:at]:
        watch.observe(row["step"], row)
    again = Watch(Watch.Config(**RMS), TERMS)
    again.load(json.loads(json.dumps(watch.state(), allow_nan=False)))
    for row in troubled.rows[at:]:
        expected = [finding.as_dict() for finding in watch.observe(row["step"], row)]
        assert [finding.as_dict() for finding in again.observe(row["step"], row)] == expected


def test_a_log_gives_the_findings_of_the_run(troubled: Simulated, tmp_path: Path) -> None:
    """Through the file, with its strings for non-finite numbers."""
    watch = Watch(Watch.Config(**RMS), sorted(TERMS))
    online = [f.as_dict() for row in troubled.rows for f in watch.observe(row["step"], row)]
    with runlog.RunLog(tmp_path / "log.jsonl") as log:
        for row in troubled.rows:
            log.append(row)
    offline = scan(runlog.read(tmp_path / "log.jsonl"), Watch.Config(**RMS))
    assert [finding.as_dict() for finding in offline] == online
    assert {f.series for f in offline if f.kind == "spike"} >= {"opt/rms_max", names.GRAD_TOTAL_RAW}


def test_a_state_from_before_unscored_images_were_watched_is_taken() -> None:
    watch, again = Watch(Watch.Config(), TERMS), Watch(Watch.Config(), TERMS)
    watch.observe(1, {names.LOSS_TOTAL: math.nan})
    old = watch.state()
    del old["detectors"]["unscored"], old["episodes"]["unscored"]
    again.load(old)
    assert again.state() == watch.state()


def test_a_state_of_other_series_is_refused() -> None:
    state = Watch(Watch.Config(), ("base",)).state()
    with pytest.raises(InputError, match=r"other series.*rectify"):
        Watch(Watch.Config(), ("base", "rectify")).load(state)


# --- the leading term ---------------------------------------------------------------------------------------


def test_the_term_that_was_first_leads_and_by_how_much() -> None:
    episode = [found(10, norm("adversarial")), found(13, names.GRAD_TOTAL_RAW), found(13, norm("base"), 50.0)]
    assert leading_term(episode) == Leading("adversarial", 10, 3)


def test_at_the_same_step_the_most_conspicuous_leads() -> None:
    episode = [found(10, norm("base"), 7.0), found(10, norm("rectify"), 30.0), found(9, names.GRAD_TOTAL_RAW)]
    assert leading_term(episode) == Leading("rectify", 10, -1)
    assert leading_term(episode[:2]) == Leading("rectify", 10, None)
    assert leading_term(episode[2:]) is None


def test_a_nonfinite_loss_leads_too() -> None:
    episode = [found(4, "loss/reward", None, "nonfinite"), found(5, names.GRAD_TOTAL_RAW, None, "nonfinite")]
    assert leading_term(episode) == Leading("reward", 4, 1)


def test_findings_are_grouped_as_events_are() -> None:
    for seed in (1, 2, 3, 6):
        run = simulate(seed, spikes=3)
        grouped = episodes(scan(run.rows))
        assert [(g[0].step, leading_term(g).term) for g in grouped] == [(p.step, p.term) for p in run.planted]  # type: ignore[union-attr]
        assert [g[0].step for g in grouped] == [e.step for e in events_of(run.rows)]


@pytest.mark.parametrize(("apart", "count"), [(10, 1), (11, 2)])
def test_events_and_groups_agree_on_when_an_episode_ends(apart: int, count: int) -> None:
    """After ten healthy steps; here also of another term than the one that began it."""
    rows = [{"step": i, "iteration": i, norm("base"): 1.0, norm("rectify"): 1.0} for i in range(100)]
    rows[50][norm("base")] = rows[50 + apart][norm("rectify")] = 20.0
    assert len(episodes(scan(rows))) == len(events_of(rows)) == count


def test_drifts_belong_to_no_episode() -> None:
    assert episodes([found(3, norm("base"), kind="drift")]) == []


def test_terms_are_read_off_the_names_that_twinrl_writes() -> None:
    assert term_of(names.grad("rectify", "norm_raw")) == term_of(names.loss("rectify")) == "rectify"
    others = (names.GRAD_TOTAL_RAW, names.LOSS_TOTAL, names.grad("base", "share"), names.VAL_QUALITY, "grad/cos/a__b")
    assert [term_of(series) for series in others] == [None] * 5
    assert terms_in([{"step": 1, "loss/b": 1.0}, {names.grad("a", "norm_raw"): 2.0, names.LOSS_TOTAL: 0.0}]) == [
        "a",
        "b",
    ]


def test_the_detectors_need_no_torch() -> None:
    code = "import sys, twinrl.stability.detectors, twinrl.stability.divergence; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
