"""diffusers' pipelines that begin with an image, with our scheduler: they end where the flow does."""

import inspect
import math

import diffusers
import pytest
import torch
from PIL import Image

from tests.backends.families.conftest import CALL, PROMPTS, length
from tests.rounding import assert_rounded
from twinrl.machine.compat import ensure_torchvision

ensure_torchvision()

from twinrl.sampling.scheduler import TwinFlowScheduler  # noqa: E402

TARGET = 0.3
CLASSES = {
    "sd3": "StableDiffusion3{}Pipeline",
    "flux": "Flux{}Pipeline",
    "qwen_image": "QwenImage{}Pipeline",
    "z_image": "ZImage{}Pipeline",
    "stable_diffusion": "StableDiffusion{}Pipeline",
}  # Sana has none in diffusers
SCHEDULES = {
    "few": {"style": "few"},
    "multi": {"style": "mul"},
    "order 2": {"style": "few", "order": 2},
}


class Towards(TwinFlowScheduler):
    """Answers for the network that every pixel of the data is TARGET; notes the times that it was asked for."""

    def step(self, model_output, timestep, sample, **more):
        index = self._current_index(timestep)
        assert float(timestep) == float(self.timesteps[index])
        self.asked = [*getattr(self, "asked", []), index]
        answer = (sample.double() - TARGET) / self.evaluations[index].time
        return super().step(answer.to(model_output.dtype), timestep, sample, **more)


def parts_of(case):
    """Of the tiny pipeline; SD3's inpainting takes 16 channels alone, as its models have."""
    parts = dict(case.pipeline.components)
    if case.name == "sd3":
        for name, channels in (("transformer", ("in_channels", "out_channels")), ("vae", ("latent_channels",))):
            config = dict(parts[name].config) | dict.fromkeys(channels, 16)
            parts[name] = type(parts[name]).from_config(config).eval()
    return parts


def run(case, kind, scheduler, **told):
    """Latents of the pipeline ``kind`` from a picture that is grey."""
    cls = getattr(diffusers, CLASSES[case.name].format(kind))
    pipeline = cls(**(parts_of(case) | {"scheduler": scheduler}))
    pipeline.set_progress_bar_config(disable=True)
    height, width = case.size
    settings = {
        "prompt": PROMPTS[0], "image": Image.new("RGB", (width, height), "grey"), "height": height, "width": width,
        "output_type": "latent", "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    settings |= length(case.family) | CALL[case.name] | told
    known = inspect.signature(cls.__call__).parameters
    return pipeline(**{name: value for name, value in settings.items() if name in known})[0]


@pytest.fixture(params=CLASSES)
def painter(request, cases):
    return cases(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "strength"), [(2, 0.5), (4, 0.3), (4, 0.5), (5, 0.6), (4, 1.0)])
def test_an_image_goes_on_to_the_data_from_every_strength(painter, schedule, steps, strength):
    scheduler = Towards(**SCHEDULES[schedule])
    latents = run(painter, "Img2Img", scheduler, num_inference_steps=steps, strength=strength)
    roundings = 100_000 if "order" in schedule else 100  # a correction divides by 1 − t, which is 0.001
    assert_rounded(latents, torch.full_like(latents, TARGET), roundings)
    assert scheduler.asked[-1] == len(scheduler.evaluations) - 1
    assert scheduler.asked == sorted(set(scheduler.asked))
    assert len(scheduler.asked) <= math.ceil(steps * strength)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_inpainting_changes_what_the_mask_shows(painter, schedule):
    width, height = painter.size[1], painter.size[0]
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    scheduler = Towards(**SCHEDULES[schedule])
    told = {"num_inference_steps": 4, "strength": 0.8, "mask_image": mask}
    latents = run(painter, "Inpaint", scheduler, **told)
    painted = float(((latents - TARGET).abs() < 1e-2).float().mean())
    assert 0.4 < painted < 0.7  # half, and what a mask's edge covers in part
