"""The page of the autopsy says what its committed tables say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def autopsy() -> ModuleType:
    """``docs/autopsy.py`` as a module."""
    spec = importlib.util.spec_from_file_location("autopsy", ROOT / "docs/autopsy.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trials(autopsy: ModuleType) -> pd.DataFrame:
    return pd.read_csv(autopsy.TRIALS)


def test_every_number_of_the_page_is_made_from_the_tables(autopsy: ModuleType, trials: pd.DataFrame) -> None:
    assert autopsy.PAGE.read_text() == autopsy.render(trials), "run python docs/autopsy.py"


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


def test_outcomes_are_read_from_the_log(autopsy: ModuleType) -> None:
    rows = [{"step": k + 1, "grad/total/norm_raw": 2.0 if k != 60 else 500.0} for k in range(100)]
    points = list(autopsy.curve(rows))
    assert [point["step"] for point in points] == list(range(10, 101, 10))
    assert [point["norm"] for point in points] == [2.0] * 6 + [500.0] + [2.0] * 3
