"""The pages of the autopsy and of the published run say what their committed tables say."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SHARE = re.compile(r"\d+ of \d+(?: \[[^]]*\])?")


@pytest.fixture(scope="module", autouse=True)
def papers() -> Iterator[None]:
    """The scripts of ``papers`` as modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "papers")
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


@pytest.fixture(scope="module")
def made(autopsy: ModuleType, trials: pd.DataFrame) -> dict[str, str]:
    """Every number and table of the autopsy's page; making them takes seconds."""
    return autopsy.values_of(trials)


def test_every_number_of_the_page_is_made_from_the_tables(autopsy: ModuleType, made: dict[str, str]) -> None:
    assert autopsy.PAGE.read_text() == autopsy.render(made), "run python papers/autopsy.py"


def test_the_shares_are_drawn_as_the_text_says_them(autopsy: ModuleType, made: dict[str, str]) -> None:
    (axes,) = autopsy.shares_figure(made).axes
    drawn = [text.get_text() for text in axes.texts]
    names = [name for rows in autopsy.SHARES.values() for name in rows.values()]
    assert drawn == [made[name].partition(" [")[0] for name in names]
    told = autopsy.TEXT.read_text().partition("\n---\n")[0]
    assert [name for name in names if f"${name}" not in told] == ["clipped_base"], (
        "the summary has the picture's numbers"
    )


def test_every_table_of_the_published_runs_page_is_made_from_its_trials(papers: None) -> None:
    published = importlib.import_module("published_run")
    page, tables = published.PAGE.read_text(), published.tables(pd.read_csv(published.TRIALS))
    assert page == published.render(page, tables), "run papers/published_run.py"
    assert all(table.count("\n") >= 2 for table in tables.values()), "a head, and a line at least"


def shares(heading: str) -> list[str]:
    """Shares in the README's section under ``heading``, in order, such as ``3 of 10 [0.07, 0.65]``."""
    _, _, rest = (ROOT / "README.md").read_text().partition(f"\n## {heading}\n")
    return SHARE.findall(" ".join(rest.partition("\n## ")[0].split()))


def test_the_readme_says_what_the_tables_say(trials: pd.DataFrame, made: dict[str, str]) -> None:
    """Its shares with their intervals, in order."""
    suspects = trials[trials.study == "suspects"].groupby("arm").diverged
    fell = {name: importlib.import_module("autopsy_arms").share(runs) for name, runs in suspects}
    assert shares("What made the one public RL run diverge?") == [
        made["live_with_broken"], made["live_without_broken"], fell["decoded baseline"], fell["own clip"],
        made["ema_with_broken"], made["ema_without_broken"],
        made["recipe_slow_broken"], made["recipe_fast_broken"],
    ]  # fmt: skip


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
