"""The page of a prompt set: what judges say, and the models' images of each prompt beside one another."""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from twinrl.evaluation.prompt_set import PromptSet, Scores
from twinrl.evaluation.table import IntervalEstimate

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:80rem;margin:1.5rem auto;padding:0 1rem}
table{border-collapse:collapse} td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left} section{border-top:1px solid #bbb;padding:.8rem 0}
.models{display:flex;flex-wrap:wrap;gap:1.5rem} figure{margin:0} figcaption{color:#555}
img{width:9rem;height:9rem;object-fit:contain;image-rendering:auto;background:#f4f4f4;margin:2px}"""


def page(title: str, wanted: PromptSet, scores: Sequence[Scores], folders: Sequence[str], seeds: int) -> str:
    """HTML that needs the models' folders beside it, and nothing else.

    Arguments:
        title: of the page.
        wanted: the prompts.
        scores: of one model, or of two that are compared.
        folders: of the models, relative to the page.
        seeds: images of a prompt.
    """
    judges = list(scores[0].values)
    told = f"{len(wanted.prompts):,} prompts, {seeds} images of each; means and 95 % intervals over prompts."
    order = _order(scores, judges)
    said = f"Prompts on which {html.escape(judges[0])} sees the largest difference come first." if order else ""
    sections = "".join(_section(wanted, i, scores, folders, seeds) for i in order or range(len(wanted.prompts)))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><main><h1>{html.escape(title)}</h1><p>{told}</p>"
        f"{_summary(scores, judges) if judges else ''}<p>{said}</p>{sections}</main></html>\n"
    )


def _order(scores: Sequence[Scores], judges: Sequence[str]) -> list[int]:
    if len(scores) < 2 or not judges:
        return []
    gap = (scores[1].values[judges[0]] - scores[0].values[judges[0]]).mean(1)
    return torch.argsort(gap.abs(), descending=True, stable=True).tolist()


def _summary(scores: Sequence[Scores], judges: Sequence[str]) -> str:
    names = "".join(f"<th>{html.escape(each.model)}</th>" for each in scores)
    more = "<th>difference</th><th>second is better</th>" if len(scores) > 1 else ""
    return f"<table><tr><th>judge</th>{names}{more}</tr>{''.join(_rows(scores, judges))}</table>"


def _rows(scores: Sequence[Scores], judges: Sequence[str]) -> Iterator[str]:
    for judge in judges:
        cells = [interval(each.mean(judge)) for each in scores]
        if len(scores) > 1:
            first, second = scores
            cells += [interval(second.less(first, judge)), f"{second.wins(first, judge):.0%}"]
        yield f"<tr><td>{html.escape(judge)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def interval(found: IntervalEstimate) -> str:
    """A value with its interval; the value alone where there is none."""
    known = found.low == found.low
    return f"{found.value:.4g}" + (f" [{found.low:.4g}, {found.high:.4g}]" if known else "")


def _section(wanted: PromptSet, i: int, scores: Sequence[Scores], folders: Sequence[str], seeds: int) -> str:
    prompt = wanted.prompts[i]
    figures = []
    for each, folder in zip(scores, folders, strict=True):
        sources = [Path(folder, wanted.image(prompt, seed)).as_posix() for seed in range(seeds)]
        images = "".join(
            f'<img loading="lazy" src="{html.escape(source)}" alt="{html.escape(prompt.text)}, seed {seed}">'
            for seed, source in enumerate(sources)
        )
        said = ", ".join(f"{judge} {values[i].mean():.4g}" for judge, values in each.values.items())
        figures.append(
            f"<figure>{images}<figcaption>{html.escape(each.model)} {html.escape(said)}</figcaption></figure>"
        )
    return f'<section><h2>{html.escape(prompt.text)}</h2><div class="models">{"".join(figures)}</div></section>'
