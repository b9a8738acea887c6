"""``twinrl analyze`` and ``twinrl notebook``: parsing only; everything else is imported when a command runs."""

import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from twinrl.machine.streams import say
from twinrl.machine.text import printable
from twinrl.tracking.store import without_password


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(analyze)
    app.command()(notebook)


def analyze(
    path: Annotated[Path, typer.Argument(metavar="RUN_OR_STUDY", help="run directory, study folder, ledger or log")],
    out: Annotated[Path | None, typer.Option(help="folder of the report; default: report/ in it")] = None,
    metric: Annotated[str | None, typer.Option(help="what arms are ranked by; default: val/quality")] = None,
    base: Annotated[str | None, typer.Option(help="arm that others are compared with")] = None,
    effect: Annotated[float, typer.Option(min=0.05, help="difference worth finding, in standard deviations")] = 1.0,
    interaction: Annotated[list[str] | None, typer.Option(help="A:B, a pair of factors; may be repeated")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="NAME=COLUMN of a foreign log, e.g. step=global_step; may be repeated")
    ] = None,
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            help="MLflow store; RUN_OR_STUDY is then the name of an experiment in it", callback=without_password
        ),
    ] = None,
    mlflow: Annotated[
        bool, typer.Option("--mlflow/--no-mlflow", help="log the report as artifacts of a published run or study")
    ] = True,
) -> None:
    """Write a report about a run or a study, as Markdown and one HTML page.

    Reads run directories and ledgers, and with --column also CSV, JSON, W&B exports and TensorBoard events.
    """
    from analysis.report import report, separated

    pairs = [separated(text, ":") for text in interaction or []]
    mapping = dict(separated(text, "=") for text in column or [])
    written = report(
        path, out, metric=metric, base=base, effect=effect, interactions=pairs, mapping=mapping,
        tracking_uri=tracking_uri, mlflow=mlflow,
    )  # fmt: skip
    typer.echo(printable(written.answer))
    typer.echo(printable(f"report: {written.page}"))


class Kind(StrEnum):
    """What a notebook is about."""

    SPIKES = "spikes"
    ARMS = "arms"


def notebook(
    kind: Annotated[Kind, typer.Argument(help="spikes: of a run; arms: of a study", show_default=False)],
    subject: Annotated[
        Path, typer.Argument(metavar="RUN_OR_STUDY", help="run directory; for arms a folder of runs, or a ledger")
    ],
    fresh: Annotated[bool, typer.Option("--fresh", help="replace the copy that is there, with your changes")] = False,
    show: Annotated[bool, typer.Option("--open/--no-open", help="open it, where a Jupyter is installed")] = True,
) -> None:
    """Copy a notebook beside a run or a study, execute it there and open it.

    Which term spiked: twinrl notebook spikes RUN. Which arm is better: twinrl notebook arms STUDY. Executed again, a
    copy keeps your changes. pip install 'twinrl[notebook]' brings JupyterLab.
    """
    from analysis import notebook as notebooks

    notebooks.check_installed()
    copied = notebooks.copy(kind, subject, fresh)
    try:
        notebooks.execute(copied)
    except notebooks.CellError as error:
        say(str(error))
        raise typer.Exit(1) from error
    typer.echo(printable(f"notebook: {copied}"))
    viewer = notebooks.viewer()
    if show and viewer and sys.stdout.isatty():
        subprocess.run([*viewer, str(copied)], check=False)
    elif not viewer:
        typer.echo(printable(f"to open it: {notebooks.INSTALL}, then jupyter lab {copied}"))
