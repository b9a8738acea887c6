"""``twinrl sample`` and ``twinrl evaluate``: look at what a run has learnt."""

from pathlib import Path

from rich.console import Console

from twinrl.commands.interactive import Run
from twinrl.training.opened import open_run
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
    console.print(*Run(path, step).evaluate(console).rich())
    return 0
