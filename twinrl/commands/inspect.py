"""``twinrl sample`` and ``twinrl evaluate``: look at what a run has learnt."""

from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from twinrl import assembly, checkpoints, conditions, draws
from twinrl.commands.train import judge
from twinrl.data.source import Data
from twinrl.errors import InputError
from twinrl.evaluation.grids import diversity_grid, sample_grid
from twinrl.run import layout
from twinrl.runs import RunDirectory, check_content
from twinrl.sampling import few_step
from twinrl.sampling import sample as draw
from twinrl.schema import RunConfig


def load(
    path: Path, step: int | None = None, device: torch.device | None = None
) -> tuple[RunConfig, RunDirectory, Data, nn.Module]:
    """A run's configuration, directory, source and judged network (the EMA where there is one), in eval mode.

    ``step`` chooses a checkpoint instead of the newest, ``device`` another than the configured one.

    Raises:
        InputError: no run, no checkpoint (of that step), or a corrupted one.
    """
    run = RunDirectory(path)
    settings = run.settings()
    folder = checkpoint_of(run, step)
    checkpoint = checkpoints.load(folder)
    device = device or assembly.device_of(settings)
    source = assembly.load_source(settings, device)
    check_content(source.content_hash, checkpoint.state, settings.data.source)
    network = assembly.new_network(settings, source)
    checkpoints.load_module(network, checkpoint.judged, str(folder))
    return settings, run, source, network.to(device).eval()


def checkpoint_of(run: RunDirectory, step: int | None) -> Path:
    """The folder of a run's checkpoint, the newest if ``step`` is None. Raises InputError where there is none."""
    if step is None:
        return run.newest_checkpoint()
    folder = run.checkpoints / layout.of_step(step)
    if folder not in (found := layout.available(run.checkpoints)):
        steps = ", ".join(str(layout.step_of(path)) for path in found)
        raise InputError(f"{run.path} has no checkpoint of step {step}", expected=f"one of {steps}" if steps else None)
    return folder


def sample(
    path: Path, prompts: list[str], nfe: int, n: int, seed: int, out: Path, step: int | None, console: Console
) -> int:
    """Write a picture of ``n`` samples for each prompt; one prompt alone becomes a diversity grid."""
    settings, _, source, network = load(path, step)
    device = next(network.parameters()).device
    noise = draws.normal((n, *source.latent_shape), seed, "sample").to(device)
    rows = []
    for prompt in prompts or assembly.example_prompts(settings, source, seed):
        c = conditions.rows(source.condition([prompt]), torch.zeros(n, dtype=torch.long))
        with torch.no_grad():
            z = draw(network, noise, c, few_step(nfe), seed=seed)
            rows.append((prompt, torch.cat([source.decode(each[None]) for each in z])))
    if len(rows) == 1:
        picture = diversity_grid(rows[0][1], rows[0][0], nfe=nfe)
    else:
        picture = sample_grid(torch.stack([r for _, r in rows]), [p for p, _ in rows], title=f"{path.name}, {nfe} NFE")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(out)
    except (OSError, ValueError) as error:  # ValueError: no picture format has this suffix
        raise InputError(f"{out} cannot be written", got=error, fix="name a .png file in a writable folder") from error
    console.print(f"samples: {out}")
    return 0


def evaluate(path: Path, step: int | None, console: Console) -> int:
    """Print the final table of a run and write it with its pictures to ``evaluation/`` (``/step-N/`` if asked)."""
    settings, run, source, network = load(path, step)
    folder = run.path / layout.EVALUATION / ("" if step is None else layout.of_step(step))
    folder.mkdir(parents=True, exist_ok=True)
    table, grid = judge(settings, source, network, run, console, folder)
    table.write(folder / layout.TABLE)
    console.print(*table.rich())
    console.print(f"samples: {grid}")
    return 0
