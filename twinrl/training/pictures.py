"""The pictures of a run: sample grids at every validation, its course, and what is drawn of a judged network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twinrl.config.errors import InputError
from twinrl.evaluation import figures, grids
from twinrl.machine import files, tensors
from twinrl.run import layout
from twinrl.sampling import few_step
from twinrl.training.provider import FixedProtocol, Provider
from twinrl.training.runs import RunDirectory

DIVERSE = 40
"""Samples in the picture of one prompt."""


class Validator:
    """Judges the student under the fixed validation protocol and keeps a grid of each validation.

    Arguments:
        provider: of data and models.
        run: whose ``samples/`` gets the grids.
    """

    def __init__(self, provider: Provider[Any], run: RunDirectory):
        self.protocol, self.judged, self.run = provider.protocol("validation"), provider.judged, run

    def __call__(self, network: nn.Module, step: int) -> Mapping[str, float]:
        metrics = self.protocol.evaluate(self.judged(network))
        self.save_snapshot(network, step)
        return metrics

    def save_snapshot(self, network: nn.Module, step: int) -> None:
        """The one-step grid of ``step`` as a picture, and one sample of each class for the picture over training."""
        path = self.run.samples / f"{layout.of_step(step)}.png"
        images = save_grid(self.protocol, self.judged(network), 1, path, f"step {step:,}")
        with files.publishing(path.with_suffix(".safetensors")) as new:
            tensors.write(new, {"pixels": _as_bytes(images[:, 0])})

    def save_course(self, rows: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> None:
        """How training went, however it ended: the same noise over training, curves of the log, gradient norms."""
        folder, title = self.run.samples, self.run.path.name
        grids.save_over_training(folder, self.protocol.row_names, folder / "over-training.png")
        figures.save_curves(rows, self.protocol.floor, title, folder / "curves.png")
        figures.save_norms(rows, events, title, folder / "norms.png")


def save_grid(protocol: FixedProtocol, network: nn.Module, nfe: int, path: Path, title: str) -> Tensor:
    """Write a grid of samples (a row for each class, the same noise in a column); returns its pixels."""
    images = protocol.grid(network, few_step(nfe))
    grids.save(grids.sample_grid(images, protocol.grid_prompts(), title=f"{title}, {nfe} NFE"), path)
    return images


def save_final(protocol: FixedProtocol, network: nn.Module, title: str, folder: Path) -> Path:
    """The pictures of a judged network, into ``folder``; returns the path of the grid at the first NFE.

    Grids, and one prompt under other noise (whether the student still varies).
    """
    evaluations = protocol.config.nfe
    paths = [folder / f"final-{nfe}nfe.png" for nfe in evaluations]
    for nfe, path in zip(evaluations, paths, strict=True):
        save_grid(protocol, network, nfe, path, title)
    prompt, images = protocol.diversity(network, few_step(evaluations[0]), DIVERSE)
    grids.save(grids.diversity_grid(images, prompt, nfe=evaluations[0]), folder / "diversity.png")
    return paths[0]


def check_picture(path: Path) -> None:
    """Before anything is drawn: raises InputError where a picture cannot be written to ``path``."""
    from PIL import Image

    fix = "name a .png file in a writable folder"
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise InputError(f"{path} cannot be written", got=f"unknown suffix {path.suffix!r}", fix=fix)
    files.check_writable(path.parent, str(path), fix)
    try:
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise InputError(f"{path} cannot be written", got=error.strerror, fix=fix) from error


def save_samples(samples: Sequence[tuple[str, Tensor]], name: str, nfe: int, path: Path) -> None:
    """Samples by prompt as a grid, of one prompt alone as a diversity grid.

    Arguments:
        samples: prompts, each with (n, C, H, W) pixels.
        name: of the run. nfe: network evaluations behind each sample.

    Raises:
        InputError: ``path`` cannot be written.
    """
    prompts, images = zip(*samples, strict=True)
    if len(samples) == 1:
        picture = grids.diversity_grid(images[0], prompts[0], nfe=nfe)
    else:
        picture = grids.sample_grid(torch.stack(images), prompts, title=f"{name}, {nfe} NFE")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        grids.save(picture, path)
    except (OSError, ValueError) as error:  # ValueError: no picture format has this suffix
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be written", got=why, fix="name a .png file in a writable folder") from error


def _as_bytes(pixels: Tensor) -> Tensor:
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().contiguous()
