"""The pictures of a run: sample grids at every validation, the same noise over training, curves."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from twinrl.evaluation import EvaluationConfig, Protocol
from twinrl.runs import RunDirectory
from twinrl.sampling import few_step


class Validator:
    """Judges the student under the fixed validation protocol and keeps a grid of each validation.

    Arguments:
        protocol: of the validation split.
        run: whose ``samples/`` gets the grids.
    """

    def __init__(self, protocol: Protocol, run: RunDirectory):
        self.protocol, self.run = protocol, run

    def __call__(self, network: nn.Module, step: int) -> Mapping[str, float]:
        metrics = self.protocol.evaluate(network)
        images = save_grid(
            self.protocol, network, 1, self.run.samples / f"step-{step:08d}.png", f"step {step:,}"
        )
        torch.save(_as_bytes(images[:, 0]), self._snapshot(step))
        return metrics

    def _snapshot(self, step: int) -> Path:
        return self.run.samples / f"step-{step:08d}.pt"


def save_grid(protocol: Protocol, network: nn.Module, nfe: int, path: Path, title: str) -> Tensor:
    """Write a grid of samples (a row for each class, the same noise in a column); returns its pixels."""
    from twinrl.evaluation.grids import sample_grid

    images = protocol.grid(network, few_step(nfe))
    sample_grid(images, protocol.grid_prompts(), title=f"{title}, {nfe} NFE").save(path)
    return images


def save_final(protocol: Protocol, network: nn.Module, run: RunDirectory, settings: EvaluationConfig) -> Path:
    """The pictures of a finished run; returns the path of the one-step grid."""
    paths = [run.samples / f"final-{nfe}nfe.png" for nfe in settings.nfe]
    for nfe, path in zip(settings.nfe, paths, strict=True):
        save_grid(protocol, network, nfe, path, run.path.name)
    save_over_training(run, protocol.source.classes)
    save_curves(run, protocol)
    return paths[0]


def save_over_training(run: RunDirectory, classes: tuple[str, ...], most: int = 10) -> None:
    """``samples/over-training.png``: one sample of each class at up to ``most`` validations, noise fixed."""
    from twinrl.evaluation.grids import training_grid

    files = sorted(run.samples.glob("step-*.pt"))
    if not files:
        return
    chosen = [
        files[round(i * (len(files) - 1) / max(1, min(most, len(files)) - 1))]
        for i in range(min(most, len(files)))
    ]
    snapshots = [torch.load(file, weights_only=True).float() / 127.5 - 1 for file in chosen]
    steps = [int(file.stem.removeprefix("step-")) for file in chosen]
    training_grid(snapshots, steps, list(classes)).save(run.samples / "over-training.png")


def save_curves(run: RunDirectory, protocol: Protocol) -> None:
    """``samples/curves.png``: losses and quality against steps, the real-against-real floor dotted."""
    from twinrl.evaluation import figures
    from twinrl.tracking import runlog

    figure = figures.training_curves(runlog.read(run.log), floor=protocol.floor, title=run.path.name)
    figures.save(figure, run.samples / "curves.png")


def _as_bytes(pixels: Tensor) -> Tensor:
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
