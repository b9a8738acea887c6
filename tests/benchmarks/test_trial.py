"""The clock of the trial benchmark, its borders, and its table. No assertion about time."""

import importlib
import json
from pathlib import Path

import pytest

from tests.benchmarks.scripts import script

trial = script("trial")


def test_a_part_is_without_the_parts_inside_it(monkeypatch: pytest.MonkeyPatch):
    now = iter([2.0, 3.0, 7.0, 8.0, 10.0])
    monkeypatch.setattr(trial.time, "process_time", lambda: next(now))
    clock = trial.Clock()
    inner = clock.around("steps", lambda: 5)
    outer = clock.around("first picture", lambda: inner() + 1)
    assert outer() == 6
    clock.switch("rest")
    assert dict(clock.spent) == {"import": 2.0 + 2.0, "first picture": 1.0 + 1.0, "steps": 4.0}


def test_a_part_that_fails_is_left():
    clock = trial.Clock()
    with pytest.raises(ZeroDivisionError):
        clock.around("steps", lambda: 1 / 0)()
    assert clock.parts == ["import"]


def test_every_border_is_a_function_of_this_checkout():
    for border in (border for borders in trial.BORDERS.values() for border in borders):
        module, name = border.split(":")
        found: object = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found), border
    assert set(trial.BORDERS) < set(trial.PARTS)


def test_least_of_the_rounds_and_equal_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    seconds = {"this": iter([9.0, 3.0, 2.0]), "other": iter([9.0, 8.0, 4.0])}
    asked = []

    def made(checkout: Path, arguments: list[str]) -> tuple[dict[str, float], object]:
        asked.append(arguments)
        name = "this" if checkout == trial.HERE else "other"
        value = next(seconds[name])
        return dict.fromkeys(trial.PARTS, value), {"fd": 1.0}

    monkeypatch.setattr(trial, "trial", made)
    out = tmp_path / "trial"
    trial.main(["--rounds", "2", "--against", str(tmp_path), "--out", str(out), "seed=3"])
    result = json.loads(out.with_suffix(".json").read_text())
    assert asked[0] == ["lab", "train.steps=20", "seed=3"]
    assert result["seconds"]["this"]["beside the steps"] == 2.0 * (len(trial.PARTS) - 1)
    assert result["tables_equal"] is True
    assert "| load | 2.00 | 4.00 | 0.50 |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".md").read_text() == capsys.readouterr().out[:-1]
