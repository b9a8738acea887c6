"""``twinrl analyze`` and ``twinrl ablate report``: one page about a run or a study, as Markdown and as HTML.

    <out>/report.html      everything in one file        <out>/report.md      the same as Markdown
    <out>/figures/*.svg    and *.pdf, *.png            <out>/trials.csv     a study's table

``metrics.parquet`` is written beside every run's log, for the next report.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis import other_logs, run_page, study_page
from analysis.frames import Run, StudyFrame, is_run, load_run, load_study, siblings
from analysis.mlflow_store import FOLDER, from_mlflow, log_report
from analysis.page import Page, Text
from twinrl.config.errors import InputError
from twinrl.machine import files
from twinrl.run import layout


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
) -> Path:
    """Analyze a run directory, a study (folder or ledger) or a foreign log; returns the HTML page.

    Arguments:
        path: what to analyze. out: folder of the report; default: ``report`` in it, or beside a file.
        metric: what arms are ranked by; default: the study's own, else ``val/quality``.
        base: arm that others are compared with. effect: difference worth finding, in standard deviations.
        interactions: pairs of factors. mapping: our name → column, for a foreign log.
        tracking_uri: read ``path`` as the name of an experiment in this MLflow store.
        mlflow: log the report as artifacts where the run or study was published.
        index: names of a study's arms, as for :func:`analysis.frames.load_study`; default: ``study.json``.

    Raises:
        InputError: there is nothing to analyze, or it cannot be compared; one line says what is missing.
    """
    path = Path(path)
    if tracking_uri:
        folder = Path(out) if out else Path(f"{path.name}-{FOLDER}")
        files.check_writable(folder, str(folder), "name another --out")
        study = from_mlflow(tracking_uri, str(path), base)
        page = study_page.build(study, _made(folder / "figures"), metric, effect, interactions)
        return page.write(folder)[1]
    if not os.path.exists(path):  # False where the name is too long for a file
        raise InputError(f"nothing at {path}", expected="a run directory, a study folder, a ledger or a log")
    folder = Path(out) if out else (path / FOLDER if path.is_dir() else path.with_name(f"{path.stem}-{FOLDER}"))
    files.check_writable(folder, str(folder), "name another --out")
    figures, runs = folder / "figures", []
    if not mapping and (kind := other_logs.kind_of(path)):
        raise InputError(
            f"{path} is {kind} of another program", expected="names for its columns",
            fix="add e.g. --column step=global_step --column grad/total/norm_raw=grad_norm",
        )  # fmt: skip
    if mapping:
        log = other_logs.read(path, mapping)
        page = run_page.build(Run.of(path, log.rows), [], _made(figures))
        if log.replaced:
            page.add(Text(f"{log.replaced} values were logged again for their step; the last ones count.", note=True))
    elif path.is_dir() and is_run(path):
        runs = [load_run(path)]
        page = _of_run(runs[0], _made(figures))
    else:
        study = load_study(path, base, index)
        runs, page = list(study.runs.values()), _of_study(study, _made(figures), metric, effect, interactions)
        study.trials.to_csv(folder / "trials.csv", index=False)
    written = page.write(folder)[1]
    if mlflow and runs:
        log_report(runs, folder, page.title)
    return written


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _of_run(run: Run, figures: Path) -> Page:
    layout.write_metrics(run.path)
    return run_page.build(run, siblings(run), figures)


def _of_study(
    study: StudyFrame, figures: Path, metric: str | None, effect: float, interactions: Sequence[tuple[str, str]]
) -> Page:
    return study_page.build(study, figures, metric, effect, interactions)
