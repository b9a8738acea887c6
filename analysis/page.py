"""A report as a list of blocks, written as Markdown and as one HTML page that needs nothing from elsewhere."""

import base64
import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import quote

from analysis.intervals import Interval, number
from twinrl.machine import files
from twinrl.machine.text import harmless

if TYPE_CHECKING:
    import pandas as pd

STYLE = """
:root{color-scheme:light}
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;color:#202124;
  background:#fff;max-width:70rem;margin:1.2rem auto;padding:0 1.25rem}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .5rem} h2{font-size:1.25rem;margin:2.6rem 0 .6rem;
  border-top:1px solid #e3e5e8;padding-top:1.4rem} h2+h2{border:0;padding:0;margin-top:0}
  h3{font-size:1.05rem;margin:1.6rem 0 .4rem}
p{margin:.5rem 0 .8rem;max-width:46rem} .note{color:#5f6368;font-size:.88rem}
.wide{overflow-x:auto} table{border-collapse:collapse;font-size:.88rem;margin:.6rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.32rem .75rem;text-align:left;border-bottom:1px solid #e8eaed;white-space:nowrap}
th{white-space:normal;vertical-align:bottom;border-bottom:2px solid #bdc1c6;font-weight:600} td.n,th.n{text-align:right}
figure{margin:1rem 0} figure img{max-width:100%;height:auto} figcaption{color:#5f6368;font-size:.86rem;max-width:46rem}
.grids{display:grid;grid-template-columns:repeat(auto-fit,minmax(19rem,1fr));gap:1.2rem;align-items:start}
.grids figure{margin:0} p.lead{font-size:1.08rem;line-height:1.45;max-width:none;background:#f6f8fb;
  border-left:4px solid #0072B2;padding:.55rem .9rem;margin:.6rem 0}
.strip{display:flex;gap:.7rem;margin:.3rem 0 1rem} .strip figure{margin:0;flex:1 1 0;min-width:0;max-width:19rem}
.strip img{width:100%;display:block}
.strip figcaption{font-size:.78rem;line-height:1.25} p.asked{font-size:1.02rem;color:#3c4043;margin:.2rem 0 .4rem;
  max-width:none} a{color:#0b57d0} code{font-size:.9em;background:#f1f3f4;padding:.05em .3em;border-radius:3px}
.facts{background:#f6f8fb;border-left:4px solid #0072B2;padding:.9rem 1.2rem;margin:1rem 0 1.2rem}
.facts dt{font-weight:600} .facts dd{margin:.1rem 0 .7rem;max-width:56rem} .facts dd:last-child{margin-bottom:0}
@media print{body{margin:0;max-width:none} h2{break-after:avoid} figure{break-inside:avoid}}
"""
MOST_ROWS = 60
"""Rows of a table on a page; a longer one is in a file beside it."""
PICTURE_BYTES = 600_000
"""Pictures of samples inside a page; further ones are linked."""
ADDRESS = "/:?#[]@!$&'*+,;=%~"
"""What addresses are made of beside letters; brackets would end them."""
MARKUP = {"<": "&lt;", "]": "&#93;"}
MEDIA = {".svg": "image/svg+xml", ".png": "image/png", ".jpg": "image/jpeg"}


@dataclass(frozen=True)
class Heading:
    """A heading of level 2 or 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph of plain text, without markup; ``note`` is for remarks on method."""

    text: str
    note: bool = False


@dataclass(frozen=True)
class Answered:
    """The answer in a sentence, below the question that it answers, where there is one."""

    text: str
    question: str = ""


@dataclass(frozen=True)
class Table:
    """A table; numbers are shown with three digits. Of a long one the page shows the first rows.

    Attributes:
        name: of the file that holds all rows of a long one.
    """

    frame: "pd.DataFrame"
    name: str = "table"

    @property
    def file(self) -> str:
        """Where all its rows are, beside the page; empty where the page has them."""
        return f"tables/{self.name}.csv" if len(self.frame) > MOST_ROWS else ""

    @property
    def said(self) -> str:
        """What a reader must know of a long one."""
        return f"The first {MOST_ROWS} of {len(self.frame):,} rows; all of them:"


@dataclass(frozen=True)
class Picture:
    """An image file with a caption; a click leads to ``whole``, of which it is a part, where there is one."""

    path: Path
    caption: str = ""
    whole: Path | None = None


@dataclass(frozen=True)
class Gallery:
    """Image files side by side, each with its caption.

    Attributes:
        low: whether they are one row.
    """

    pictures: Sequence[Picture]
    low: bool = False


@dataclass(frozen=True)
class Links:
    """Addresses with their names."""

    targets: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Facts:
    """Questions with their answers: what a reader in a hurry reads."""

    pairs: Sequence[tuple[str, str]]


PageBlock: TypeAlias = Heading | Text | Answered | Table | Picture | Gallery | Links | Facts


@dataclass
class Page:
    """A titled list of blocks."""

    title: str
    blocks: list[PageBlock] = field(default_factory=list)

    def add(self, *blocks: PageBlock) -> None:
        """Append blocks."""
        self.blocks.extend(blocks)

    @property
    def answer(self) -> str:
        """The sentence that the page opens with; empty where it has none."""
        return next((block.text for block in self.blocks if isinstance(block, Answered)), "")

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``report.md`` and ``report.html``, and long tables, into ``folder``; returns both paths."""
        markdown, page = folder / "report.md", folder / "report.html"
        for table in (block for block in self.blocks if isinstance(block, Table) and block.file):
            (folder / table.file).parent.mkdir(exist_ok=True)
            files.write_text(folder / table.file, harmless(table.frame.map(cell).to_csv(index=False)))
        files.write_text(markdown, harmless(self.markdown(folder)))
        files.write_text(page, harmless(self.html(folder)))
        return markdown, page

    def markdown(self, folder: Path) -> str:
        """The page as Markdown, its images referred to relative to ``folder``."""
        return "\n\n".join([f"# {_plain(self.title)}", *(_markdown(block, folder) for block in self.blocks)]) + "\n"

    def html(self, folder: Path) -> str:
        """The page as HTML with style and images inside; what is too much for a page is linked, as in ``folder``."""
        title = html.escape(self.title)
        body = "\n".join(_html(block, folder) for block in self.blocks)
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
        return (
            f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n'
            f"<body><h1>{title}</h1>\n{body}\n</body></html>\n"
        )


def cell(value: object) -> str:
    """A table cell for people."""
    if value is None:
        return "–"
    if isinstance(value, Interval):
        return str(value)
    if isinstance(value, float):
        return f"{value:,.0f}".replace("-", "−") if value.is_integer() and abs(value) < 1e6 else number(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return str(value)


def _is_numeric(column: "pd.Series") -> bool:
    return all(isinstance(value, int | float | Interval) or value is None for value in column)


# --- Markdown ---------------------------------------------------------------------------------------------


def _markdown(block: PageBlock, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Text(text, note):
            return f"*{_plain(text)}*" if note else _plain(text)
        case Answered(text, question):
            return "\n\n".join([*([_plain(question)] if question else []), f"**{_plain(text)}**"])
        case Table(frame):
            more = f"\n\n{block.said} [{block.file}]({block.file})" if block.file else ""
            return _markdown_table(frame[:MOST_ROWS]) + more
        case Picture(path, caption):
            caption = _plain(caption)
            return f"![{caption}]({_relative(path, folder)})" + (f"\n\n{caption}" if caption else "")
        case Gallery(pictures):
            return "\n\n".join(_markdown(picture, folder) for picture in pictures)
        case Links(targets):
            return "\n".join(f"- [{_plain(name)}]({quote(address, safe=ADDRESS)})" for name, address in targets)
        case Facts(pairs):
            return "\n\n".join(f"**{_plain(question)}** {_plain(answer)}" for question, answer in pairs)


def _plain(text: str) -> str:
    """A text of one line that makes no elements, links or pictures, whatever names are in it."""
    return re.sub(r"<(?=[A-Za-z/!?])|\](?=[(\[:])|\s*\n\s*", lambda found: MARKUP.get(found[0], " "), text)


def _markdown_table(frame: "pd.DataFrame") -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_plain(text).replace("|", "\\|") for text in cells) + " |"

    rule = ["--:" if _is_numeric(frame[name]) else ":--" for name in frame.columns]
    rows = [[cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join(line(row) for row in [[str(name) for name in frame.columns], rule, *rows])


def _relative(path: Path, folder: Path) -> str:
    """An address that is a file's, whatever it is called."""
    import os

    return quote(os.path.relpath(path, folder).replace(os.sep, "/"), errors="surrogateescape")


# --- HTML -------------------------------------------------------------------------------------------------


def _html(block: PageBlock, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text, note):
            return f"<p{' class=note' if note else ''}>{html.escape(text)}</p>"
        case Answered(text, question):
            asked = f"<p class=asked>{html.escape(question)}</p>" if question else ""
            return f"{asked}<p class=lead>{html.escape(text)}</p>"
        case Table(frame):
            more = f'<p class=note>{block.said} <a href="{block.file}">{block.file}</a></p>' if block.file else ""
            return _html_table(frame[:MOST_ROWS]) + more
        case Picture(path, caption):
            below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
            image = f'<img alt="{html.escape(caption, quote=True)}" src="{data_uri(path)}">'
            if block.whole is not None:
                image = f'<a href="{html.escape(_relative(block.whole, folder), quote=True)}">{image}</a>'
            return f"<figure>{image}{below}</figure>"
        case Gallery(pictures, low):
            return _html_gallery(pictures, folder, "strip" if low else "grids")
        case Links(targets):
            items = (
                f'<li><a href="{html.escape(to, quote=True)}">{html.escape(name)}</a></li>' for name, to in targets
            )
            return f"<ul>{''.join(items)}</ul>"
        case Facts(pairs):
            texts = (f"<dt>{html.escape(question)}</dt><dd>{html.escape(answer)}</dd>" for question, answer in pairs)
            return f"<dl class=facts>{''.join(texts)}</dl>"


def _html_gallery(pictures: Sequence[Picture], folder: Path, kind: str) -> str:
    """Pictures as far as a page can hold them, the first in any case; links to the others."""
    sizes = accumulate(picture.path.stat().st_size for picture in pictures)
    inside = max(1, sum(size <= PICTURE_BYTES for size in sizes))
    shown = "".join(_html(picture, folder) for picture in pictures[:inside])
    others = Links([(picture.caption, _relative(picture.path, folder)) for picture in pictures[inside:]])
    return f"<div class={kind}>{shown}</div>" + (_html(others, folder) if others.targets else "")


def _html_table(frame: "pd.DataFrame") -> str:
    marks = [" class=n" if _is_numeric(frame[name]) else "" for name in frame.columns]
    head = "".join(
        f"<th{m}>{_unbroken(html.escape(str(name)))}</th>" for m, name in zip(marks, frame.columns, strict=True)
    )
    rows = (
        "".join(f"<td{m}>{html.escape(cell(value))}</td>" for m, value in zip(marks, row, strict=True))
        for row in frame.itertuples(index=False)
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _unbroken(title: str) -> str:
    """A column's title in which what is in brackets stays on one line."""
    return re.sub(r"[\[(][^\])]*[\])]", lambda found: found[0].replace(" ", "\u00a0"), title)


def data_uri(path: Path) -> str:
    """The file's content as an address, so that a page holds its images."""
    return f"data:{MEDIA[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def share_text(share: float) -> str:
    """A share in per cent, small ones with two digits."""
    return f"{100 * share:.2g} %" if 0 < share < 0.01 else percent(share)


def percent(share: float) -> str:
    """A share in per cent for people."""
    return "–" if math.isnan(share) else f"{100 * share:.0f} %"
