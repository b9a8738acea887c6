"""Where a file of the repository is on the site.

Pages are written with links that work on a plain git host. On the site, pages of ``docs/`` stand at the top and the
README is the front page. Notebooks are pages of their own. Everything else keeps its path. Links are rewritten by that
rule alone.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

REPOSITORY = Path(__file__).parents[1]
FRONT = "README.md"
TOP = "docs/"
NOTEBOOK = ".ipynb"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")
"""A link or picture: its ``!``, text and target."""
ELSEWHERE = re.compile(r"^(#|[a-z][a-z0-9+.-]*:)")


def on_site(source: str) -> str:
    """The place on the site of a file of the repository, both as paths with ``/``."""
    if source.endswith(NOTEBOOK):
        return f"notebooks/{PurePosixPath(source).stem}.md"
    return "index.md" if source == FRONT else source.removeprefix(TOP)


def targets(source: str, text: str) -> Iterator[str]:
    """What the relative links of a page lead to, from the repository's root; folders as well.

    Arguments:
        source: the page, from the repository's root.
        text: its Markdown.
    """
    for found in LINK.finditer(text):
        if not ELSEWHERE.match(found[3]):
            yield _resolved(source, found[3].partition("#")[0])


def _resolved(source: str, target: str) -> str:
    return os.path.normpath(PurePosixPath(source).parent / target).replace(os.sep, "/")


def reached(starts: Iterable[str]) -> set[str]:
    """The pages ``starts`` and all files that links lead to from there, in any number of steps."""
    known: set[str] = set()
    ahead = list(starts)
    while ahead:
        source = ahead.pop()
        path = REPOSITORY / source
        if source in known or not path.is_file():
            continue
        known.add(source)
        if path.suffix == ".md":
            ahead += targets(source, path.read_text())
    return known


def rewritten(source: str, text: str, known: set[str]) -> str:
    """A page's Markdown with the site's links. What the site does not have, such as a folder, stays as text.

    Arguments:
        source: the page, from the repository's root.
        known: files of the repository that are on the site.
    """

    def link(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        if ELSEWHERE.match(target):
            return found[0]
        path, mark, anchor = target.partition("#")
        resolved = _resolved(source, path)
        if resolved not in known:
            return words
        there = os.path.relpath(on_site(resolved), PurePosixPath(on_site(source)).parent).replace(os.sep, "/")
        return f"{picture}[{words}]({there}{mark}{anchor})"

    return LINK.sub(link, text)
