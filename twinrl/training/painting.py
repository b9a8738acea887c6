"""What draws a prompt: a run's student, or any diffusers pipeline, from noise that is keyed by (prompt, seed)."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twinrl.config.errors import InputError
from twinrl.flow import draws
from twinrl.sampling import SamplerConfig, sample
from twinrl.training.opened import OpenedRun

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PURPOSE = "prompt set"


@dataclass(frozen=True)
class RunPainter:
    """A run's judged network.

    Attributes:
        run: opened. sampler: how it is sampled.
    """

    run: OpenedRun
    sampler: SamplerConfig

    def __call__(self, prompt: str, seed: int) -> Tensor:
        """(C, H, W) pixels in [−1, 1]."""
        source, device = self.run.provider.source, self.run.provider.device
        noise = draws.normal((1, *source.latent_shape), seed, f"{PURPOSE}: {prompt}").to(device)
        with torch.no_grad():
            z = sample(self.run.network, noise, source.condition([prompt]), self.sampler, seed=seed)
            pixels: Tensor = source.decode(z)[0]
        return pixels


@dataclass
class PipelinePainter:
    """A diffusers pipeline with a prompt.

    Attributes:
        path: folder or hub name.
        steps: network evaluations.
        guidance: classifier-free guidance; None = the pipeline's own.
        device: where it runs.
    """

    path: str
    steps: int
    guidance: float | None
    device: torch.device

    @cached_property
    def pipeline(self) -> "DiffusionPipeline":
        """Raises InputError where it cannot be loaded."""
        from twinrl.backends.families import pipelines
        from twinrl.sampling import scheduler  # noqa: F401 (exported pipelines name it)

        folder = pipelines.resolve(self.path)
        name = pipelines.read_index(folder)["_class_name"]
        with pipelines.quiet():
            loaded: Any = pipelines.load_pipeline(folder, name, torch.float32, part=None)
        loaded.set_progress_bar_config(disable=True)
        return loaded.to(self.device)

    def __call__(self, prompt: str, seed: int) -> Tensor:
        """(C, H, W) pixels in [−1, 1]."""
        generator = draws.generator(seed, f"{PURPOSE}: {prompt}")
        given = {} if self.guidance is None else {"guidance_scale": self.guidance}
        pipeline: Any = self.pipeline
        with torch.no_grad():
            try:
                made = pipeline(
                    prompt=prompt, num_inference_steps=self.steps, generator=generator, output_type="pt", **given
                )
            except TypeError as error:
                raise InputError(
                    f"{self.path} takes no prompt as text-to-image pipelines do", got=str(error)
                ) from error
        pixels: Tensor = made.images[0].float().cpu() * 2 - 1
        return pixels
