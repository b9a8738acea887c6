"""``twinrl sample`` and ``twinrl evaluate``: look at what a run has learnt."""

from pathlib import Path

from rich.console import Console

from twinrl.commands.progress import judging
from twinrl.machine import files
from twinrl.run import layout
from twinrl.training.opened import Judged, OpenedRun, open_run
from twinrl.training.pictures import check_picture, save_samples


def sample(
    path: Path, prompts: list[str], nfe: int, n: int, seed: int, out: Path, step: int | None, console: Console
) -> int:
    """Write a picture of ``n`` samples for each prompt; one prompt alone becomes a diversity grid."""
    opened = open_run(path, step)
    check_picture(out)
    save_samples(opened.sample(prompts, n, nfe, seed), path.name, nfe, out)
    console.print(f"samples: {out}")
    return 0


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
