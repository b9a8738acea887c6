"""The verdict on runs from their files: the study of ``golden/broken_before_the_first_evaluation.json``.

Twelve runs of ``published`` (500 steps, an evaluation every 100), of which nine broke, five of them before their first
evaluation. The file has the evaluations that ``twinrl train`` logged on two cores, and that of the start.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from analysis import effects, frames
from analysis.frames import load_study
from twinrl.run import columns, layout, names, runlog
from twinrl.stability import verdict
from twinrl.stability.divergence import Diverged

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "broken_before_the_first_evaluation.json").read_text())
CONFIG = {
    "train": {"steps": 500},
    "evaluation": {"nfe": [1], "every": 100},
    "stability": {"divergence": {"accuracy_floor": 0.9, "recall_floor": 0}},
}
FELL = {  # step at the first bad evaluation, and the last sound one before
    ("live_with", "r2"): [(200, 100), (200, 100)],
    ("live_with", "r4"): [(100, 0), (100, 0)],
    ("live_without", "r2"): [(200, 100), (200, 100)],
    ("live_without", "r4"): [(100, 0), (100, 0)],
    ("ema_with", "r2"): [None, None],
    ("ema_with", "r4"): [(100, 0), None],
}


def rows_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The log's rows with an evaluation."""
    return [{"iteration": int(e["step"]) - 1, **e} for e in run["evaluations"]]


@pytest.mark.parametrize("run", GOLDEN["runs"], ids=lambda run: f"{run['arm']}-{run['rate']}-{run['seed']}")
def test_what_broke_before_its_first_evaluation_fell_from_its_start(run: dict[str, Any]) -> None:
    found = verdict.verdict(CONFIG, rows_of(run), GOLDEN["start"], {"status": "finished", "step": 500})
    expected = FELL[run["arm"], run["rate"]][run["seed"]]
    assert (found and (found.step, found.after)) == expected
    if found is not None:
        assert (found.kind, found.recovered) == ("quality", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study's run directories."""
    root = tmp_path_factory.mktemp("study")
    for run in GOLDEN["runs"]:
        path = root / f"{run['arm']}.{run['rate']}-{_hash(run)}-s{run['seed']}"
        path.mkdir()
        config = CONFIG | {"name": "published", "seed": run["seed"]}
        (path / "config.yaml").write_text(yaml.safe_dump(config))
        (path / layout.START).write_text(json.dumps(GOLDEN["start"]))
        (path / "result.json").write_text(json.dumps({"status": "finished", "step": 500}))
        with runlog.RunLog(path / layout.LOG) as log:
            for row in rows_of(run):
                log.append(row | {names.LOSS_TOTAL: 1.0, names.STEP_SECONDS: 0.1})
    return root


def _hash(run: dict[str, Any]) -> str:
    return f"{list(FELL).index((run['arm'], run['rate'])):08x}"


def test_the_study_names_the_teacher_and_not_the_reward(folder: Path) -> None:
    arms = [
        {"name": f"arm={arm} rate={rate}", "config_hash": f"{k:08x}", "levels": {"arm": arm, "rate": rate}}
        for k, (arm, rate) in enumerate(FELL)
    ]
    study = load_study(folder, index={"name": "s", "arms": arms})
    trials, factor = study.trials, "arm (factor)"
    assert study.factors == (factor, "rate")
    assert len(study.arms) == 6
    assert trials.groupby(factor)["diverged"].sum().to_dict() == {"live_with": 4, "live_without": 4, "ema_with": 1}
    assert set(trials["time"][trials["diverged"]]) == {100.0, 200.0}
    reference = {factor: "live_with", "rate": "r2"}
    odds = {e.contrast: e.interval for e in effects.odds_effects(trials, study.factors, reference=reference)}
    assert odds["live_without − live_with"].estimate == pytest.approx(0, abs=1e-6)
    assert odds["ema_with − live_with"].high < 0


def test_a_whole_run_of_the_study_is_whole_and_a_broken_one_says_how(folder: Path) -> None:
    whole, broken = (frames.load_run(folder / name) for name in ("ema_with.r2-00000004-s0", "live_with.r4-00000001-s0"))
    assert frames.run_divergence(whole) is None
    failure = frames.run_divergence(broken)
    assert isinstance(failure, Diverged)
    assert "samples fell apart by step 100, after the start" in failure.message


def test_a_policys_stop_is_a_failure_of_the_kind_of_its_event() -> None:
    rows = [{"iteration": k, "step": k + 1, names.LOSS_TOTAL: 1.0} for k in range(6)]
    events = [{"step": 5, "kind": "spike"}]
    found = verdict.verdict({}, rows, result={"status": "diverged", "step": 6}, events=events)
    assert found is not None
    assert (found.step, found.after, found.kind) == (6, 5, "spike")
    assert verdict.verdict({}, rows, result={"status": "finished", "step": 6}, events=events) is None


def test_the_end_is_judged_only_where_a_run_has_one() -> None:
    rows = [{"iteration": 9, "step": 10, names.VAL_QUALITY: 9.0, names.val("accuracy", 1): 0.2}]
    for result in (None, {"status": "pruned", "step": 10}):
        assert verdict.verdict({}, rows, result=result) is None
    found = verdict.verdict({}, rows, result={"status": "stopped", "step": 10})
    assert found is not None
    assert found.kind == "never whole"


def test_no_final_value_is_from_before_the_failure() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "val/quality": 0.1, "loss/total": 1.0, "note": "words", "flag": True},
        {"step": 2, "loss/total": math.nan},
        {"step": 3, "loss/total": math.nan, "opt/lr": 0.1},
    ]
    failure = Diverged(2, 2, "loss/total", math.nan, None, "", "nonfinite", 1)
    assert verdict.final_values(rows, names.is_outcome) == {
        "val/quality": 0.1,
        "loss/total": pytest.approx(math.nan, nan_ok=True),
    }
    found = verdict.final_values(rows, lambda name: True, failure)
    assert found.pop("opt/lr") == 0.1
    assert set(found) == {"step", "val/quality", "loss/total"}
    assert math.isnan(found["val/quality"])


def random_log(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Rows with bad numbers, evaluations about the margins, and rollbacks."""
    rows, step = [], 0
    for iteration in range(24):
        step = 1 + (int(rng.integers(0, step + 1)) if rng.random() < 0.1 else step)
        row: dict[str, Any] = {"iteration": iteration, "step": step}
        if rng.random() < 0.8:
            row[names.LOSS_TOTAL] = math.nan if rng.random() < 0.15 else float(rng.random())
        if rng.random() < 0.2:
            row["loss/other"] = math.inf if rng.random() < 0.15 else 1
        if rng.random() < 0.3:
            row[names.VAL_QUALITY] = math.nan if rng.random() < 0.1 else float(rng.random())
            row["val/accuracy_1nfe"] = float(rng.random())
        if rng.random() < 0.05:
            row[names.event("nonfinite_parameters")] = int(rng.random() < 0.5)
        rows.append(row)
    return rows


def test_columns_have_the_verdict_of_the_rows(tmp_path: Path) -> None:
    seen = set()
    for seed in range(400):
        rng = np.random.default_rng(seed)
        rows = random_log(rng)
        margins = {"evaluations": int(rng.integers(1, 3)), "nonfinite_steps": int(rng.integers(1, 4))}
        config = {"stability": {"divergence": margins}, "evaluation": {"nfe": [1]}}
        start = {names.VAL_QUALITY: 0.2, "val/accuracy_1nfe": 0.9} if rng.random() < 0.5 else None
        result = {"status": ("finished", "diverged")[seed % 2], "step": 24, "message": "why"}
        known = (start, result, [{"kind": "spike"}])
        expected = verdict.verdict(config, rows, *known)
        log = columns.Columns.of(columns.of_rows(rows, tmp_path))
        assert _told(verdict.of_columns(config, log, *known)) == _told(expected), seed
        values = verdict.since(expected, log.last(names.is_outcome))
        last = verdict.final_values(runlog.surviving(rows, rows), names.is_outcome, expected)
        assert {name: repr(value) for name, value in values.items()} == {n: repr(v) for n, v in last.items()}, seed
        seen.add((expected and expected.kind, expected and expected.recovered))
    assert len(seen) >= 5


def _told(found: Diverged | None) -> tuple[object, ...] | None:
    """All but the words, and which of several series that are not finite in one row is named."""
    return found and (found.step, found.detected, found.reference, found.kind, found.after, found.recovered)
