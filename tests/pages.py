"""Whole files and commands as the documentation's pages show them."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def sections(name: str) -> dict[str, str]:
    """Heading → text of a page's sections."""
    parts = re.split(r"^## (.*)\n", page(name), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def files(section: str) -> dict[str, str]:
    """Name → content of the files that a section shows: Python named by its first line, YAML by the line before."""
    python = re.findall(r"```python\n# (\S+)\n(.*?)```", section, re.DOTALL)
    return dict(python + re.findall(r"in `(\S+)`:\n\n```yaml\n(.*?)```", section, re.DOTALL))


def commands(section: str) -> list[str]:
    """The commands of a section, each an indented line."""
    return re.findall(r"^    (twinrl .*)$", section, re.MULTILINE)
