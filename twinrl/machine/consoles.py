"""The terminal that people read: what files and libraries say neither steers it nor shows it a password.

Where there is no terminal, plain lines stand in for a bar; :class:`Pace` says when.
"""

import math
import time
from threading import Lock
from typing import Any

import rich.console
from rich.progress import ProgressColumn, Task
from rich.text import Text

from twinrl.config.secrets import shown
from twinrl.machine.text import harmless


class Console(rich.console.Console):
    """As rich's, whose own control sequences are none of the texts that it is given."""

    def render_str(self, text: str, **named: Any) -> Text:
        """A text, a table's cell or title, with what would steer the terminal escaped."""
        return super().render_str(harmless(shown(text)), **named)


class Pace:
    """When a plain line is due: at the start, at each tenth of the work, and after a silence.

    A silence is half a minute, or a tenth of the time so far where that is longer. So the log of a day stays short.
    """

    TENTHS, SILENCE, OF_ELAPSED = 10, 30.0, 0.1

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._told, self._lock = -1, Lock()

    def due(self, share: float) -> bool:
        """Whether to print a line now that ``share`` in [0, 1] of the work is made; asked, it counts as printed.

        From any thread.
        """
        with self._lock:
            now, tenth = time.monotonic(), math.floor(self.TENTHS * share + 1e-9)
            silence = max(self.SILENCE, self.OF_ELAPSED * (now - self._began))
            if tenth <= self._told and now - self._last < silence:
                return False
            self._last, self._told = now, max(tenth, self._told)
            return True


class Description(ProgressColumn):
    """What a bar is about, as it is written: names in it are no markup."""

    def render(self, task: Task) -> Text:
        """The description of a task."""
        return Text(harmless(shown(task.description)))
