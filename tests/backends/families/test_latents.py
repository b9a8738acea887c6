"""The space of the flow: the VAE's normalisation as the family's pipeline has it."""

import pytest
import torch

from tests.backends.families import tiny
from tests.backends.families.held import from_pipeline
from tests.rounding import assert_rounded
from twinrl.config.errors import InputError


def pixels(case, seed=0):
    return torch.rand(2, 3, *case.size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def test_decoding_equals_the_pipelines(case):
    """Its image of one Euler step, against ours of its own latents."""
    z, pipeline = case.noise(), case.pipeline
    pipeline.scheduler = tiny.ddim() if case.name == "stable_diffusion" else tiny.euler()
    images, latents = (case.call(pipeline, z, num_inference_steps=1, output_type=kind) for kind in ("pt", "latent"))
    ours = case.family.decode(from_pipeline(case.family, latents, case.shape))
    assert_rounded((ours / 2 + 0.5).clamp(0, 1), images, 1000)  # ten layers of 9 × 8 products


@torch.no_grad()
def test_encoding_undoes_decodings_normalisation(case):
    """Normalising and undoing it gives what the bare VAE reconstructs; a wrong shift, scale or mean would not."""
    vae, x = case.family.pipeline.vae, pixels(case)
    if case.name == "qwen_image":
        bare = vae.decode(vae.encode(x[:, :, None]).latent_dist.mode()).sample[:, :, 0]
    elif case.name == "sana":
        bare = vae.decode(vae.encode(x).latent).sample
    else:
        bare = vae.decode(vae.encode(x).latent_dist.mode()).sample
    latents = case.family.encode(x)
    assert latents.shape == (2, *case.shape)
    assert_rounded(case.family.decode(latents), bare, 1000)


def test_pixels_receive_gradients_but_the_vae_does_not(case):
    latents = case.noise().requires_grad_(True)
    case.family.decode(latents).square().mean().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0
    assert all(p.grad is None for module in case.family.frozen_modules() for p in module.parameters())


def test_sizes_that_do_not_fit_are_refused(case):
    with pytest.raises(InputError, match="expected multiples of"):
        case.family.latent_shape(case.size[0] + 1, case.size[1])


def test_null_conditions_have_any_number_of_rows(case):
    empty = case.family.null_condition(3)
    assert all(len(value) == 3 for value in empty.values())
    assert not any(value.requires_grad for value in empty.values())
    if "mask" in empty:
        assert empty["mask"].dtype == torch.bool
        assert empty["mask"].any()
