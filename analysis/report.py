"""``twinrl analyze`` and ``twinrl ablate report``: one page about a run or a study, as Markdown and as HTML.

    <out>/report.html      everything in one file        <out>/report.md      the same as Markdown
    <out>/figures/*.svg    and *.pdf, *.png            <out>/trials.csv     a study's table

``metrics.parquet`` is written beside every run's log, for the next report.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import other_logs, run_page, study_page
from analysis.frames import Run, is_run, load_run, load_study, siblings
from analysis.mlflow_store import FOLDER, from_mlflow, log_report
from analysis.page import Page, Text
from twinrl.config.errors import InputError
from twinrl.machine import files
from twinrl.run import layout

PATIENCE_SECONDS = 60
"""How long to wait for another report into the same folder."""


@dataclass(frozen=True)
class Reported:
    """A report that has been written.

    Attributes:
        page: as HTML. answer: what was found, in one sentence.
    """

    page: Path
    answer: str


def report(
    path: Path | str,
    out: Path | str | None = None,
    *,
    metric: str | None = None,
    base: str | None = None,
    effect: float = 1.0,
    interactions: Sequence[tuple[str, str]] = (),
    mapping: Mapping[str, str] | None = None,
    tracking_uri: str | None = None,
    index: Mapping[str, Any] | None = None,
    mlflow: bool = True,
) -> Reported:
    """Analyze a run directory, a study (folder or ledger) or a foreign log, and write a page about it.

    Arguments:
        path: what to analyze. out: folder of the report; default: ``report`` in it, or beside a file.
        metric: what arms are ranked by; default: the study's own, else ``val/quality``. base: arm to compare with.
        effect: difference worth finding, in standard deviations. interactions: pairs of factors.
        mapping: our name → column, for a foreign log. mlflow: log the report where the run or study was published.
        tracking_uri: read ``path`` as the name of an experiment in this MLflow store.
        index: names of a study's arms, as for :func:`analysis.frames.load_study`; default: ``study.json``.

    Raises:
        InputError: there is nothing to analyze, or it cannot be compared; one line says what is missing.
    """
    path = Path(path)
    if not (tracking_uri or os.path.exists(path)):  # False where the name is too long for a file
        raise InputError(f"nothing at {path}", expected="a run directory, a study folder, a ledger or a log")
    folder = Path(out) if out else _folder_of(path, bool(tracking_uri))
    files.check_writable(folder, str(folder), "name another --out")
    wanted = (metric, effect, interactions)
    with _alone_in(folder):
        if tracking_uri:
            study = from_mlflow(tracking_uri, str(path), base)
            page, runs = study_page.build(study, _made(folder / "figures"), *wanted), list[Run]()
        else:
            page, runs = _page(path, folder, base, index, mapping, wanted)
        written = page.write(folder)[1]
    if mlflow and runs:
        log_report(runs, folder, page.title)
    return Reported(written, page.answer)


def _page(
    path: Path, folder: Path, base: str | None, index: Mapping[str, Any] | None, mapping: Mapping[str, str] | None,
    wanted: tuple[str | None, float, Sequence[tuple[str, str]]],
) -> tuple[Page, list[Run]]:  # fmt: skip
    """The report of what is on this machine, and the runs that it is about."""
    figures = folder / "figures"
    if mapping:
        return _of_log(path, mapping, figures), []
    if kind := other_logs.kind_of(path):
        raise InputError(
            f"{path} is {kind} of another program", expected="names for its columns",
            fix="add e.g. --column step=global_step --column grad/total/norm_raw=grad_norm",
        )  # fmt: skip
    if path.is_dir() and is_run(path):
        run = load_run(path)
        layout.write_metrics(path)
        return run_page.build(run, siblings(run), _made(figures)), [run]
    study = load_study(path, base, index)
    page = study_page.build(study, _made(figures), *wanted)
    table = study.trials.to_csv(index=False)
    files.write_text(folder / "trials.csv", table.encode(errors="backslashreplace").decode())
    return page, list(study.runs.values())


def _folder_of(path: Path, is_name: bool) -> Path:
    """Where the report of a path goes, or of the name of an experiment."""
    if path.is_dir() and not is_name:
        return path / FOLDER
    return Path(f"{path.name}-{FOLDER}") if is_name else path.with_name(f"{path.stem}-{FOLDER}")


def separated(text: str, separator: str) -> tuple[str, str]:
    """The two names of ``A:B`` or ``A=B``. Raises InputError for anything else."""
    first, found, second = text.partition(separator)
    if not found or not first or not second:
        raise InputError(f"{text!r} is no pair", expected=f"two names joined by {separator!r}")
    return first, second


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other process writes there. Where the input turns out wrong, the folders made for it go away again."""
    new = next((path for path in (*reversed(folder.parents), folder) if not path.exists()), None)
    busy = InputError(f"another process writes a report into {folder}", fix="wait for it to end, or name another --out")
    with files.alone(folder / ".lock", busy, PATIENCE_SECONDS):
        try:
            yield
        except InputError:
            if new is not None:
                files.remove(new)
            raise


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _of_log(path: Path, mapping: Mapping[str, str], figures: Path) -> Page:
    """Of another program's log."""
    log = other_logs.read(path, mapping)
    page = run_page.build(Run.of(path, log.rows), [], _made(figures))
    if log.replaced:
        page.add(Text(f"{log.replaced} values were logged again for their step; the last ones count.", note=True))
    return page
