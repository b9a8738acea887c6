"""The scale benchmark: counts and bytes are those of whole parameters; the page shows what the script calculates."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks.scripts import FOLDER, script
from twinrl.fsdp.ranks import ALONE

scale, paper = script("scale"), script("paper")
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


@pytest.mark.slow
def test_one_process_sends_nothing_and_holds_all(tmp_path):
    found = scale.measure(scale.settings_of("per term", tmp_path), ALONE, steps=1)
    assert found.count == {}
    whole = found.held["student"]
    assert found.held["gradients"] == found.held["average (EMA)"] == whole
    assert found.held["optimizer"] == pytest.approx(2 * whole, rel=0.01)  # and a step of 4 bytes each


@pytest.mark.processes
@pytest.mark.campaign
def test_two_processes(tmp_path, monkeypatch):
    """Each holds its half, and gathers and reduces whole parameters."""
    monkeypatch.syspath_prepend(FOLDER)  # for its processes
    scale.main(["--processes", "1", "2", "--steps", "1", "--out", str(tmp_path / "scale")])
    stored = json.loads((tmp_path / "scale.json").read_text())["found"]
    (alone,), found = ([{name: scale.Found(**one) for name, one in rank.items()} for rank in stored[n]] for n in "12")
    for rank in found:
        for one in rank.values():
            for name in scale.HELD:
                assert one.held[name] == pytest.approx(alone["global"].held[name] / 2, rel=0.02), name
    whole = alone["global"].held["gradients"]
    for one in found[0].values():
        assert one.payload["reduce-scatter"] / whole == pytest.approx(
            round(one.payload["reduce-scatter"] / whole), abs=0.05
        )
    assert all(0 < one.count["all-reduce"] < 10 for one in found[0].values())  # numbers go together
    once, each = (found[0][name].payload["reduce-scatter"] for name in ("global", "per term"))
    assert each > 1.9 * once  # a backward pass for every term
    assert "| 2, per term |" in (tmp_path / "scale.md").read_text()


def test_the_seconds_of_a_step_are_those_of_its_operations_and_bytes():
    inside = paper.Cost(operations=2 * paper.OPERATIONS, moved=3 * paper.INSIDE, between=False, summed=0)
    across = replace(inside, between=True, moved=3 * paper.BETWEEN, summed=paper.BETWEEN)
    assert inside.compute_seconds == pytest.approx(2 / paper.UTILISATION)
    assert (inside.message_seconds, across.message_seconds) == pytest.approx((3, 4))


@pytest.mark.campaign
def test_the_page_shows_what_is_calculated():
    assert paper.report() in PAGE.read_text()
