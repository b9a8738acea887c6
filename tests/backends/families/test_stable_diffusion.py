"""Stable Diffusion as a flow: its own pipeline on the schedule, refused where a switch or the model is wrong."""

import json
import shutil

import diffusers
import pytest
import torch
from pydantic import ValidationError

from tests.backends.families import tiny
from tests.backends.families.conftest import PROMPTS, disturbed
from tests.backends.families.forward import at
from tests.backends.families.made import assert_alike
from tests.rounding import assert_rounded
from twinrl.backends.families import load_family
from twinrl.backends.families.family import FamilyConfig
from twinrl.config.errors import InputError
from twinrl.training import schema


@pytest.fixture
def sd(cases):
    return cases("stable_diffusion")


def loaded(folder, **switches):
    config = FamilyConfig(path=str(folder), **switches)
    return load_family("stable_diffusion", config).network(config)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_euler_on_the_schedule_is_the_pipelines_own_ddim(prediction, tmp_path):
    """DDIM's step is Euler's in the flow's coordinates; prompts, timesteps, scales and conversions all at once."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        pipeline = tiny.stable_diffusion(prediction)
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            tiny.shake(part.eval())
    pipeline.save_pretrained(tmp_path / "sd")
    network = loaded(tmp_path / "sd", prediction=prediction, diff2flow=True)
    family, bridge = network.transformer, network.transformer.bridge
    pipeline.scheduler.set_timesteps(5)
    steps = pipeline.scheduler.timesteps
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS, height=16, width=16, num_inference_steps=5, guidance_scale=1.0, latents=start, output_type="latent"
    )[0]
    text = load_family("stable_diffusion", FamilyConfig(path=str(tmp_path / "sd"))).encode_prompts(PROMPTS)
    levels = [float(family.level(s.double())) for s in steps]
    last = float(bridge.times[0])  # set_alpha_to_one=False ends at the schedule's first level
    t = torch.tensor(levels[0]).double()
    x = (start.double() * (t.square() + (1 - t).square()).sqrt()).float()
    for now, then in zip(levels, [*levels[1:], last], strict=True):
        time = torch.full((2,), now)
        with torch.no_grad():
            x = x + (then - now) * network(x, time, time, text)
    ours = bridge.input(x, torch.full((2,), last))
    assert (ours - start).abs().mean() > 0.1
    assert_rounded(ours, theirs, 3000)  # 500 in each of five steps, and 1000 of the times between their timesteps


def test_a_jump_from_noise_is_the_models_own_prediction(sd):
    """At t = 1 the U-Net sees the noise itself and its last timestep, as samplers give it."""
    z, ones = sd.noise(), torch.ones(2)
    with torch.no_grad():
        jumped = z - sd.network()(z, ones, ones, sd.condition)
        epsilon = sd.pipeline.unet(z, 999, sd.condition["text"]).sample
    signal = tiny.ddim().alphas_cumprod[-1]
    assert_alike("stable_diffusion", jumped, (z - (1 - signal).sqrt() * epsilon) / signal.sqrt())


def test_rounding_in_bf16_is_the_networks_and_not_the_bridges(sd):
    """x_t stays exact on its way round the U-Net: with a U-Net that answers 0 the velocity is exact in bf16, too."""
    network = sd.network(dtype="bf16")
    with torch.no_grad():
        network.transformer.conv_out.weight.zero_()
        network.transformer.conv_out.bias.zero_()
    x, t = sd.noise(), torch.tensor([0.5, 0.9])
    torch.testing.assert_close(at(network, sd, t), -x / (1 - t).view(-1, 1, 1, 1))


@pytest.mark.parametrize(
    ("switches", "says"),
    [
        ({}, "is a diffusion model and TwinFlow trains flows; got model.prediction=null model.diff2flow=false"),
        ({"prediction": "epsilon"}, "got model.prediction=epsilon model.diff2flow=false"),
        ({"diff2flow": True}, "got model.prediction=null model.diff2flow=true"),
        ({"prediction": "v", "diff2flow": True}, "got v; expected epsilon; fix: model.prediction=epsilon"),
    ],
)
def test_one_switch_without_the_other_or_the_wrong_one(sd, switches, says):
    with pytest.raises(InputError) as caught:
        loaded(sd.folder, **switches)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_configuration_refuses_them_before_anything_is_loaded():
    family = ["data.source=folder", "model.path=owner/name"]
    for model, says in (
        ("model={family: stable_diffusion, prediction: v}", "model.prediction=v model.diff2flow=false"),
        ("model={family: sd3, prediction: v, diff2flow: true}", "sd3 is a flow already"),
        ("model={diff2flow: true}", "diff2flow needs a pretrained family"),
    ):
        with pytest.raises(InputError, match=says):
            schema.load("twinflow", [model, *(family if "family" in model else [])])
    with pytest.raises(ValidationError):
        FamilyConfig(path="x", prediction="sample")


def test_a_model_of_noise_cannot_start_from_pure_noise(sd, tmp_path):
    folder = shutil.copytree(sd.folder, tmp_path / "sd")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    with pytest.raises(InputError, match="a model of ε cannot end in pure noise"):
        loaded(folder, prediction="epsilon", diff2flow=True)


def test_variants_that_see_more_than_latents(sd, tmp_path):
    folder = shutil.copytree(sd.folder, tmp_path / "inpainting")
    config = {k: v for k, v in sd.pipeline.unet.config.items() if not k.startswith("_")}
    for change, says in (({"in_channels": 9}, "9 channels in and 4 out"), ({"time_cond_proj_dim": 8}, "time_cond")):
        diffusers.UNet2DConditionModel(**config | change).save_pretrained(folder / "unet")
        with pytest.raises(InputError, match=says):
            loaded(folder, prediction="epsilon", diff2flow=True)


def test_an_exported_student_brings_its_schedule(sd, tmp_path):
    """Its folder's scheduler is TwinFlow's; the U-Net's own configuration says what it was trained on."""
    network = disturbed(sd.network())
    network.transformer.save_pretrained(tmp_path / "unet")
    again = type(network.transformer).from_pretrained(tmp_path / "unet")
    assert again.config["diffusion"] == network.transformer.config["diffusion"]
    x, text = sd.noise(), sd.condition["text"]
    with torch.no_grad():
        assert torch.equal(again(x, 600, text).sample, network.transformer(x, 600.0, text).sample)


def test_the_safety_checker_is_not_loaded(sd, tmp_path):
    folder = shutil.copytree(sd.folder, tmp_path / "sd")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    family = load_family("stable_diffusion", FamilyConfig(path=str(folder)))
    assert family.pipeline.safety_checker is None
    assert len(family.frozen_modules()) == 2
