"""Every preset and switch on 2 and 4 processes gives the run of one; what each mechanism does is in test_ranks."""

from pathlib import Path
from typing import Any

import pytest

from tests.fsdp import cases
from tests.fsdp.cases import ELASTIC, FULL, POLICIES, STEPS, folder_of, ranks_of, run
from tests.fsdp.spawned import spawned
from twinrl.training.schema import RunConfig
from twinrl.training.trainer import Outcome

pytestmark = [
    pytest.mark.campaign, pytest.mark.processes, pytest.mark.timeout(1500), pytest.mark.usefixtures("known"),
]  # fmt: skip

MIDDLE = STEPS // 2
ON_2 = {name: case for name, case in FULL.items() if name != "hybrid"}


def elastic(base: Path, at: str) -> RunConfig:
    return ELASTIC.settings(base / "elastic" / at)


def on_four(base: Path) -> dict[str, Any]:
    settings = elastic(base, "four")
    return {**cases.run_all(base, FULL), "stopped": run(settings, ranks_of(settings), stop=MIDDLE)}


def on_two(base: Path) -> dict[str, Any]:
    settings = elastic(base, "four to two")
    return {**cases.run_all(base, ON_2), "four to two": run(settings, ranks_of(settings))}


@pytest.fixture(scope="module")
def found(base: Path) -> dict[int, list[dict[str, Any]]]:
    """What each process found, by how many there were; two go on where four have stopped."""
    four = spawned(on_four, 4, base, base)
    cases.copied(elastic(base, "four"), base / "elastic" / "four to two")
    return {4: four, 2: spawned(on_two, 2, base, base)}


@pytest.mark.parametrize(("world", "name"), [(n, name) for n, all_of in ((2, ON_2), (4, FULL)) for name in all_of])
def test_processes_equal_one(base: Path, single: Any, found: Any, world: int, name: str) -> None:
    expected, outcome = single(name)
    settings = FULL[name].settings(folder_of(base, world, name))
    assert [rank[name] for rank in found[world]] == [outcome] * world
    cases.assert_same_run(settings, expected)
    assert cases.events(settings) == cases.events(expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_planted_nan_was_found(base: Path, found: Any, policy: str) -> None:
    events = cases.events(FULL[f"nan, {policy}"].settings(folder_of(base, 2, f"nan, {policy}")))
    assert next(event["step"] for event in events if event["kind"] == "nonfinite") == 3


@pytest.mark.parametrize("at", ["four to two", "four to one"])
def test_resume_of_four_on_fewer(base: Path, found: Any, at: str) -> None:
    assert found[4][0]["stopped"] == Outcome("interrupted", MIDDLE)
    undisturbed, settings = elastic(base, "undisturbed"), elastic(base, at)
    if not undisturbed.directory.exists():
        run(undisturbed)
    if at == "four to one":
        cases.copied(elastic(base, "four"), settings.run.dir)
        run(settings)
    cases.assert_same_run(settings, undisturbed)
