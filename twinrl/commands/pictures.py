"""The pictures of a run: sample grids at every validation, the same noise over training, curves."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from twinrl.assembly import inner_of
from twinrl.backends.families.family import FamilyNetwork
from twinrl.evaluation import PromptProtocol, Protocol
from twinrl.run import layout
from twinrl.runs import RunDirectory
from twinrl.sampling import few_step
from twinrl.tracking import names

AnyProtocol = Protocol | PromptProtocol


class Validator:
    """Judges the student under the fixed validation protocol and keeps a grid of each validation.

    Arguments:
        protocol: of the validation split.
        run: whose ``samples/`` gets the grids.
    """

    def __init__(self, protocol: AnyProtocol, run: RunDirectory):
        self.protocol, self.run = protocol, run

    def __call__(self, network: nn.Module, step: int) -> Mapping[str, float]:
        metrics = self.protocol.evaluate(in_single_precision(network))
        self.save_snapshot(network, step)
        return metrics

    def save_snapshot(self, network: nn.Module, step: int) -> None:
        """The one-step grid of ``step`` as a picture, and one sample of each class for the picture over training."""
        path = self.run.samples / f"{layout.of_step(step)}.png"
        images = save_grid(self.protocol, in_single_precision(network), 1, path, f"step {step:,}")
        save_file({"pixels": _as_bytes(images[:, 0])}, path.with_suffix(".safetensors"))


def in_single_precision(network: nn.Module) -> nn.Module:
    """The network if it takes float32, as the protocol's inputs are; else a copy that does.

    Families take any precision and compute in their own.
    """
    mixed = isinstance(inner_of(network), FamilyNetwork) or all(p.dtype == torch.float32 for p in network.parameters())
    return network if mixed else deepcopy(network).float()


def save_grid(protocol: AnyProtocol, network: nn.Module, nfe: int, path: Path, title: str) -> Tensor:
    """Write a grid of samples (a row for each class, the same noise in a column); returns its pixels."""
    from twinrl.evaluation.grids import sample_grid

    images = protocol.grid(network, few_step(nfe))
    sample_grid(images, protocol.grid_prompts(), title=f"{title}, {nfe} NFE").save(path)
    return images


def save_final(protocol: AnyProtocol, network: nn.Module, run: RunDirectory, folder: Path) -> Path:
    """The pictures of a judged network and its run, into ``folder``; returns the path of the grid at the first NFE."""
    evaluations = protocol.config.nfe
    paths = [folder / f"final-{nfe}nfe.png" for nfe in evaluations]
    for nfe, path in zip(evaluations, paths, strict=True):
        save_grid(protocol, network, nfe, path, run.path.name)
    save_diversity(protocol, network, evaluations[0], folder / "diversity.png")
    save_over_training(run, protocol.row_names, folder / "over-training.png")
    save_curves(run, protocol, folder / "curves.png")
    return paths[0]


def save_diversity(protocol: AnyProtocol, network: nn.Module, nfe: int, path: Path, n: int = 40) -> None:
    """One prompt, other noise: whether the student still varies."""
    from twinrl.evaluation.grids import diversity_grid

    prompt, images = protocol.diversity(network, few_step(nfe), n)
    diversity_grid(images, prompt, nfe=nfe).save(path)


def save_times(times: tuple[Tensor, Tensor], path: Path) -> None:
    """Where the formulation evaluates the student: t against r, coloured by sign (experimental)."""
    from twinrl.evaluation import figures

    figures.save(figures.time_scatter(*times), path)


def save_renoise(times: Mapping[float, Tensor], placement: Sequence[str], path: Path) -> None:
    """How the drawn renoise times move over the run."""
    from twinrl.evaluation import figures

    figures.save(figures.renoise_histograms(times, placement), path)


def save_over_training(run: RunDirectory, classes: tuple[str, ...], path: Path, most: int = 10) -> None:
    """One sample of each class at up to ``most`` validations, noise fixed."""
    from twinrl.evaluation.grids import training_grid

    files = sorted(run.samples.glob(f"{layout.STEP}*.safetensors"))
    if not files:
        return
    chosen = [
        files[round(i * (len(files) - 1) / max(1, min(most, len(files)) - 1))] for i in range(min(most, len(files)))
    ]
    snapshots = [load_file(file)["pixels"].float() / 127.5 - 1 for file in chosen]
    steps = [layout.step_of(file) for file in chosen]
    training_grid(snapshots, steps, list(classes)).save(path)


def save_curves(run: RunDirectory, protocol: AnyProtocol, path: Path) -> None:
    """Losses and quality against steps, the real-against-real floor dotted."""
    from twinrl.evaluation import figures
    from twinrl.tracking import runlog

    figure = figures.training_curves(runlog.read(run.log), floor=protocol.floor, title=run.path.name)
    figures.save(figure, path)


def save_norms(run: RunDirectory, path: Path) -> None:
    """Per-term gradient norms and shares with the run's events; nothing where no per-term gradients were taken."""
    from twinrl.evaluation import figures
    from twinrl.tracking import runlog

    rows = runlog.read(run.log)
    if not rows or names.grad("total", "norm_raw") not in rows[0]:
        return
    figures.save(figures.gradient_norms(rows, layout.read_events(run.path), title=run.path.name), path)


def _as_bytes(pixels: Tensor) -> Tensor:
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().contiguous()
