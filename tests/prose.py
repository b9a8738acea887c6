"""How long the sentences of the pages are. Code, tables and headings do not count.

    python -m tests.prose                  # a line a page, then the ten longest sentences
    python -m tests.prose README.md        # of these pages

The bar is a mean of at most 16 words, and at most 5 % of the sentences over 30. Exit code 1 where a page misses it.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

REPOSITORY = Path(__file__).parents[1]
MEAN, LONG, SHARE_LONG = 16.0, 30, 0.05
"""Words a sentence in the mean; a sentence is long over so many; share of long ones that a page may have."""
SHOWN = 10
END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bal)(?<!\bvs)[.!?][\"')\]*]*(?:\s+|$)")


@dataclass(frozen=True)
class Sentence:
    """Arguments: page: relative to the repository. line: of its paragraph's start, from 1."""

    page: str
    line: int
    text: str

    @property
    def words(self) -> int:
        return sum(any(map(str.isalnum, word)) for word in self.text.split())


def pages() -> list[Path]:
    """The pages that people read: README, docs and the papers' own."""
    tops = ("README.md", "CONTRIBUTING.md")
    return [*(REPOSITORY / top for top in tops), *sorted((REPOSITORY / "docs").rglob("*.md"))]


def sentences(page: str, markdown: str) -> Iterator[Sentence]:
    """The sentences of a page's paragraphs and list items; inline code counts as one word."""
    apart: list[str] = []  # headings and tables that are open here
    for token in MarkdownIt("commonmark").enable("table").parse(_without_meta(markdown)):
        kind, _, side = token.type.rpartition("_")
        if kind in ("heading", "table"):
            apart = [*apart, kind] if side == "open" else apart[:-1]
        if token.type == "inline" and token.map and not apart:
            for text in END.split(_plain(token.children or [])):
                if text.strip():
                    yield Sentence(page, token.map[0] + 1, " ".join(text.split()))


def _without_meta(markdown: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", lambda meta: "\n" * meta[0].count("\n"), markdown, flags=re.DOTALL)


def _plain(children: Sequence[Token]) -> str:
    """Their text: a picture is none, code is one word."""
    instead = {"code_inline": "code", "softbreak": " ", "hardbreak": " ", "image": "", "html_inline": ""}
    return "".join(instead.get(child.type, child.content) for child in children)


@dataclass(frozen=True)
class Count:
    """Arguments: mean: words a sentence. long: share of sentences over 30 words."""

    page: str
    sentences: int
    mean: float
    long: float

    @property
    def good(self) -> bool:
        return self.mean <= MEAN and self.long <= SHARE_LONG


def count(page: str, found: Sequence[Sentence]) -> Count:
    """How long the sentences of a page are; a page without any is good."""
    words = [sentence.words for sentence in found] or [0]
    return Count(page, len(found), sum(words) / len(words), sum(many > LONG for many in words) / len(words))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.prose", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, help="instead of README, CONTRIBUTING and docs/")
    chosen = parser.parse_args(argv).pages or pages()
    found: list[Sentence] = []
    counts: list[Count] = []
    for path in chosen:
        name = str(path.resolve().relative_to(REPOSITORY))
        of_page = list(sentences(name, path.read_text()))
        counts.append(count(name, of_page))
        found += of_page
    print(f"{'page':40} sentences  mean  over {LONG}")
    for one in (*counts, count("all", found)):
        print(f"{one.page:40} {one.sentences:9} {one.mean:5.1f} {one.long:6.0%}  {'' if one.good else '!'}")
    print("\nThe longest:")
    for sentence in sorted(found, key=lambda sentence: -sentence.words)[:SHOWN]:
        print(f"{sentence.words:4} words, {sentence.page}:{sentence.line}: {sentence.text[:100]}")
    return 0 if all(one.good for one in counts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
