"""What ``twinrl ablate``'s commands do, free of their parsing."""

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ablations import display, runner, versions
from ablations import margin as margins
from ablations import plan as plans
from ablations import study as studies
from ablations import timing as timings
from ablations.cluster import Machine, usable_cores
from ablations.plan import Plan, Workspace
from ablations.publish import StudyView, following
from ablations.runner import Runner
from ablations.study import Study
from twinrl.commands import program
from twinrl.config.errors import InputError
from twinrl.machine.cluster import LostError

FAILED, INTERRUPTED = 1, 130


def plan(
    name: str, seeds: int | None, root: Path, ledgers: Sequence[Path] | None, cpus: int | None, measure: bool
) -> int:
    """``twinrl ablate plan``."""
    console, made = Console(), _plan(name, seeds, root, ledgers)
    study = made.study
    if study.config.question:
        console.print(f"[italic]{escape(study.config.question)}[/]")
    console.print(escape(study.design.describe(study.factors)), soft_wrap=True)
    console.print(display.arms_table(made))
    _print_hint(made, console)
    missing, seeds_each = len(made.missing), len(study.config.seeds)
    console.print(
        f"{len(study.arms)} arms × {seeds_each} seed{'s' * (seeds_each != 1)} = {len(made.trials)} trials, "
        f"{len(made.trials) - missing} done, {missing} to run"
    )
    if missing:
        _print_cost(made, cpus, measure, console)
    return 0


def _print_cost(made: Plan, cpus: int | None, measure: bool, console: Console) -> None:
    """What the missing trials take, and how sure that is."""
    resources = made.study.config.resources
    slots = max(1, (cpus or usable_cores()) // (resources.cpus * resources.workers))
    with console.status("timing a few steps") if measure else nullcontext():
        found = timings.measure(made) if measure else timings.known(made)
    if found is None:
        console.print("not measured on this machine; --measure times a few steps, once", soft_wrap=True)
        return
    expected, low, high = map(display.duration, found.rest(made, slots))
    console.print(
        f"about {expected} with {slots} at a time (from the middle half of the steps: {low} to {high}): "
        f"{found.step:.3f} s a step, {found.fixed:.1f} s besides, measured here on {found.at} over {found.steps} "
        "steps; validations during training are not counted",
        soft_wrap=True,
    )


def _print_hint(made: Plan, console: Console) -> None:
    if hint := versions.hint(made):
        console.print(hint, soft_wrap=True)


def run(
    name: str,
    seeds: int | None,
    root: Path,
    ledgers: Sequence[Path] | None,
    address: str | None,
    cpus: int | None,
    mlflow: bool,
    uri: str | None,
) -> int:
    """``twinrl ablate run``."""
    console, made = Console(), _plan(name, seeds, root, ledgers)
    view = StudyView(made, uri) if mlflow else None
    failures: list[str] = []
    broken = ""
    with Runner(Machine(address, cpus), console) as runs, following(view) if view else nullcontext() as ended:
        try:
            made, failures = runs.run(made, ended)
        except (LostError, KeyboardInterrupt) as error:  # a second Ctrl-C
            made, broken = made.reread(), str(error) or "stopped at once"
    if view is not None and (problem := view.try_summaries()):
        console.print(f"MLflow is away ({escape(problem)}); the same command publishes what is missing")
    return _conclude(made, failures, name, console, broken)


def _conclude(made: Plan, failures: Sequence[str], name: str, console: Console, broken: str) -> int:
    """The table, what failed and how to go on; the exit code. ``broken``: what ended it without checkpoints."""
    console.print(display.arms_table(made))
    for line in failures:
        console.print(line, soft_wrap=True)
    again = f"{program()} ablate run {shlex.quote(name)}"
    if broken:
        console.print(f"{broken}; trials go on from their newest checkpoints, continue with: {again}", soft_wrap=True)
        return FAILED
    if runner.interrupted(made):
        console.print(f"interrupted; trials are checkpointed, continue with: {again}")
        return INTERRUPTED
    if made.missing:
        console.print(f"{len(made.missing)} trials left, continue with: {again}")
    return FAILED if failures else 0


def status(name: str, seeds: int | None, root: Path, ledgers: Sequence[Path] | None) -> int:
    """``twinrl ablate status``."""
    console, made = Console(), _plan(name, seeds, root, ledgers)
    console.print(display.arms_table(made))
    _print_hint(made, console)
    for trial in made.trials:
        if made.state(trial) == "failed":
            console.print(f"[red]failed[/] {escape(trial.title)}: {escape(made.records[trial.key].message)}")
    return 0


def report(
    name: str, seeds: int | None, root: Path, ledgers: Sequence[Path] | None, base: str | None, out: Path | None
) -> int:
    """``twinrl ablate report``."""
    from analysis.report import report as write

    console, made = Console(), _plan(name, seeds, root, ledgers)
    study = made.study
    version = versions.to_report(made)
    if version.missing == len(made.trials):
        raise InputError(f"study {study.name} has no finished trial", fix=f"{program()} ablate run {shlex.quote(name)}")
    page = write(
        root, out or made.workspace.study_folder(study) / "report", base=base, index=_index(made, version, base)
    )
    if version.note:
        console.print(escape(version.note), soft_wrap=True)
    if version.missing:
        console.print(f"{version.missing} of {len(made.trials)} trials are missing")
    console.print(f"report: {page}", soft_wrap=True)
    return 0


def _index(made: Plan, version: versions.Version, base: str | None) -> dict[str, object]:
    """What the analysis is told of a study: its question, its arms, the critical learning rates that are known."""
    study, arms = made.study, {trial.arm: trial for trial in made.trials}
    search = margins.Search(margins.fifo(study), made.workspace, lambda plan: (plan, []))
    return {
        "name": study.name,
        "question": study.config.question,
        "note": version.note,
        "metric": study.config.metric,
        "base": base,
        "seeds": list(study.config.seeds),
        "arms": [
            {
                "name": arm,
                "config_hash": trial.config_hash,
                "levels": dict(trial.levels),
                "steps": trial.settings.train.steps,
                "fingerprint": version.fingerprints[trial.config_hash],
            }
            for arm, trial in arms.items()
        ],
        "critical": [
            {"arm": found.arm, "seed": found.seed, "healthy": found.healthy, "diverged": found.diverged}
            for found in search.known()
        ],
    }


def margin(
    name: str, seeds: int | None, root: Path, ledgers: Sequence[Path] | None, address: str | None, cpus: int | None
) -> int:
    """``twinrl ablate margin``."""
    console, study, workspace = Console(), margins.fifo(studies.load(name, seeds)), _workspace(root, ledgers)
    try:
        with Runner(Machine(address, cpus), console) as runs:
            brackets, failures = margins.Search(study, workspace, runs.run).complete()
    except (LostError, KeyboardInterrupt) as error:
        console.print(f"{str(error) or 'stopped at once'}; the same command goes on from what is there", soft_wrap=True)
        return FAILED
    console.print(margins.margin_table(study, brackets))
    for line in failures:
        console.print(line, soft_wrap=True)
    return FAILED if failures else 0


def _plan(name: str, seeds: int | None, root: Path, ledgers: Sequence[Path] | None) -> Plan:
    study: Study = studies.load(name, seeds)
    return plans.make(study, _workspace(root, ledgers))


def _workspace(root: Path, ledgers: Sequence[Path] | None) -> Workspace:
    return Workspace(root, tuple(ledgers or ()))
