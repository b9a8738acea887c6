"""What ``twinrl ablate``'s commands do, free of their parsing."""

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.markup import escape

from ablations import display, reporting, runner, versions
from ablations import margin as margins
from ablations import plan as plans
from ablations import study as studies
from ablations import timing as timings
from ablations.cluster import Machine, usable_cores
from ablations.course import Course
from ablations.plan import Plan, Workspace
from ablations.publish import StudyView, following
from ablations.reporting import Report
from ablations.runner import Runner
from ablations.study import Study
from twinrl.commands import program
from twinrl.config.errors import InputError
from twinrl.machine.background import in_background
from twinrl.machine.cluster import LostError
from twinrl.machine.consoles import Console
from twinrl.tracking import store
from twinrl.tracking.studies import WORKSPACE

FAILED, INTERRUPTED = 1, 130


def plan(
    name: str, seeds: int | None, root: Path, ledgers: Sequence[Path] | None, cpus: int | None, measure: bool
) -> int:
    """``twinrl ablate plan``."""
    console, made = Console(), planned(name, seeds, root, ledgers)
    study = made.study
    if study.config.question:
        console.print(f"[italic]{escape(study.config.question)}[/]")
    console.print(escape(study.design.describe(study.factors)), soft_wrap=True)
    console.print(display.arms_table(made))
    _print_hint(made, console)
    _print_blind(study, console)
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
    room = max(1, (cpus or usable_cores()) // (resources.cpus * resources.workers))
    slots = min(room, len(made.trials))  # no more are timed side by side than will ever run so
    with console.status("timing a few steps") if measure else nullcontext():
        found = timings.measure(made, slots) if measure else timings.known(made, slots)
    if found is None:
        console.print("not measured on this machine; --measure times a few steps, once", soft_wrap=True)
        return
    expected, low, high = map(display.duration, found.rest(made, slots))
    console.print(
        f"about {expected} with {slots} at a time (from the middle half of the steps: {low} to {high}): "
        f"{found.step:.3f} s a step, {found.validation:.1f} s a validation, {found.fixed:.1f} s besides, measured here "
        f"on {found.at} over {found.steps} steps",
        soft_wrap=True,
    )


def _print_hint(made: Plan, console: Console) -> None:
    if hint := versions.hint(made):
        console.print(hint, soft_wrap=True)


def _print_blind(study: Study, console: Console) -> None:
    if blind := study.unwatched:
        console.print(f"[yellow]a fall cannot be seen[/] in {escape(blind)}", soft_wrap=True)


def run(
    name: str,
    seeds: int | None,
    root: Path,
    ledgers: Sequence[Path] | None,
    address: str | None,
    cpus: int | None,
    mlflow: bool,
    uri: str | None,
    report: bool,
) -> int:
    """``twinrl ablate run``."""
    console, study, workspace = Console(), studies.load(name, seeds), _workspace(root, ledgers)
    _print_blind(study, console)
    with Course(study, console) as course:
        with course.data(workspace.study_folder(study)):
            made = plans.make(study, workspace)
        course.planned(made)
        reporting.write_index(made)
        view = StudyView(made, uri) if mlflow else None
        machine, notes = Machine(address, cpus), list[str]()
        if report and made.missing:
            in_background(reporting.prepare)
        made, failures, broken = _train(made, Runner(machine, console, course.trials), view)
        if view is not None and (problem := _published(view, course)):
            notes.append(f"MLflow is away ({escape(problem)}); the same command publishes what is missing")
        whole = not broken and not runner.interrupted(made)
        written = _written(made, name, course, notes) if report and whole else None
    if written is None:
        notes += _indexed(made)
    code = _conclude(made, failures, name, console, broken, notes)
    if written is not None:
        _say(written, console)
    if view is not None and whole:
        console.print(f"curves: {program()} ui {_where(made, uri)}", soft_wrap=True)
    return code or (FAILED if report and whole and written is None else 0)


def _train(made: Plan, runs: Runner, view: StudyView | None) -> tuple[Plan, list[str], str]:
    """Run what is missing: the plan after that, a line for each failure, and what ended it without checkpoints."""
    with runs, following(view) if view else nullcontext() as ended:
        try:
            return *runs.run(made, ended), ""
        except (LostError, KeyboardInterrupt) as error:  # a second Ctrl-C
            return made.reread(), [], str(error) or "stopped at once"


def _published(view: StudyView, course: Course) -> str | None:
    course.closing("publishing to MLflow")
    return view.try_summaries()


def _written(made: Plan, name: str, course: Course, notes: list[str]) -> Report | None:
    """The report; None where there can't be one, and ``notes`` says why: trials that have run are not in vain."""
    course.closing("writing the report", 0.5)
    try:
        return reporting.write(made, again(name))
    except InputError as error:
        notes.append(f"no report: {escape(str(error))}")
        return None


def _say(written: Report, console: Console) -> None:
    """The study's answer, and where to look."""
    if written.version.note:
        console.print(escape(written.version.note), soft_wrap=True)
    console.print(f"[bold]{escape(written.answer)}[/]", soft_wrap=True)
    console.print(f"report: {escape(str(written.page))}", soft_wrap=True)
    if written.picture is not None:
        console.print(f"picture: {escape(str(written.picture))}", soft_wrap=True)


def _where(made: Plan, uri: str | None) -> str:
    """The words after ``twinrl ui`` that open the study's pages."""
    workspace, name = made.workspace, made.study.name
    subject = name if workspace.root == WORKSPACE else str(workspace.study_folder(made.study))
    store_of = [] if uri is None else ["--tracking-uri", store.shown(uri)]
    return shlex.join([subject, *store_of])


def again(name: str) -> str:
    """The command that runs a study."""
    return f"{program()} ablate run {shlex.quote(name)}"


def _conclude(
    made: Plan, failures: Sequence[str], name: str, console: Console, broken: str, notes: Sequence[str] = ()
) -> int:
    """The table, what failed and how to go on; the exit code. ``broken``: what ended it without checkpoints."""
    console.print(display.arms_table(made))
    for line in (*notes, *failures):
        console.print(line, soft_wrap=True)
    command = again(name)
    if broken:
        console.print(f"{broken}; trials go on from their newest checkpoints, continue with: {command}", soft_wrap=True)
        return FAILED
    if runner.interrupted(made):
        console.print(f"interrupted; trials are checkpointed, continue with: {command}")
        return INTERRUPTED
    if made.missing:
        console.print(f"{len(made.missing)} trials left, continue with: {command}")
    return FAILED if failures else 0


def _indexed(made: Plan) -> list[str]:
    """Write the study's index; a line where that cannot be: trials that have run are not in vain."""
    try:
        reporting.write_index(made)
        return []
    except InputError as error:
        return [escape(str(error))]


def status(name: str, seeds: int | None, root: Path, ledgers: Sequence[Path] | None) -> int:
    """``twinrl ablate status``."""
    console, made = Console(), planned(name, seeds, root, ledgers)
    console.print(display.arms_table(made))
    _print_hint(made, console)
    for trial in made.trials:
        if made.state(trial) == "failed":
            console.print(f"[red]failed[/] {escape(trial.title)}: {escape(made.records[trial.key].message)}")
    return 0


def report(
    name: str, seeds: int | None, root: Path, ledgers: Sequence[Path] | None, base: str | None, out: Path | None,
    interactions: Sequence[str] = (),
) -> int:  # fmt: skip
    """``twinrl ablate report``."""
    from analysis.report import separated

    pairs = [separated(text, ":") for text in interactions]
    console, made = Console(), planned(name, seeds, root, ledgers)
    written = reporting.write(made, again(name), base, out, pairs)
    if written.version.missing:
        console.print(f"{written.version.missing} of {len(made.trials)} trials are missing")
    _say(written, console)
    return 0


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


def planned(name: str, seeds: int | None, root: Path, ledgers: Sequence[Path] | None) -> Plan:
    """The study's trials, and what of them is done. Raises InputError."""
    return plans.make(studies.load(name, seeds), _workspace(root, ledgers))


def _workspace(root: Path, ledgers: Sequence[Path] | None) -> Workspace:
    return Workspace(root, tuple(ledgers or ()))
