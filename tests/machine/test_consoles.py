"""What files say neither steers the terminal nor shows it a password, wherever in a table it stands."""

import io

import pytest
from rich.progress import Progress
from rich.table import Table

from twinrl.machine.consoles import Console, Description
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
