"""Start weights are evaluated once for all runs that share them."""

from pathlib import Path

import pytest

from tests.fake_source import register, small
from twinrl.commands import starts
from twinrl.config.errors import InputError
from twinrl.run import names

METRICS = {names.VAL_QUALITY: 2.5, names.val("accuracy", 1): 0.75, names.val("fd", 1): float("inf")}
DECIDES = ("model.network.width=24", "evaluation.n=24", "train.precision=float64", "judges.other=lab_clip")
"""Settings that the metrics of the start hang on."""
ALIKE = ("optim.lr=0.1", "evaluation.every=2", "seed=3", "train.steps=2", "teacher.decay=0.5")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINRL_CACHE", str(tmp_path / "cache"))
    register(monkeypatch)


class Counting:
    """An evaluation that is counted."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, float]:
        self.calls += 1
        return dict(METRICS)


def test_runs_that_share_their_start_share_its_evaluation(tmp_path: Path) -> None:
    evaluate = Counting()
    for changed in ((), *((change,) for change in ALIKE)):
        assert starts.evaluated(small(tmp_path, *changed), "content", evaluate) == METRICS
    assert evaluate.calls == 1
    assert starts.evaluated(small(tmp_path), "other content", evaluate) == METRICS
    assert evaluate.calls == 2


@pytest.mark.parametrize("change", DECIDES)
def test_what_decides_the_metrics_is_in_the_key(tmp_path: Path, change: str) -> None:
    assert starts.key(small(tmp_path, change), "content") != starts.key(small(tmp_path), "content")


def test_random_weights_are_no_start_to_fall_from(tmp_path: Path) -> None:
    evaluate = Counting()
    assert starts.evaluated(small(tmp_path, "train.init=random"), "content", evaluate) is None
    assert evaluate.calls == 0


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    starts.evaluated(small(tmp_path), "content", Counting())
    (file,) = (tmp_path / "cache").rglob("*.json")
    for content in ("{", "[]", "{}", '{"val/quality": "much"}'):
        file.write_text(content)
        with pytest.raises(InputError, match=file.name):
            starts.evaluated(small(tmp_path), "content", Counting())


def test_a_cache_that_cannot_be_written_costs_an_evaluation_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in its place")
    assert starts.evaluated(small(tmp_path), "content", Counting()) == METRICS
