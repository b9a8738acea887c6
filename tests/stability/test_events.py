import json
import math
from pathlib import Path

from twinrl.run import runlog
from twinrl.stability.events import NONFINITE, SPIKE, Event, nonfinite


def test_an_event_without_measurements_is_as_short_as_ever() -> None:
    event = Event(7, 6, NONFINITE, ("base",), tuple(range(100)), "non-finite loss/base at step 7")
    plain = event.as_dict()
    assert list(plain) == ["step", "iteration", "kind", "terms", "rows", "message"]
    assert (plain["terms"], plain["rows"]) == (["base"], list(range(64)))


def test_an_event_survives_its_file(tmp_path: Path) -> None:
    """Also through :mod:`runlog`, which decodes the plain fields of a line."""
    shares = {"base": (0.25, -0.5), "reward": (math.inf, 1 / 3)}
    event = Event(7, 9, SPIKE, ("reward", "base"), (3, 1), "m", shares, "grad/reward/norm_raw", -math.inf, 1 / 7)
    line = json.dumps(event.as_dict(), allow_nan=False)
    (tmp_path / "events.jsonl").write_text(line + "\n")
    assert '"value": "-inf"' in line
    assert Event.from_dict(json.loads(line)) == event
    assert Event.from_dict(runlog.read(tmp_path / "events.jsonl")[0]) == event


def test_times_and_branches_go_with_their_rows_and_old_events_have_none() -> None:
    n = 70  # more than are kept
    event = Event(7, 6, SPIKE, ("base",), tuple(range(n)), "m", t=tuple(k / n for k in range(n)), branches=("mul",) * n)
    plain = event.as_dict()
    assert len(plain["rows"]) == len(plain["t"]) == len(plain["branches"]) == 64
    again = Event.from_dict(json.loads(json.dumps(plain)))
    assert (again.rows, again.t, again.branches) == (event.rows[:64], event.t[:64], event.branches[:64])
    del plain["t"], plain["branches"]
    assert (Event.from_dict(plain).t, Event.from_dict(plain).branches) == ((), ())


def test_nan_is_kept_as_nan() -> None:
    plain = Event(1, 0, NONFINITE, (), (), "m", {"base": (math.nan,)}, "loss/total", math.nan).as_dict()
    again = Event.from_dict(json.loads(json.dumps(plain, allow_nan=False)))
    assert again.value is not None
    assert math.isnan(again.value)
    assert math.isnan(again.shares["base"][0])
    assert again.reference is None


def test_nonfinite_names_what_is_not_finite() -> None:
    assert nonfinite({"a": 1.0, "b": math.nan, "c": -math.inf}) == ["b", "c"]
