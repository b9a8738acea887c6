"""The terminal that people read: what files and libraries say neither steers it nor shows it a password."""

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


class Description(ProgressColumn):
    """What a bar is about, as it is written: names in it are no markup."""

    def render(self, task: Task) -> Text:
        """The description of a task."""
        return Text(harmless(shown(task.description)))
