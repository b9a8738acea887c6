"""The pictures of a run: sample grids at every validation, the same noise over training, curves."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from twinrl.config.errors import InputError
from twinrl.machine import files, tensors
from twinrl.run import layout, names
from twinrl.sampling import few_step
from twinrl.training.provider import FixedProtocol, Provider
from twinrl.training.runs import RunDirectory

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


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


def save_grid(protocol: FixedProtocol, network: nn.Module, nfe: int, path: Path, title: str) -> Tensor:
    """Write a grid of samples (a row for each class, the same noise in a column); returns its pixels."""
    from twinrl.evaluation.grids import sample_grid

    images = protocol.grid(network, few_step(nfe))
    _write(sample_grid(images, protocol.grid_prompts(), title=f"{title}, {nfe} NFE"), path)
    return images


def save_final(protocol: FixedProtocol, network: nn.Module, run: RunDirectory, folder: Path) -> Path:
    """The pictures of a judged network and its run, into ``folder``; returns the path of the grid at the first NFE."""
    evaluations = protocol.config.nfe
    paths = [folder / f"final-{nfe}nfe.png" for nfe in evaluations]
    for nfe, path in zip(evaluations, paths, strict=True):
        save_grid(protocol, network, nfe, path, run.path.name)
    save_diversity(protocol, network, evaluations[0], folder / "diversity.png")
    save_over_training(run, protocol.row_names, folder / "over-training.png")
    save_curves(run, protocol, folder / "curves.png")
    return paths[0]


def save_diversity(protocol: FixedProtocol, network: nn.Module, nfe: int, path: Path, n: int = 40) -> None:
    """One prompt, other noise: whether the student still varies."""
    from twinrl.evaluation.grids import diversity_grid

    prompt, images = protocol.diversity(network, few_step(nfe), n)
    _write(diversity_grid(images, prompt, nfe=nfe), path)


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
    from twinrl.evaluation.grids import diversity_grid, sample_grid

    prompts, images = zip(*samples, strict=True)
    if len(samples) == 1:
        picture = diversity_grid(images[0], prompts[0], nfe=nfe)
    else:
        picture = sample_grid(torch.stack(images), prompts, title=f"{name}, {nfe} NFE")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(picture, path)
    except (OSError, ValueError) as error:  # ValueError: no picture format has this suffix
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be written", got=why, fix="name a .png file in a writable folder") from error


def save_times(times: tuple[Tensor, Tensor], path: Path) -> None:
    """Where the formulation evaluates the student: t against r, coloured by sign (experimental)."""
    from twinrl.evaluation import figures

    figures.save(figures.time_scatter(*times), path)


def save_renoise(times: Mapping[float, Tensor], placement: Sequence[str], path: Path) -> None:
    """How the drawn renoise times move over the run."""
    from twinrl.evaluation import figures

    figures.save(figures.renoise_histograms(times, placement), path)


def save_over_training(run: RunDirectory, classes: tuple[str, ...], path: Path, most: int = 10) -> None:
    """One sample of each class at up to ``most`` validations, noise fixed; damaged ones are left out with a warning."""
    from twinrl.evaluation.grids import training_grid

    saved = sorted(run.samples.glob(f"{layout.STEP}*.safetensors"))
    last = max(1, min(most, len(saved)) - 1)
    chosen = [saved[round(i * (len(saved) - 1) / last)] for i in range(min(most, len(saved)))]
    found = {file: pixels for file in chosen if (pixels := _snapshot(file, len(classes))) is not None}
    for file in chosen:
        if file not in found:
            logger.warning("%s is damaged; %s goes without it", file, path.name)
    if found:
        snapshots = [pixels.float() / 127.5 - 1 for pixels in found.values()]
        _write(training_grid(snapshots, [layout.step_of(file) for file in found], list(classes)), path)


def _snapshot(file: Path, rows: int) -> Tensor | None:
    """The samples of a validation, bytes (rows, C, H, W); None where the file is damaged."""
    try:
        pixels = tensors.load(file)["pixels"] if file.is_file() else torch.zeros(0)
    except (OSError, SafetensorError, KeyError):
        return None
    return pixels if pixels.dtype == torch.uint8 and pixels.ndim == 4 and len(pixels) == rows else None


def save_curves(run: RunDirectory, protocol: FixedProtocol, path: Path) -> None:
    """Losses and quality against steps, the real-against-real floor dotted."""
    from twinrl.evaluation import figures

    figure = figures.training_curves(layout.read_rows(run.path), floor=protocol.floor, title=run.path.name)
    figures.save(figure, path)


def save_norms(run: RunDirectory, path: Path) -> None:
    """Per-term gradient norms and shares with the run's events; nothing where no per-term gradients were taken."""
    from twinrl.evaluation import figures

    rows = layout.read_rows(run.path)
    if not rows or names.grad("total", "norm_raw") not in rows[0]:
        return
    figures.save(figures.gradient_norms(rows, layout.read_events(run.path), title=run.path.name), path)


def _write(picture: "Image", path: Path) -> None:
    with files.publishing(path) as new:
        picture.save(new)


def _as_bytes(pixels: Tensor) -> Tensor:
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().contiguous()
