"""Whole files and commands as the documentation's pages show them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAPERS = ("papers/autopsy.md", "papers/published-run.md")
PROGRAMS = ("twinrl", "python", "make", "torchrun", "pytest", "ray", "pip", "git", "mkdir", "export", ".")
"""First words of a line that make it a command."""
NEEDS = re.compile(r"<!-- needs: (.+?) -->")
"""Stands before a block of commands that no test executes, and says what they need."""


@dataclass(frozen=True)
class Command:
    """A command that a page shows.

    Attributes:
        page: relative to the repository.
        line: from 1, of its block or paragraph.
        text: without the comment behind it.
        block: whether it stands in a block of its own, and not inside a sentence or a table.
        needs: what it needs that tests do not have; empty where a test executes it.
    """

    page: str
    line: int
    text: str
    block: bool
    needs: str = ""


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def sections(name: str) -> dict[str, str]:
    """Heading → text of a page's sections."""
    parts = re.split(r"^## (.*)\n", page(name), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def files(section: str) -> dict[str, str]:
    """Name → content of the files that a section shows: named by their first line, or YAML by the line before."""
    named = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", section, re.DOTALL)
    return dict(named + re.findall(r"in `(\S+)`:\n\n```yaml\n(.*?)```", section, re.DOTALL))


def commands(section: str) -> list[str]:
    """The commands of a section, each an indented line."""
    return re.findall(r"^    (twinrl .*)$", section, re.MULTILINE)


def all_pages() -> list[str]:
    """What people read, relative to the repository."""
    own = sorted(path.relative_to(REPOSITORY).as_posix() for path in DOCS.glob("*.md"))
    return ["README.md", "CONTRIBUTING.md", *own, *PAPERS]


def shown(name: str) -> Iterator[Command]:
    """Every command on a page, in blocks and inside sentences."""
    needs = ""
    for token in MarkdownIt("commonmark").enable("table").parse((REPOSITORY / name).read_text()):
        line = token.map[0] + 1 if token.map else 0
        if token.type in ("code_block", "fence") and token.info in ("", "bash", "sh"):
            yield from (Command(name, line, text, True, needs) for text in _commands(_whole_lines(token.content)))
        elif token.type == "inline":
            yield from (Command(name, line, text, False) for text in _commands(_codes(token)))
        found = NEEDS.search(token.content) if token.type == "html_block" else None
        needs = found[1] if found else ""


def _codes(token: Token) -> list[str]:
    return [child.content for child in token.children or [] if child.type == "code_inline"]


def _whole_lines(block: str) -> list[str]:
    """Lines, those that a backslash continues as one."""
    return re.sub(r"\\\n\s*", "", block).splitlines()


def _commands(lines: list[str]) -> Iterator[str]:
    for line in lines:
        text = re.split(r"\s+#\s", line)[0].strip()
        first, _, rest = text.partition(" ")
        if first in PROGRAMS and rest:
            yield text
