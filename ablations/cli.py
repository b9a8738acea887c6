"""``twinrl ablate``: parsing only; heavy imports come with the command."""

from pathlib import Path
from typing import Annotated

import typer

from twinrl.machine.memory import importing
from twinrl.tracking.store import without_password

app = typer.Typer(no_args_is_help=True, help="Ablation studies: plan, run, look, find the critical learning rate.")

StudyFile = Annotated[str, typer.Argument(metavar="STUDY", help="a study's YAML file, or a shipped study's name")]
Seeds = Annotated[int | None, typer.Option(help="seeds 0 to N−1 instead of the file's; more extend a study")]
Root = Annotated[Path, typer.Option(help="folder of run directories, outputs, ledger and MLflow store")]
Ledgers = Annotated[
    list[Path] | None,
    typer.Option("--ledger", help="ledger file or folder; repeat to read several, the first is written"),
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to join (host:port or auto) with this machine's token; needs a shared disk"),
]
Cpus = Annotated[int | None, typer.Option(min=1, help="cores to use on this machine; default: all")]
Mlflow = Annotated[bool, typer.Option("--mlflow/--no-mlflow", help="show running trials and results in MLflow")]
Uri = Annotated[
    str | None, typer.Option("--tracking-uri", help="MLflow store; default: in --root", callback=without_password)
]

ROOT = Path("runs/ablations")


def register(parent: typer.Typer) -> None:
    """Add ``ablate`` to twinrl's command line; called through the entry point."""
    parent.add_typer(app, name="ablate")


@app.command()
def plan(
    study: StudyFile,
    seeds: Seeds = None,
    root: Root = ROOT,
    ledger: Ledgers = None,
    cpus: Cpus = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="time a few steps for the cost, and keep that for this machine")
    ] = False,
) -> None:
    """Show arms and trials, what is done, and what the rest costs. Starts nothing."""
    with importing():
        from ablations.commands import plan as command

    raise typer.Exit(command(study, seeds, root, ledger, cpus, measure))


@app.command()
def run(
    study: StudyFile,
    seeds: Seeds = None,
    root: Root = ROOT,
    ledger: Ledgers = None,
    address: Address = None,
    cpus: Cpus = None,
    mlflow: Mlflow = True,
    uri: Uri = None,
    report: Annotated[bool, typer.Option("--report/--no-report", help="end with the study's report")] = True,
) -> None:
    """Run what is missing, then answer the study's question. Kill it at any moment: the same command goes on."""
    with importing():
        from ablations.commands import run as command

    raise typer.Exit(command(study, seeds, root, ledger, address, cpus, mlflow, uri, report))


@app.command()
def status(study: StudyFile, seeds: Seeds = None, root: Root = ROOT, ledger: Ledgers = None) -> None:
    """Show what is done, what failed and what is missing."""
    with importing():
        from ablations.commands import status as command

    raise typer.Exit(command(study, seeds, root, ledger))


@app.command()
def report(
    study: StudyFile,
    seeds: Seeds = None,
    root: Root = ROOT,
    ledger: Ledgers = None,
    base: Annotated[str | None, typer.Option(help="arm that the others are compared with")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the report; default: in --root")] = None,
    interaction: Annotated[list[str] | None, typer.Option(help="A:B, a pair of factors; may be repeated")] = None,
) -> None:
    """Answer the study's question: ranking, effects, survival, sample grids, as Markdown and one HTML page.

    After an update of twinrl it shows the trials of the version before, and says so, until as many are made anew.
    """
    with importing():
        from ablations.commands import report as command

    raise typer.Exit(command(study, seeds, root, ledger, base, out, interaction or ()))


@app.command()
def margin(
    study: StudyFile,
    seeds: Seeds = None,
    root: Root = ROOT,
    ledger: Ledgers = None,
    address: Address = None,
    cpus: Cpus = None,
) -> None:
    """Find the largest learning rate at which each arm stays healthy, by bisection."""
    with importing():
        from ablations.commands import margin as command

    raise typer.Exit(command(study, seeds, root, ledger, address, cpus))
