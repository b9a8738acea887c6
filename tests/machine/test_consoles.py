"""What files say neither steers the terminal nor shows it a password; plain lines come at a pace."""

import io
from itertools import pairwise

import pytest
from rich.progress import Progress
from rich.table import Table

from twinrl.machine import consoles
from twinrl.machine.consoles import Console, Description, Pace
from twinrl.machine.text import harmless

ATTACK = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b1A\r\u202eevil"


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("markup", [False, True])
def test_control_characters_are_escaped(terminal: bool, markup: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, markup=markup, width=300)
    table = Table(title=ATTACK, caption=ATTACK)
    table.add_column(ATTACK)
    table.add_row(ATTACK)
    console.print(table)
    console.print(ATTACK, "http://me:pw-handed@host", highlight=False)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count(r"\x1b]52;c;ZXZpbA==\x07") == 5
    assert not set("\x07\x9b\r\u202e") & set(shown)
    assert ("\x1b]" in shown, "\x1b[2J" in shown) == (False, False)
    assert "pw-handed" not in shown


def test_what_people_write_stays() -> None:
    for text in ("un café 写真\u00a0%", "a\tb\nc", "👩\u200d🎨", "p\u2009=\u20091"):
        assert harmless(text) == text
    assert harmless("run-\udcff\0") == r"run-\xff\x00"


def test_a_bar_says_what_it_is_about_as_it_is_written() -> None:
    """As of a laboratory of the folder ``cats [/b]``."""
    console = Console(file=io.StringIO(), force_terminal=True, width=300)
    with Progress(Description(), console=console) as bar:
        bar.add_task(f"building the cats [/b] lab {ATTACK}")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert r"building the cats [/b] lab \x1b]52" in shown
    assert "\x1b]52" not in shown


def test_a_line_is_due_at_each_tenth_and_after_a_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a minute at first; of a long work a tenth of the time so far."""
    now = 0.0
    monkeypatch.setattr(consoles.time, "monotonic", lambda: now)
    pace, told = Pace(), []
    for second in range(36_001):
        now = float(second)
        if pace.due(second / 36_000):
            told.append(second)
    assert told[:3] == [0, 30, 60]
    assert {3600 * tenth for tenth in range(1, 11)} <= set(told)
    gaps = [after - before for before, after in pairwise(told)]
    assert all(gap <= max(30, 0.1 * after + 1) for gap, after in zip(gaps, told[1:], strict=True))
    assert len(told) < 100


def test_quick_work_has_a_line_each_tenth() -> None:
    pace = Pace()
    assert [step for step in range(1, 31) if pace.due(step / 30)] == [1, *range(3, 31, 3)]
