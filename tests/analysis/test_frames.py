import json
import math
from pathlib import Path

import pandas as pd
import pytest

from analysis import frames, run_page, study_page
from analysis.frames import load_run, load_study
from analysis.page import Text
from tests.analysis import simulated
from twinrl.config.errors import InputError
from twinrl.run import names, runlog


@pytest.fixture(scope="module")
def small_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated.make_study(tmp_path_factory.mktemp("studies"), seeds=3, steps=40)


def record(config_hash: str, seed: int, **more: object) -> dict[str, object]:
    """A ledger's line."""
    return {
        "format": "twinrl-ledger/1",
        "config_hash": config_hash,
        "seed": seed,
        "fingerprint": "f",
        "status": "finished",
        "step": 400,
        "message": "",
        "metrics": {"val/quality": 0.1},
        "diverged": None,
        "seconds": 3.0,
        "where": {},
        **more,
    }


def write_lines(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_run_reads_back(tmp_path: Path) -> None:
    run = load_run(simulated.make_run(tmp_path, seed=3, diverges_at=200))
    line = frames.trial_of(run)
    assert (line["seed"], line["config_hash"], line["status"], line["step"]) == (3, "0a1b2c3d", "finished", 400)
    assert (line["diverged"], line["time"], line["kind"]) == (True, 200.0, "quality")
    assert line["val/quality"] == 0.9
    assert line["seconds"] == pytest.approx(4.1, rel=0.01)
    assert len(run.frame()) == 400


def test_what_a_rollback_took_back_is_not_judged(tmp_path: Path) -> None:
    healthy = load_run(simulated.make_run(tmp_path / "another" / "healthy"))
    path = simulated.make_run(tmp_path, diverges_at=200)
    first = load_run(path)
    failure = frames.run_divergence(first)
    assert failure is not None
    assert (failure.step, failure.after, failure.series, failure.recovered) == (200, 180, "val/quality", False)
    (path / "log.jsonl").unlink()
    with runlog.RunLog(path / "log.jsonl") as log:
        for iteration, row in enumerate([*first.rows[:260], *healthy.rows[180:]]):
            log.append(row | {"iteration": iteration})
    rescued = load_run(path)
    assert len(rescued.rows) == 480
    assert [row["step"] for row in rescued.lasting] == list(range(1, 401))
    line = frames.trial_of(rescued)
    assert (line["diverged"], line["kind"], line["val/quality"]) == (False, "", healthy.rows[-1]["val/quality"])
    assert line["seconds"] == pytest.approx(480 * 0.01025, rel=0.01)  # all of the time was spent
    simulated.make_run(tmp_path, name="other", config_hash="00000001")
    said = study_page._survival(load_study(tmp_path), tmp_path)
    assert Text("Rolled back to a checkpoint on the way, and not diverged: 1 of the runs.") in said
    assert "It diverged between steps 180 and 200 (samples fell apart" in run_page._what(first, [])
    assert "It has not diverged. It was rolled back to a checkpoint 1 time." in run_page._what(rescued, [])


def test_the_runs_own_margins_decide_about_divergence(tmp_path: Path) -> None:
    lenient = {"stability": {"divergence": {"absolute": 5.0}}}
    run = load_run(simulated.make_run(tmp_path, diverges_at=200, settings=lenient))
    assert frames.run_divergence(run) is None


def test_arms_and_factors_come_from_the_configurations(small_study: Path) -> None:
    study = load_study(small_study)
    assert (study.arms, study.base) == (["base", "clip", "ema"], "base")
    assert study.factors == ("clip", "teacher")
    assert set(study.arm("ema")["teacher"]) == {"ema"}
    assert len(study.trials) == len(study.runs) == 9
    assert study.trials["seed"].tolist() == [0, 1, 2] * 3


def test_settings_that_always_change_together_are_one_factor(tmp_path: Path) -> None:
    for k, kind in enumerate(("adam", "muon")):
        simulated.make_run(
            tmp_path, name=kind, config_hash=f"0000000{k}", steps=3, settings={"optim": {"kind": kind, "momentum": k}}
        )
    assert load_study(tmp_path).factors == ("optim.kind",)


def test_study_json_names_arms_levels_and_base(small_study: Path, tmp_path: Path) -> None:
    arms = [{"name": f"arm-{k}", "config_hash": arm["hash"], "levels": {"k": str(k)}, "steps": 400}
            for k, arm in enumerate(simulated.ARMS.values())]  # fmt: skip
    (tmp_path / "study.json").write_text(
        json.dumps({"name": "named", "base": "arm-1", "question": "why?", "arms": arms})
    )
    ledger = [record(str(arm["config_hash"]), seed) for arm in arms for seed in range(2)] + [record("ffffffff", 0)]
    write_lines(tmp_path / "host.jsonl", ledger)
    study = load_study(tmp_path)
    assert (study.name, study.base, study.question) == ("named", "arm-1", "why?")
    assert study.arms == ["arm-0", "arm-1", "arm-2"]
    assert study.factors == ("k",)
    assert set(study.trials["planned"]) == {400}
    assert len(study.trials) == 6  # the stranger is another study's


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"seeds": 5}, "seeds"),
        ({"base": ["a"]}, "base"),
        ({"arms": {"a": 1}}, "arms"),
        ({"arms": [{"name": "a"}]}, "config_hash"),
        ({"arms": [{"name": "a", "config_hash": ["x"]}]}, "config_hash"),
        ({"arms": [{"name": "a", "config_hash": "x", "levels": 3}]}, "levels"),
        ({"arms": [{"name": "a", "config_hash": "x", "levels": {"k": []}}]}, "levels"),
        ({"arms": [{"name": "a", "config_hash": "x", "steps": "many"}]}, "steps"),
        ({"critical": [{"arm": "a", "seed": 0, "healthy": "1e-3", "diverged": None}]}, "healthy"),
        ({"runs": 3}, "runs"),
    ],
)  # fmt: skip
def test_a_damaged_study_json_is_named_with_its_key(entry: dict[str, object], said: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "ledger.jsonl", [record("x", 0)])
    (tmp_path / "study.json").write_text(json.dumps(entry))
    with pytest.raises(InputError, match=rf"study\.json is damaged; got .*{said}.*; fix: "):
        load_study(tmp_path)


def test_an_empty_section_of_a_configuration_is_none(tmp_path: Path) -> None:
    run = simulated.make_run(tmp_path, steps=3)
    config = run / "config.yaml"
    config.write_text("name: a\nseed: 0\ntrain:\n")
    assert frames.trial_of(load_run(run))["planned"] == 3


def test_ledger_lines_keep_divergence_and_non_finite_numbers(tmp_path: Path) -> None:
    broken = record("b", 0, status="diverged", step=90, diverged={"step": 80, "kind": "nonfinite"})
    broken["metrics"] = {"val/quality": "nan"}
    pruned, failed = record("b", 1, status="pruned", step=50), record("b", 2, status="failed")
    trials = load_study(write_lines(tmp_path / "l.jsonl", [broken, pruned, failed, record("a", 0)])).trials
    by_key = trials.set_index(["arm", "seed"])
    assert by_key.loc[("b", 0), ["time", "diverged", "kind"]].tolist() == [80.0, True, "nonfinite"]
    assert math.isnan(by_key.loc[("b", 0), "val/quality"])
    assert by_key.loc[("b", 1), "time"] == 50
    assert ("b", 2) not in by_key.index


def test_a_trial_in_both_is_read_from_its_run_directory(tmp_path: Path) -> None:
    run = simulated.make_run(tmp_path, config_hash="00000001", quality=0.3, steps=20)
    write_lines(tmp_path / "l.jsonl", [record("00000001", 0), record("00000002", 0)])
    trials = load_study(tmp_path).trials
    assert len(trials) == 2
    assert trials.loc[trials["config_hash"] == "00000001", "directory"].item() == str(run)


def test_fingerprints_keep_versions_of_the_code_apart(tmp_path: Path) -> None:
    for version, quality in (("old", 0.9), ("new", 0.1)):
        simulated.make_run(tmp_path / version, config_hash="00000001", steps=20, quality=quality)
    with pytest.raises(InputError, match="twinflow-00000001-s0 is there twice"):
        load_study(tmp_path)
    arms = [{"name": "a", "config_hash": "00000001", "fingerprint": "new"}]
    study = load_study(tmp_path, index={"name": "s", "arms": arms})
    assert Path(study.trials["directory"].item()).parent.name == "new"


def test_unfinished_runs_are_watched_but_have_no_verdict(tmp_path: Path) -> None:
    line = frames.trial_of(load_run(simulated.make_run(tmp_path, finished=False)))
    assert (line["status"], line["diverged"], line["time"]) == ("unfinished", False, 400.0)


@pytest.mark.parametrize(
    ("metric", "higher"),
    [("val/quality", False), ("val/recall_1nfe", True), ("val/score/x_2nfe", True), ("val/fd_4nfe", False)],
)
def test_direction_of_metrics(metric: str, higher: bool) -> None:
    assert frames.higher_is_better(metric) is higher


def test_mixed_protocols_are_refused_by_key(tmp_path: Path) -> None:
    simulated.make_run(tmp_path, config_hash="00000001", steps=3)
    simulated.make_run(tmp_path, config_hash="00000002", evaluation={"n": 500}, steps=3)
    with pytest.raises(InputError, match=r"evaluation\.n is 1000 .* got 500"):
        load_study(tmp_path)


def test_mixed_data_are_refused(tmp_path: Path) -> None:
    simulated.make_run(tmp_path, config_hash="00000001", steps=3)
    simulated.make_run(tmp_path, config_hash="00000002", settings={"data": {"source": "mnist"}}, steps=3)
    with pytest.raises(InputError, match=r"data\.source"):
        load_study(tmp_path)


def test_bad_input_is_one_line(tmp_path: Path, small_study: Path) -> None:
    with pytest.raises(InputError, match="holds no trials"):
        load_study(tmp_path)
    with pytest.raises(InputError, match="no arm best; expected one of base, clip, ema"):
        load_study(small_study, "best")
    with pytest.raises(InputError, match="is no ledger"):
        load_study(write_lines(tmp_path / "x.jsonl", [{"a": 1}]))
    with pytest.raises(InputError, match="not a run directory"):
        load_run(tmp_path)


def test_an_empty_log_is_refused(tmp_path: Path) -> None:
    run = simulated.make_run(tmp_path, steps=2)
    (run / "log.jsonl").write_text("")
    with pytest.raises(InputError, match="no steps yet"):
        load_run(run)


def test_a_renamed_directory_keeps_its_arm(tmp_path: Path) -> None:
    one, other = (load_run(simulated.make_run(tmp_path, seed=s, steps=3).rename(tmp_path / f"r{s}")) for s in (0, 1))
    assert one.config_hash == other.config_hash
    assert isinstance(one.frame(), pd.DataFrame)


def test_a_reward_at_the_pictures_cost_is_told_with_samples_before_and_after(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for step in (0, 20, 40, 60):
        (tmp_path / "samples" / f"step-{step:08d}.png").touch()
    series = names.content("edges", 1)
    rows = [{"iteration": step, "step": step, series: value} for step, value in ((20, 0.25), (40, 0.9), (60, 2.0))]
    event = {"step": 60, "kind": "hacking", "series": series, "value": 2.0, "reference": 0.25, "message": "it <rose>"}
    run = frames.Run.of(tmp_path, rows, [event])
    heading, text, gallery = run_page.hacked(run)
    assert "cost" in heading.text
    assert "it <rose>" in text.text
    assert [picture.caption for picture in gallery.pictures] == ["step 20", "step 60"]
    assert "the reward rose at the pictures' cost, seen at step 60" in run_page.sentence(run, [])
    assert run_page.hacked(frames.Run.of(tmp_path, rows)) == []
