"""The pages of the autopsy and of the published run say what their committed tables say."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def docs() -> Iterator[None]:
    """The scripts of ``docs`` as modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        yield


@pytest.fixture(scope="module")
def autopsy() -> ModuleType:
    return importlib.import_module("autopsy")


@pytest.fixture(scope="module")
def runs() -> ModuleType:
    return importlib.import_module("autopsy_runs")


@pytest.fixture(scope="module")
def trials(autopsy: ModuleType) -> pd.DataFrame:
    return pd.read_csv(autopsy.TRIALS)


def test_every_number_of_the_page_is_made_from_the_tables(autopsy: ModuleType, trials: pd.DataFrame) -> None:
    assert autopsy.PAGE.read_text() == autopsy.render(trials), "run python docs/autopsy.py"


def test_every_table_of_the_published_runs_page_is_made_from_its_trials(docs: None) -> None:
    published = importlib.import_module("published_run")
    page = published.PAGE.read_text()
    assert page == published.render(page, published.tables(pd.read_csv(published.TRIALS))), "run docs/published_run.py"
    assert page.count("| held-out judge's reward (`lab_judge`) |") == 1


def test_the_readme_says_what_the_page_says(autopsy: ModuleType, trials: pd.DataFrame) -> None:
    said = " ".join((ROOT / "README.md").read_text().split())
    made = autopsy.values_of(trials)
    values = {name: value.partition(" [")[0] for name, value in made.items()}
    assert (
        f"{values['live_with_broken']} such runs fell apart, {values['early']} of them after an early success" in said
    )
    assert f"without the reward {values['live_without_broken']} did" in said
    assert values["ema_with_broken"] == values["ema_without_broken"]
    assert f"with an EMA teacher (blue) {values['ema_with_broken']}, with the reward and without" in said
    assert f"student survives is {made['margin_reward_live']} times that without the reward" in said
    both, live, reward = (values[f"clipped_{arm}"] for arm in ("live_published", "live_corrected", "ema_published"))
    assert made["clipped_live_published_verdict"] == "a cause"
    assert f"both together make {both} fall, more mildly, which is a cause by the declared rule" in said
    assert f"the live teacher alone ({live}) and the reward alone ({reward}) are not shown to be" in said
    assert f"gradient norms up to {values['early_norm']} under a clip at 10" in said
    assert f"without any preference, breaks {values['dose_residual']}" in said
    assert f"from E(D(z)) that begins as long, {values['dose_large_eta']};" in said
    assert values["dose_from_z"] == values["dose_from_decoded"] == "5 of 5", "either breaks every run"
    broken, _, bound = made["recipe_slow_broken"].partition(" [0.00, ")
    assert made["recipe_fast_broken"] == made["recipe_slow_broken"]
    assert f"at either {broken} seeds fell apart, at most {100 * float(bound.rstrip(']')):.0f} %" in said
    assert "prefers its 1- and 2-step samples to the teacher's" in said
    assert "by the bounds declared beforehand they are no worse than without the reward" in said
    recipe = trials[trials.study == "recommended"]
    assert all((recipe[f"test{nfe}_judge"] > recipe.teacher_judge).all() for nfe in (1, 2))
    assert made["recipe"].count("| yes |") == 4  # two rates, two numbers of evaluations
    assert f"{values['falls_nothing']} fall again, and {values['falls_rectify_clip']} with a clip" in said
    suspects = trials[trials.study == "suspects"].groupby("arm").diverged
    fell = {name: f"{int(runs.sum())} of {len(runs)}" for name, runs in suspects}
    assert f"With E(D(z)), {fell['decoded baseline']} fall apart, as many as without any reward" in said
    assert fell["decoded baseline"] == values["live_without_broken"]
    assert f"with a clip of the reward's own {fell['own clip']}" in said
    for name in ("sigmoid start", "smaller eta", "more rows", "exact pixel gradient", "float32"):
        assert fell[name] == "5 of 5", name


def test_the_unchanged_replays_repeat_their_logs(runs: ModuleType) -> None:
    assert pd.read_csv(runs.REPLAYS).exact.all()
    assert pd.read_csv(runs.FALLS).exact.all()


def test_paired_runs_are_the_same_until_the_reward_starts(autopsy: ModuleType) -> None:
    """Otherwise a difference between arms would not be the reward's."""
    curves = pd.read_parquet(autopsy.CURVES)
    before = curves[(curves.study == "regime") & (curves.step < 400)]
    wide = before.pivot(index=["seed", "step"], columns="arm", values="norm").dropna()
    assert len(wide) >= 39
    for teacher in ("live", "ema"):
        pd.testing.assert_series_equal(
            wide[f"reward=with teacher={teacher}"], wide[f"reward=without teacher={teacher}"], check_names=False
        )


def test_curves_are_read_from_the_log(runs: ModuleType) -> None:
    rows = [{"step": k + 1, "grad/total/norm_raw": 2.0 if k != 60 else 500.0} for k in range(100)]
    points = list(runs.curve(rows))
    assert [point["step"] for point in points] == list(range(10, 101, 10))
    assert [point["norm"] for point in points] == [2.0] * 6 + [500.0] + [2.0] * 3


def test_what_is_made_again_replaces_its_row_and_the_rest_stays(runs: ModuleType) -> None:
    def table(*rows: tuple[str, int, float]) -> pd.DataFrame:
        return pd.DataFrame([{"study": study, "arm": "a", "seed": seed, "fd": fd} for study, seed, fd in rows])

    before, made = table(("search", 0, 1.0), ("regime", 0, 2.0)), table(("regime", 0, 3.0), ("regime", 1, 4.0))
    pd.testing.assert_frame_equal(
        runs.merged(before, made).reset_index(drop=True),
        table(("search", 0, 1.0), ("regime", 0, 3.0), ("regime", 1, 4.0)),
    )


def test_the_committed_trials_are_those_that_the_studies_ask_for(runs: ModuleType, trials: pd.DataFrame) -> None:
    """A study that is changed asks for other configurations; rows of the old ones must not pass for the new."""
    assert all(runs.of_today(*row) for row in zip(trials.study, trials.config_hash, strict=True))
    assert not trials.duplicated(runs.KEY).any()
