import json
import math
from dataclasses import replace
from typing import Any

import pytest

from twinrl.run import names
from twinrl.stability.divergence import NONFINITE_PARAMETERS, Diverged, Divergence, first_divergence

GOOD, BROKEN, ALIKE = (0.95, 0.8), (0.1, 0.3), (0.99, 0.0)  # judge accuracy and recall


def evaluation(step: int, quality: float, judged: tuple[float, float] = GOOD, nfe: int = 1) -> dict[str, Any]:
    """The row of a step with an evaluation, as the validation protocol names its metrics."""
    accuracy, recall = judged
    metrics = {names.val("accuracy", nfe): accuracy, names.val("recall", nfe): recall}
    return {"step": step, names.LOSS_TOTAL: 1.0, names.VAL_QUALITY: quality, **metrics}


def run(*evaluations: tuple[float, tuple[float, float]]) -> list[dict[str, Any]]:
    """A log with evaluations every 100 steps and a row without one between them."""
    rows = []
    for i, (quality, judged) in enumerate(evaluations):
        rows += [{"step": 100 * i + 50, names.LOSS_TOTAL: 1.0}, evaluation(100 * i + 100, quality, judged)]
    return rows


def step_of(rows: list[dict[str, Any]], **settings: Any) -> int | None:
    found = first_divergence(rows, Divergence.Config(**settings))
    return None if found is None else found.step


def test_it_begins_with_the_first_evaluation_of_the_stretch() -> None:
    found = first_divergence(run((3.0, GOOD), (1.0, GOOD), (9.0, BROKEN), (8.0, BROKEN), (7.0, BROKEN)))
    assert found is not None
    assert (found.step, found.detected, found.series, found.value, found.reference) == (
        300,
        400,
        "val/quality",
        9.0,
        1.0,
    )
    event = found.event(iteration=399, rows=(1, 2))
    assert (event.kind, event.step, event.iteration, event.value, event.rows) == ("diverged", 300, 399, 9.0, (1, 2))


def test_worse_samples_alone_are_no_divergence() -> None:
    assert step_of(run((1.0, GOOD), *[(9.0, GOOD)] * 5)) is None


def test_a_judge_below_its_floor_alone_is_no_divergence() -> None:
    assert step_of(run((1.0, GOOD), *[(1.2, BROKEN)] * 5)) is None
    assert step_of(run(*[(60.0, BROKEN)] * 5)) is None  # not learned yet


@pytest.mark.parametrize("judged", [BROKEN, ALIKE])
def test_either_floor_confirms(judged: tuple[float, float]) -> None:
    rows = run((1.0, GOOD), (9.0, judged), (9.0, judged))
    assert step_of(rows) == 200
    asked_for_the_other = {"accuracy_floor": 0} if judged is BROKEN else {"recall_floor": 0}
    assert step_of(rows, **asked_for_the_other) is None


def test_a_healthy_evaluation_breaks_the_stretch() -> None:
    bad = (9.0, BROKEN)
    assert step_of(run((1.0, GOOD), bad, (9.0, GOOD), bad, (1.0, GOOD), bad)) is None
    assert step_of(run((1.0, GOOD), bad, (1.0, GOOD), bad, bad)) == 400
    assert step_of(run((1.0, GOOD), bad, (1.0, GOOD), bad, bad), evaluations=3) is None
    assert step_of(run((1.0, GOOD), bad, (1.0, GOOD)), evaluations=1) == 200


@pytest.mark.parametrize("best", [0.0, -0.003, -0.1, 1e-5])
def test_the_margin_is_sound_where_the_distance_is_near_zero(best: float) -> None:
    """A factor on the best alone would call 1e-4 a divergence, and with a negative best the best itself."""
    assert step_of(run((best, GOOD), *[(best + 0.04, BROKEN)] * 4)) is None
    assert step_of(run((best, GOOD), *[(best + 0.06, BROKEN)] * 4)) == 200


def test_the_margin_grows_with_the_best() -> None:
    assert step_of(run((10.0, GOOD), *[(15.0, BROKEN)] * 4)) is None
    assert step_of(run((10.0, GOOD), *[(15.1, BROKEN)] * 4)) == 200


def test_nonfinite_samples_count_as_worse_and_below_the_floors() -> None:
    nan = (math.nan, (math.nan, math.nan))
    found = first_divergence(run((1.0, GOOD), nan, nan))
    assert found is not None
    assert found.step == 200
    assert math.isnan(found.value)
    first = first_divergence(run(nan, nan))  # before any finite one
    assert first is not None
    assert (first.step, first.reference) == (100, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nonfinite_loss_is_a_divergence_at_once(bad: float) -> None:
    rows = run((1.0, GOOD), (0.9, GOOD))
    rows[2][names.loss("rectify")] = bad
    found = first_divergence(rows)
    assert found is not None
    assert (found.step, found.detected, found.series) == (150, 150, "loss/rectify")


def test_where_a_policy_skips_steps_several_in_a_row_are_needed() -> None:
    losses = [1.0, math.nan, 1.0, math.nan, math.nan, math.nan, 1.0]
    rows: list[dict[str, Any]] = [{"step": i, names.LOSS_TOTAL: loss} for i, loss in enumerate(losses)]
    rows.insert(4, {"step": 3, "perf/step_seconds": 0.1})  # a row without losses says nothing
    assert step_of(rows) == 1
    assert step_of(rows, nonfinite_steps=3) == 3
    assert step_of(rows, nonfinite_steps=4) is None


def test_nonfinite_parameters_need_no_second_step() -> None:
    assert step_of([{"step": 7, NONFINITE_PARAMETERS: 1}], nonfinite_steps=9) == 7


def test_quality_decides_alone_where_nobody_else_judges() -> None:
    rows = [{"step": i, names.VAL_QUALITY: quality} for i, quality in enumerate([1.0, 9.0, 9.0], start=1)]
    assert step_of(rows) == 2
    assert step_of(run((1.0, GOOD), (9.0, GOOD), (9.0, GOOD)), accuracy_floor=0, recall_floor=0) == 200


def test_evaluations_at_the_start_can_be_left_out() -> None:
    rows = run((60.0, BROKEN), (200.0, BROKEN), (150.0, BROKEN), (40.0, BROKEN), (1.0, GOOD))
    assert step_of(rows) == 200
    assert step_of(rows, after=100) is None
    assert step_of(rows, after=300) is None


def test_the_judge_sees_the_samples_that_the_quality_is_of() -> None:
    rows = [evaluation(1, 1.0, nfe=2)] + [evaluation(s, 9.0, GOOD, nfe=2) for s in (2, 3)]
    assert first_divergence(rows, nfe=2) is None


def test_it_is_absorbing() -> None:
    divergence = Divergence(Divergence.Config())
    news = [divergence.observe(row["step"], row) for row in run((1.0, GOOD), *[(9.0, BROKEN)] * 3, (0.5, GOOD))]
    (told,) = (n for n in news if n is not None)
    assert divergence.outcome == replace(told, recovered=True), "0.5 is as good as before"
    assert divergence.observe(600, {names.LOSS_TOTAL: math.nan}) is None
    assert divergence.outcome.step == told.step


# --- the start, and the end --------------------------------------------------------------------------------

START = evaluation(0, 29.0, (1.0, 0.0))
"""The start weights of a flow-matching teacher: their one-step samples are recognised, and all alike."""
LOST, DIM = (0.1, 0.0), (0.8, 0.0)


def told(*evaluations: tuple[float, tuple[float, float]], ended: bool = True, **settings: Any) -> Diverged | None:
    """The verdict on a run from ``START``."""
    return first_divergence(run(*evaluations), Divergence.Config(**settings), start=START, ended=ended)


def test_a_fall_before_the_first_evaluation_is_one_from_the_start() -> None:
    bad = ((150.0, LOST), (100.0, LOST), (90.0, LOST))
    assert first_divergence(run(*bad)) is None, "without the start nothing was better"
    found = told(*bad, ended=False)
    assert found is not None
    assert (found.step, found.after, found.detected, found.reference) == (100, 0, 200, 29.0)
    assert (found.kind, found.recovered) == ("quality", False)
    later = told((20.0, (1.0, 0.0)), *bad, ended=False)
    assert later is not None
    assert (later.step, later.after, later.reference) == (200, 100, 20.0)


def test_one_that_comes_back_is_told_as_such_and_stays_a_failure() -> None:
    found = told((150.0, (0.19, 0.0)), (80.0, (0.5, 0.0)), (35.0, DIM), accuracy_floor=0.9)
    assert found is not None
    assert (found.step, found.recovered) == (100, True)
    again = told((150.0, LOST), (80.0, LOST), (35.0, DIM), (150.0, LOST))
    assert again is not None
    assert (again.step, again.recovered) == (100, False)
    numbers = run((20.0, GOOD), (20.0, GOOD), (20.0, GOOD))
    numbers[2][names.LOSS_TOTAL] = math.nan
    skipped = first_divergence(numbers)
    assert skipped is not None
    assert (skipped.step, skipped.kind, skipped.recovered) == (150, "nonfinite", True)
    numbers[-1][names.LOSS_TOTAL] = math.nan
    lasting = first_divergence(numbers)
    assert lasting is not None
    assert not lasting.recovered


def test_a_run_that_is_never_whole_again_fell_whatever_its_quality() -> None:
    dim = [(20.0, (0.4, 0.0))] * 4
    assert told(*dim, ended=False) is None
    found = told(*dim)
    assert found is not None
    assert (found.step, found.after, found.kind, found.value, found.reference) == (100, 0, "quality", 0.4, 1.0)
    assert told(*dim, (20.0, GOOD)) is None
    assert told(*dim, accuracy_floor=0) is None


def test_from_random_weights_it_was_never_whole() -> None:
    learning = [(90.0, LOST), (60.0, LOST), (40.0, (0.4, 0.0))]
    found = first_divergence(run(*learning), ended=True)
    assert found is not None
    assert (found.step, found.after, found.kind, found.value) == (100, 0, "never whole", 0.1)
    assert first_divergence(run(*learning, (30.0, (0.6, 0.0))), ended=True) is None, "whole in the end"
    assert first_divergence(run(*learning, (30.0, (0.6, 0.0)), (30.0, (0.4, 0.0))), ended=True) is None, "for a while"
    blind = [{"step": step, names.VAL_QUALITY: 9.0} for step in (1, 2)]
    assert first_divergence(blind, ended=True) is None, "no judge, no verdict"


def test_a_floor_that_the_start_is_below_confirms_nothing_until_it_was_met() -> None:
    """A guided student has no recall: that is no fall. One that had some, and lost it, fell."""
    alike, varied = (90.0, (1.0, 0.0)), (20.0, (1.0, 0.2))
    assert told(alike, alike, alike) is None
    found = told(varied, alike, alike)
    assert found is not None
    assert found.step == 200


def test_a_start_that_is_not_finite_is_no_reference() -> None:
    start = evaluation(0, math.nan, (math.nan, math.nan))
    assert first_divergence(run((90.0, GOOD), (80.0, GOOD)), start=start, ended=True) is None
    found = first_divergence(run((90.0, LOST), (80.0, LOST)), start=start, ended=True)
    assert found is not None
    assert found.kind == "never whole"


ROWS = run((3.0, GOOD), (-0.001, GOOD), (math.nan, BROKEN), (0.0, GOOD), (7.0, ALIKE), (8.0, BROKEN), (1.0, GOOD))


@pytest.mark.parametrize("at", range(len(ROWS) + 1))
@pytest.mark.parametrize("start", [None, START])
def test_a_resume_changes_nothing(at: int, start: dict[str, Any] | None) -> None:
    divergence, again = Divergence(Divergence.Config()), Divergence(Divergence.Config())
    if start is not None:
        divergence.begin(start)
    for row in ROWS[:at]:
        divergence.observe(row["step"], row)
    again.load(json.loads(json.dumps(divergence.state(), allow_nan=False)))
    for row in ROWS[at:]:
        assert again.observe(row["step"], row) == divergence.observe(row["step"], row)
    assert again.outcome == divergence.outcome
    assert again.state() == divergence.state()
    assert again.outcome is not None
    assert again.outcome.step == 500


def test_a_divergence_is_strict_json() -> None:
    found = Diverged(3, 5, "val/quality", math.inf, None, "m")
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["value"] == "inf"
    assert Diverged.from_dict(plain) == found
