"""A run that is opened to look at it: one object for samples, the final table, export and timings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from twinrl.config.errors import InputError
from twinrl.evaluation import best
from twinrl.evaluation.best import Best
from twinrl.flow import conditions, draws
from twinrl.machine.dtypes import MASTER_DTYPES
from twinrl.run import checkpoints, fit, layout
from twinrl.sampling import SamplerConfig, few_step, sample
from twinrl.sampling.timing import TimingLine, measure
from twinrl.training import assembly, pictures
from twinrl.training.provider import FixedProtocol, Provider, ResultTable
from twinrl.training.runs import RunDirectory, check_content
from twinrl.training.schema import RunConfig

if TYPE_CHECKING:
    from rich.console import RenderableType


class Judged(NamedTuple):
    """A run's final table, and the file with the grid of its samples at the first NFE."""

    table: ResultTable
    grid: Path

    def rich(self) -> "list[RenderableType]":
        """For the terminal."""
        return [*self.table.rich(), f"samples: {self.grid}"]


@dataclass
class OpenedRun:
    """A run's configuration, data, models and judged network (the EMA where there is one), in eval mode.

    Made by :func:`open_run` from a run directory, whose checkpoint and data are read when they are first needed, or by
    :meth:`trained` from what is in memory at the end of training.

    Attributes:
        directory: of the run.
        settings: its configuration.
        folder: where pictures of :meth:`judge` go.
        step: of the checkpoint; None = the newest.
        device: None = the configured one.
    """

    directory: RunDirectory
    settings: RunConfig
    folder: Path
    step: int | None = None
    device: torch.device | None = None

    @classmethod
    def trained(cls, directory: RunDirectory, provider: Provider[Any], network: nn.Module, folder: Path) -> "OpenedRun":
        """The run that has just been trained by ``provider`` to ``network``."""
        opened = cls(directory, provider.settings, folder)
        opened.provider, opened.network = provider, network
        return opened

    @cached_property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint.

        Raises:
            InputError: there is none (of that step), or it is another step's.
        """
        folder = self.directory.newest_checkpoint() if self.step is None else self._of_step(self.step)
        checkpoints.check_place(folder, checkpoints.load_state(folder), self.settings.train.steps)
        return folder

    def _of_step(self, step: int) -> Path:
        folder = self.directory.checkpoints / layout.of_step(step)
        if folder not in (found := layout.available(self.directory.checkpoints)):
            steps = ", ".join(str(layout.step_of(path)) for path in found)
            raise InputError(
                f"{self.directory.path} has no checkpoint of step {step}",
                expected=f"one of {steps}" if steps else None,
            )
        return folder

    @cached_property
    def provider(self) -> Provider[Any]:
        """Data and models.

        Raises:
            InputError: they cannot be loaded, or are others than those of training.
        """
        state = checkpoints.load_state(self.checkpoint)
        provider = assembly.load_provider(self.settings, self.device)
        check_content(provider.source.content_hash, state, self.settings.data.source)
        return provider

    @cached_property
    def network(self) -> nn.Module:
        """The judged network. Raises InputError where the checkpoint is corrupted."""
        network, checkpoint = self.provider.network(), checkpoints.load(self.checkpoint)
        formats = dict.fromkeys(network.state_dict(), MASTER_DTYPES[self.settings.train.precision])
        fit.load_module(network, checkpoint.judged, str(self.checkpoint), formats=formats)
        checkpoints.check_finite(network.parameters(), checkpoint.state, self.checkpoint)
        return network.to(self.provider.device).eval()

    def sample(self, prompts: Sequence[str], n: int, sampler: SamplerConfig, seed: int) -> list[tuple[str, Tensor]]:
        """Each prompt (by default some examples) with (n, C, H, W) pixels of its samples, all from the same noise."""
        source, device = self.provider.source, self.provider.device
        noise, rows = draws.normal((n, *source.latent_shape), seed, "sample").to(device), []
        for prompt in prompts or self.provider.example_prompts(seed):
            c = conditions.rows(source.condition([prompt]), torch.zeros(n, dtype=torch.long))
            with torch.no_grad():
                z = sample(self.network, noise, c, sampler, seed=seed)
                rows.append((prompt, torch.cat([source.decode(each[None]) for each in z])))
        return rows

    def judge(self) -> Judged:
        """The final table; pictures go to :attr:`folder`."""
        network = self.provider.judged(self.network)
        self.folder.mkdir(parents=True, exist_ok=True)
        protocol, table = self.provider.final(network)
        return Judged(table, pictures.save_final(protocol, network, self.directory.path.name, self.folder))

    def best(self, evaluations: Sequence[int], tick: Callable[[], None] = lambda: None) -> list[Best]:
        """The sampler that suits the judged network at each number of evaluations; kept for :meth:`sampler`.

        It is searched on validation images and compared on test images, where there are two such splits.

        Arguments:
            evaluations: of a sample; 2 or more, as one jump leaves nothing to choose.
            tick: called after each draw of noise that was judged, :func:`twinrl.evaluation.best.judged_in` times.

        Raises:
            InputError: samples under the usual settings are not finite.
        """
        network, found = self.provider.judged(self.network), []

        def score(protocol: FixedProtocol, sampler: SamplerConfig, draw: int) -> float:
            quality = protocol.draw_quality(network, sampler, draw)
            tick()
            return quality

        searched, compared = (partial(score, self.provider.protocol(split)) for split in ("validation", "test"))
        for nfe in evaluations:
            found.append(best.compared(compared, nfe, best.search(searched, nfe)))
        best.write(self.folder / layout.SAMPLERS, best.Searched(self.at, found))
        return found

    def sampler(self, nfe: int) -> SamplerConfig:
        """The sampler that was found for ``nfe`` evaluations, or the usual one where that is no worse.

        Raises:
            InputError: none was searched at this checkpoint, or the file is damaged.
        """
        search = f"twinrl sampler {self.directory.path} --nfe {nfe}"
        kept = best.read(self.folder / layout.SAMPLERS, search) if nfe > 1 else None
        mine = [each for each in kept.found if each.nfe == nfe] if kept is not None and kept.step == self.at else []
        if nfe > 1 and not mine:
            raise InputError(f"no sampler was searched for {nfe} evaluations at step {self.at}", fix=search)
        return mine[0].sampler if mine and mine[0].better else few_step(nfe)

    @property
    def at(self) -> int:
        """The step of the checkpoint."""
        return layout.step_of(self.checkpoint)

    def timings(self, rounds: int) -> list[TimingLine]:
        """What a sample costs, at every NFE of ``evaluation.nfe`` and by a many-step teacher."""
        config, prompts = self.settings.evaluation, self.provider.example_prompts(0)
        return measure(self.network, self.provider.source, prompts, config.nfe, config.teacher_steps, rounds)

    def export(self, folder: Path, lora: bool = False, dtype: Literal["float32", "bf16"] | None = None) -> str:
        """The student as a diffusers pipeline, see :meth:`Provider.export`; needs no data, which may be gone."""
        return assembly.kind_of(self.settings).export(self.settings, self.checkpoint, folder, lora, dtype)


def open_run(path: Path, step: int | None = None, device: torch.device | None = None) -> OpenedRun:
    """The run in the directory ``path``.

    Arguments:
        path: of the run.
        step: of a checkpoint instead of the newest.
        device: another than the configured one.

    Raises:
        InputError: no run.
    """
    directory, folder = RunDirectory(path), path / layout.EVALUATION
    folder = folder if step is None else folder / layout.of_step(step)
    return OpenedRun(directory, directory.settings(), folder, step, device)
