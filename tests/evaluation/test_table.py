"""The final table: its rows, its intervals, its two forms."""

import json
import math

import pytest
import torch

from tests.evaluation.toy import Exact, ToySource
from twinrl.evaluation import EvaluationConfig, FinalTable, LabelProtocol, final_table
from twinrl.evaluation.table import mean_interval, proportion_interval, resplit_interval


@pytest.fixture(scope="module")
def table(source: ToySource, config: EvaluationConfig) -> FinalTable:
    return final_table(LabelProtocol(source, config, "test"), Exact(), Exact(), repeats=3)


def test_rows(table: FinalTable):
    assert [(row.name.split(",")[0], row.nfe) for row in table.rows] == [
        ("student", 1), ("student", 2), ("teacher", 3), ("real", 0), ("real (floor)", 0),
    ]  # fmt: skip
    assert all({"fd", "kid", "recall", "accuracy"} <= set(row.metrics) for row in table.rows)


def test_no_teacher_no_row(source: ToySource, config: EvaluationConfig):
    table = final_table(LabelProtocol(source, config), Exact(), repeats=1)
    assert [row.name for row in table.rows][:2] == ["student", "student"]
    assert math.isnan(table.rows[0].metrics["fd"].low)


def test_guidance_counts_twice(source: ToySource, config: EvaluationConfig):
    table = final_table(LabelProtocol(source, config), Exact(), Exact(), repeats=1, teacher_guidance=1.0)
    assert table.rows[2].nfe == 6


def test_intervals_enclose_and_say_how(table: FinalTable):
    for row in table.rows:
        for name in ("fd", "accuracy"):
            estimate = row.metrics[name]
            assert estimate.low <= estimate.value <= estimate.high
            assert estimate.low < estimate.high
            assert "95%" in estimate.method


def test_a_lossless_codec_costs_nothing(table: FinalTable):
    through, floor = (row.metrics["fd"].value for row in table.rows[-2:])
    assert through == pytest.approx(floor, rel=1e-6)
    assert table.floor == floor


def test_forms_agree(table: FinalTable, tmp_path):
    from rich.console import Console

    table.write(tmp_path / "table.json")
    stored = json.loads((tmp_path / "table.json").read_text())
    assert stored["n"] == 100
    assert stored["repeats"] == 3
    assert stored["rows"][0]["metrics"]["fd"]["value"] == table.rows[0].metrics["fd"].value
    assert stored["rows"][-1]["metrics"]["kid"]["low"] == "nan"
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*table.rich())
    text = console.export_text()
    assert f"{table.rows[0].metrics['fd'].value:.2f}" in text
    assert "re-splits" in text


class TestIntervals:
    def test_student_t(self):
        # mean 2, s = 1, n = 3, t(0.975, 2) = 4.302653
        estimate = mean_interval([1.0, 2.0, 3.0])
        assert estimate.value == 2
        assert estimate.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)

    def test_wilson(self):
        # 8 of 10: centre (8 + z²/2)/(10 + z²), z = 1.959964
        z2 = 1.959964**2
        estimate = proportion_interval(torch.tensor([1.0] * 8 + [0.0] * 2))
        assert (estimate.low + estimate.high) / 2 == pytest.approx((8 + z2 / 2) / (10 + z2), rel=1e-6)

    def test_not_finite(self):
        assert math.isnan(mean_interval([1.0, math.nan]).value)
        assert math.isnan(proportion_interval(torch.tensor([1.0, math.nan])).value)

    def test_resplits_of_one_distribution_enclose_the_floor(self, protocol: LabelProtocol):
        together = type(protocol.other).joined([protocol.reference, protocol.other])
        estimate = resplit_interval(protocol.floor["fd"], together, together, seed=0)
        assert 0 < estimate.low < estimate.high < 10 * protocol.floor["fd"]
