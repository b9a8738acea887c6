"""``twinrl sample``, ``sampler`` and ``evaluate``: look at what a run has learnt."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from twinrl.commands import program
from twinrl.commands.progress import judging
from twinrl.config.errors import InputError
from twinrl.evaluation import best
from twinrl.evaluation.best import Best
from twinrl.machine import files
from twinrl.run import layout
from twinrl.sampling import SamplerConfig, few_step
from twinrl.training.opened import Judged, OpenedRun, open_run
from twinrl.training.pictures import check_picture, save_samples


def sample(
    path: Path, prompts: list[str], nfe: int, n: int, seed: int, out: Path, step: int | None, searched: bool,
    console: Console,
) -> int:  # fmt: skip
    """Write a picture of ``n`` samples for each prompt; one prompt alone becomes a diversity grid."""
    opened = open_run(path, step)
    check_picture(out)
    sampler = opened.sampler(nfe) if searched else few_step(nfe)
    save_samples(opened.sample(prompts, n, sampler, seed), path.name, nfe, out)
    console.print(f"samples: {out}")
    return 0


def sampler(path: Path, evaluations: list[int], step: int | None, console: Console) -> int:
    """Search the sampler that suits a run at each number of evaluations, and print it beside the usual one."""
    opened = open_run(path, step)
    wanted = sorted(set(evaluations or [nfe for nfe in opened.settings.evaluation.nfe if nfe > 1]))
    if not wanted or wanted[0] < 2:
        raise InputError("one evaluation is one jump, which leaves nothing to choose", fix="give --nfe 2 or more")
    files.check_writable(opened.folder, str(opened.folder), "mend its rights, or search in a copy of the run")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("draws of samples judged", total=best.judged_in(len(wanted)))
        found = opened.best(wanted, lambda: progress.advance(task))
    console.print(compared(found))
    if any(each.better for each in found):
        console.print(f"sample with: {program()} sample {path} --best --nfe {next(e.nfe for e in found if e.better)}")
    return 0


def compared(found: Sequence[Best]) -> Table:
    """The samplers beside the usual ones."""
    table = Table(title="Quality of samples on fresh noise (smaller is better)", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("NFE", "usual", "found", "difference", "", "settings found"):
        table.add_column(heading, justify="left" if heading.startswith("settings") else "right")
    for each in found:
        gap = each.difference
        values = (f"{each.usual:.4g}", f"{each.found:.4g}", f"{gap.value:.3g} [{gap.low:.3g}, {gap.high:.3g}]")
        verdict = "better" if each.better else "no better: the usual one stays"
        table.add_row(str(each.nfe), *values, verdict, _settings(each.sampler))
    return table


def _settings(sampler: SamplerConfig) -> str:
    """What differs from the default settings."""
    changed = sampler.model_dump(exclude_defaults=True, exclude={"steps"})
    return ", ".join(f"{name}={_short(value)}" for name, value in changed.items())


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def evaluate(path: Path, step: int | None, console: Console) -> int:
    """Print the final table of a run and write it with its pictures to ``evaluation/`` (``/step-N/`` if asked)."""
    console.print(*judge(open_run(path, step), console).rich())
    return 0


def judge(opened: OpenedRun, console: Console) -> Judged:
    """Judge the run's samples and write table and pictures to its folder.

    Raises:
        InputError: the run has no checkpoint or no such data, or cannot be written.
    """
    files.check_writable(opened.folder, str(opened.folder), "mend its rights, or evaluate a copy of the run")
    with judging(console):
        judged = opened.judge()
    judged.table.write(opened.folder / layout.TABLE)
    return judged
