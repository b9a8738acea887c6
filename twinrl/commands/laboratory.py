"""``twinrl lab build``: a laboratory of a folder of captioned pictures, and a page that says what it is good for."""

import html
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

from twinrl.config import Settings, override, validate
from twinrl.data import collection
from twinrl.data.captions import ReadConfig
from twinrl.evaluation import appraisal, grids
from twinrl.evaluation.appraisal import Appraisal
from twinrl.lab import Lab, open_lab
from twinrl.lab.load import build_lab, described, folder_of
from twinrl.lab.progress import watched_by
from twinrl.lab.recipe import MINUTES, LabRecipe, for_pictures
from twinrl.lab.storage import load_json
from twinrl.machine import files
from twinrl.machine.consoles import Description, Pace

PAGE, PICTURE, VALUES = "report.html", "pictures.png", "report.json"
READ, BUILT = 0.03, 0.95
"""Shares of the bar after which pictures are read, and models built."""
CAPTION = 13
"""Letters of a caption above a picture's column."""


class BuildConfig(Settings):
    """How the pictures are read."""

    read: ReadConfig = ReadConfig()


def build(
    path: Path, to: str | None, side: int, label: str | None, minutes: int | None, overrides: list[str],
    console: Console,
) -> int:  # fmt: skip
    """Build a laboratory and report on it; 0, or 130 where it was interrupted.

    Arguments:
        path: of the pictures.
        to: name or folder; None = the name of ``path``.
        side: of a picture in pixels.
        label: column of the classes' names.
        minutes: of the build on two cores.
        overrides: ``read.key=value``.
        console: where it is shown.

    Raises:
        InputError: no laboratory can be built of the pictures, or not there.
    """
    config = validate(BuildConfig, override({}, overrides))
    read = config.read if label is None else config.read.model_copy(update={"label_column": label})
    name = to or (path.stem if path.is_file() else path.resolve().name)
    folder = folder_of(name)
    files.check_writable(folder, f"the laboratory {folder}", "name another with --to, or set TWINRL_CACHE")
    if folder.exists():
        described(folder)  # what is no laboratory is not replaced
    try:
        with Bar(console) as bar:
            made = _built(path, folder, read, for_pictures(side, minutes), minutes or MINUTES[side], bar)
            report(folder, name, bar)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on where it was")
        return 130
    console.print(f"{'built' if made else 'was built before'}: {folder}")
    print_report(folder, console)
    console.print(f"next: twinrl train lab 'data={{source: lab, lab: {name}}}'")
    return 0


def _built(path: Path, folder: Path, read: ReadConfig, recipe: LabRecipe, minutes: int, bar: "Bar") -> bool:
    """Read, check and build; whether there was anything to build."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        found = collection.collect(path, read, recipe.form.side, lambda done: bar.say(f"reading pictures: {done:,}"))
    collection.check(path, found, recipe.form.context)
    material, about = collection.material_of(path, found, folder.name, read.label_column)
    about |= {"pictures": len(found.pictures), "minutes": minutes}
    bar.print(described_in_words(about))
    with watched_by(lambda what, share: bar.say(what, READ + (BUILT - READ) * share)):
        return build_lab(folder, material, recipe, about)


def described_in_words(about: Mapping[str, Any]) -> str:
    """What is built of."""
    left = ", ".join(f"{count} × {reason}" for reason, count in about["left_out"].items())
    classes = f"classes from column {about['label']}" if about["label"] else "classes found in clusters"
    return (
        f"{about['pictures']:,} pictures read as format {about['format']}"
        + (f", left out: {left}" if left else "")
        + f"; {classes}; about {about['minutes']} minutes on two idle cores"
    )


class Bar:
    """One bar from the first picture to the report; a few plain lines where there is no terminal."""

    def __init__(self, console: Console):
        columns = (Description(), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.console, self._pace = console, Pace()
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_interactive)

    def __enter__(self) -> "Bar":
        self.task = self.progress.add_task("", total=1.0)
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def say(self, what: str, share: float = 0.0) -> None:
        """What is done now, and which share of all is made."""
        self.progress.update(self.task, description=what, completed=share)
        if not self.console.is_interactive and self._pace.due(share):
            self.console.print(f"{what} {share:.0%}")

    def print(self, line: str) -> None:
        """A line above the bar."""
        self.progress.console.print(line)


# --- the report -----------------------------------------------------------------------------------------------------


def report(folder: Path, name: str, bar: Bar) -> None:
    """Appraise a laboratory and write its page, picture and values, unless they are there."""
    if not _is_reported(folder):
        with files.alone(folder / ".report.lock", TimeoutError(folder), math.inf):  # of two that built it one reports
            if not _is_reported(folder):
                _report(folder, name, bar)


def _is_reported(folder: Path) -> bool:
    return all((folder / file).exists() for file in (PAGE, PICTURE, VALUES))


def _report(folder: Path, name: str, bar: Bar) -> None:
    lab = open_lab(name)
    stages = list(appraisal.STAGES)
    found = appraisal.appraise(lab, lambda stage: bar.say(stage, BUILT + (1 - BUILT) * stages.index(stage) / 3))
    labels = [caption if len(caption) <= CAPTION else f"{caption[:CAPTION]}…" for caption in found.captions]
    picture = grids.sample_grid(torch.stack(list(found.pictures.values())), list(found.pictures), labels)
    grids.save(picture, folder / PICTURE)
    lines = [*_lines(lab, found), *(appraisal.weaknesses(found))]
    plain = {"lines": lines, "table": found.table.as_dict(), "round_trip": found.round_trip}
    files.write_text(folder / VALUES, json.dumps(plain, indent=1) + "\n")
    files.write_text(folder / PAGE, page(lab, found, described(folder)["about"]))


def print_report(folder: Path, console: Console) -> None:
    """The report's lines."""
    found: dict[str, Any] = load_json(folder / VALUES, folder)
    for line in found["lines"]:
        console.print(line)
    console.print(f"the whole report: {folder / PAGE}")


def _lines(lab: Lab, found: Appraisal) -> list[str]:
    teacher, guided, decoded, floor = found.table.rows
    distances = {row.name: row.metrics["fd"].value for row in found.table.rows}
    retrieval = ", ".join(f"{name} {share:.1%}" for name, share in found.retrieval.items())
    preferred = ", ".join(f"{name} {share:.0%}" for name, share in found.preferred.items())
    return [
        f"codec: mean squared error {found.round_trip:.4f} in [−1, 1]², latents {'×'.join(map(str, lab.latent_shape))}",
        f"judge: {found.accuracy:.1%} of real pictures in {found.classes} classes, of which the commonest has "
        f"{found.share:.0%}; {found.decoded_accuracy:.1%} after the codec",
        f"captions found among {found.candidates}: {retrieval} (by chance {1 / found.candidates:.1%})",
        f"clean preferred to degraded: {preferred}",
        f"Fréchet distance, floor {distances[floor.name]:.2f}: codec {distances[decoded.name]:.2f}, teacher "
        f"{distances[teacher.name]:.2f}, with guidance {appraisal.GUIDANCE:g} {distances[guided.name]:.2f}; the judge "
        f"recognises {teacher.metrics['accuracy'].value:.1%} and {guided.metrics['accuracy'].value:.1%} of its samples",
    ]


def page(lab: Lab, found: Appraisal, about: Mapping[str, Any]) -> str:
    """The report as one HTML page beside its picture."""
    weak = [f"<li>{html.escape(line)}</li>" for line in appraisal.weaknesses(found)]
    items = [f"<li>{html.escape(line)}</li>" for line in _lines(lab, found)]
    captions = [f"<li>{html.escape(caption)}</li>" for caption in found.captions]
    columns = ("fd", "kid", "precision", "recall", "accuracy")
    rows = [
        f"<tr><th>{html.escape(row.name)}</th>" + "".join(f"<td>{row.metrics[c].value:.3f}</td>" for c in columns)
        for row in found.table.rows
    ]
    verdict = f"<ul>{''.join(weak)}</ul>" if weak else "<p>Nothing that was measured is too weak to study with.</p>"
    return f"""<!doctype html><meta charset="utf-8"><title>{html.escape(lab.name)}: a laboratory</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:1.5rem auto;padding:0 1rem}}
img{{max-width:100%}} td,th{{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd}}</style>
<h1>The laboratory {html.escape(lab.name)}</h1>
<p>{html.escape(described_in_words(about))}. {len(lab.train):,} for training, {len(lab.validation):,} for validation,
{len(lab.test):,} for test. Classes: {html.escape(", ".join(lab.classes))}.</p>
<h2>What it is good for</h2><ul>{"".join(items)}</ul>
<h2>What is too weak to study with</h2>{verdict}
<h2>Held-out pictures and the teacher's samples</h2>
<p>A column is one caption. The teacher takes {appraisal.STEPS} Euler steps from the same noise in both rows.</p>
<img src="{PICTURE}" alt="real pictures, round trips and samples"><ol>{"".join(captions)}</ol>
<h2>Against {found.table.n} real pictures of the test split</h2>
<table><tr><th></th>{"".join(f"<th>{c}</th>" for c in columns)}</tr>{"".join(rows)}</table>
<p>Distances are in the judge's features. The floor is that of other real pictures.</p>
"""
