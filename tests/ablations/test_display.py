"""The table of a study's arms, as wide as a terminal."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from ablations import study as studies
from ablations.display import arms_table
from ablations.plan import Plan, Trial, Workspace
from ablations.study import Study, StudyConfig

RATES = {"1e-4": {"optim.lr": 1e-4}, "1e-3": {"optim.lr": 1e-3}}
LONG = {
    "teacher": {"live": {}, "averaged": {"teacher": {"kind": "ema", "decay": 0.5}}},
    "reward": {"with": {}, "without": {"optim.eps": 1e-7}},
}


def lines(tmp_path: Path, width: int = 80, **content: object) -> list[str]:
    """The rows of a plan's table, without its title and head."""
    config = StudyConfig.model_validate({"name": "mine", "base": "twinflow"} | content)
    study = Study(config)
    trials = [Trial(arm.name, arm.levels, arm.settings, arm.settings.hash, "f" * 16, (), "s") for arm in study.arms]
    console = Console(file=StringIO(), width=width)
    console.print(arms_table(Plan(study, Workspace(tmp_path), trials)))
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, shown)) <= width
    head = next(index for index, line in enumerate(shown) if "──" in line)
    return [line for line in shown[head + 1 :] if line.strip()]


@pytest.mark.parametrize("metric", ["val/quality", "gradients/reward/share"])
def test_a_grid_of_several_factors_has_a_column_for_each_and_one_line_for_each_arm(tmp_path: Path, metric: str) -> None:
    rows = lines(tmp_path, factors={"rate": RATES, **LONG}, metric=metric)
    assert [row.split()[:3] for row in rows] == [
        [rate, teacher, reward]
        for rate in RATES for teacher in ("live", "averaged") for reward in ("with", "without")
    ]  # fmt: skip


def test_named_arms_keep_their_names(tmp_path: Path) -> None:
    arms = {"kind": "arms", "arms": {"slow": {"rate": "1e-4"}, "fast": {"rate": "1e-3"}}}
    assert [row.split()[0] for row in lines(tmp_path, factors={"rate": RATES}, design=arms)] == ["slow", "fast"]
    assert [row.split()[0] for row in lines(tmp_path, factors={"rate": RATES})] == ["rate=1e-4", "rate=1e-3"]


def test_the_example_fits(tmp_path: Path) -> None:
    example = studies.load("example").config
    assert len(lines(tmp_path, factors=example.factors, base=example.base)) == 4
