"""Export a student, sample with nothing but diffusers: the image is our sampler's."""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from tests.backends.families.conftest import PROMPTS, disturbed
from tests.backends.families.forward import T, at
from tests.backends.families.held import from_pipeline
from tests.backends.families.made import assert_alike, few
from twinrl.backends.families import load_family
from twinrl.backends.families.export import export
from twinrl.backends.families.lora import LoraSettings
from twinrl.config.errors import InputError
from twinrl.sampling.scheduler import TwinFlowScheduler

SCRIPT = """
import twinrl
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({folder!r})
image = pipeline("a red cat", num_inference_steps=2, guidance_scale=0, {more}).images[0]
"""


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["full", "lora"])
def test_a_plain_pipeline_samples_the_student(case, lora, tmp_path):
    network = disturbed(case.network(lora=lora))
    before = at(network, case, -T, 0 * T)
    export(network, case.family, tmp_path / "student", TwinFlowScheduler(), base="owner/base")
    assert torch.equal(at(network, case, -T, 0 * T), before)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student")
    for steps in (1, 2, 4):
        z = case.noise(steps)
        told = {"num_inference_steps": steps, "guidance_scale": 0, "output_type": "latent"}
        theirs = from_pipeline(case.family, case.call(pipeline, z, **told), case.shape)
        assert_alike(case.name, theirs, few(case.family, network, z, case.condition, steps))


@pytest.mark.slow
def test_images_are_equal_but_for_the_last_bit_of_few_pixels(case, tmp_path):
    """A value of 0 … 255 that falls between two of them may be rounded to either."""
    network = disturbed(case.network())
    export(network, case.family, tmp_path / "student", TwinFlowScheduler(), base="owner/base")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student")
    z = case.noise()
    theirs = case.call(pipeline, z, num_inference_steps=1, guidance_scale=0, output_type="np")
    ours = case.family.decode(few(case.family, network, z, case.condition, 1)).detach()
    ours = ((ours / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    off = ((torch.from_numpy(theirs) * 255).round() - ours).abs()
    assert off.max() <= 1
    assert off.mean() < 0.05
    assert ours.std() > 1


@pytest.mark.slow
def test_an_exported_folder_is_a_start_again(case, tmp_path):
    """Second time and sign come back from the weights, by the same path as any folder."""
    network = disturbed(case.network())
    export(network, case.family, tmp_path / "student", TwinFlowScheduler(), base="owner/base")
    config = case.config.model_copy(update={"path": str(tmp_path / "student")})
    again = load_family(case.name, config).network(config)
    assert torch.equal(at(again, case, -T, 0 * T), at(network, case, -T, 0 * T))


@pytest.mark.slow
def test_index_card_and_scheduler(sd3, tmp_path):
    scheduler = TwinFlowScheduler(style="any", seed=5)
    export(sd3.network(), sd3.family, tmp_path / "s", scheduler, base="owner/base", dtype=torch.bfloat16)
    index = json.loads((tmp_path / "s" / "model_index.json").read_text())
    assert index["transformer"] == ["twinrl", "SD3TwinFlowTransformer"]
    assert index["scheduler"] == ["twinrl", "TwinFlowScheduler"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    card = (tmp_path / "s" / "README.md").read_text()
    assert "base_model: owner/base" in card
    assert 'from_pretrained("s", torch_dtype=torch.bfloat16)' in card
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "s")
    assert loaded.scheduler.config["seed"] == 5
    saved = json.loads((tmp_path / "s" / "scheduler" / "scheduler_config.json").read_text())
    assert saved["style"] == "any"


def test_a_card_names_a_folder_without_its_place_and_as_no_model_of_the_hub(sd3, tmp_path):
    """The hub refuses a card whose base model it has not, and nobody's home belongs into one."""
    export(sd3.network(), sd3.family, tmp_path / "s", TwinFlowScheduler(), base=str(sd3.folder))
    card = (tmp_path / "s" / "README.md").read_text()
    assert "base_model" not in card
    assert f"student of `{sd3.folder.name}`" in card
    assert str(sd3.folder.parent) not in card


def test_dtype_of_the_written_weights(sd3, tmp_path):
    network = sd3.network()
    export(network, sd3.family, tmp_path / "s", TwinFlowScheduler(), base="b", dtype=torch.bfloat16)
    weights = load_file(tmp_path / "s" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert network.transformer.dtype == torch.float32


def update(network, size=4e-3):
    """Give the adapters of every layer an update of this share of its weight; path → the update."""
    generator, found = torch.Generator().manual_seed(0), {}
    for path, layer in network.transformer.named_modules():
        if "default" in getattr(layer, "lora_A", {}):
            b = layer.lora_B["default"].weight
            b.data = torch.randn(b.shape, generator=generator)
            b.data *= size * layer.base_layer.weight.float().norm() / layer.get_delta_weight("default").norm()
            found[path] = layer.get_delta_weight("default").detach()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["bf16", "float32"])
def test_adapters_are_added_in_float32_and_rounded_once(case, tmp_path, dtype):
    """In float32 nothing is lost but the last bits; in bf16 what the nearest bf16 weight loses, and that is said."""
    network = case.network(dtype="bf16", lora=LoraSettings(rank=2, alpha=6))
    updates, layers = update(network), dict(network.transformer.named_modules())
    costs = export(network, case.family, tmp_path / "s", TwinFlowScheduler(), base="b", dtype=dtype)
    (file,) = (tmp_path / "s" / case.family.PART).glob("*.safetensors")
    written, lost, moved = load_file(file), 0.0, 0.0
    for path, delta in updates.items():
        exact = layers[path].base_layer.weight.float() + delta
        stored = written[f"{path}.weight"]
        assert torch.equal(stored, exact.to(dtype or torch.bfloat16))
        lost, moved = lost + float((stored.float() - exact).norm()) ** 2, moved + float(delta.norm()) ** 2
    assert costs.written.share == pytest.approx((lost / moved) ** 0.5, rel=1e-4, abs=1e-6)
    card = (tmp_path / "s" / "README.md").read_text()
    assert f"{costs.half.share:.2%} of what training has changed" in card
    assert costs.half.share > 0.1
    assert ("--lora" in card) == costs.written.matters == (dtype is None)
    assert f'from_pretrained("s", torch_dtype=torch.{"float32" if dtype else "bfloat16"})' in card


NO_CONTEXT = ("hidden_states", "sample", "x", "timestep", "t", "guidance")
"""Arguments of transformers that are the latents and the time, and what FLUX's student puts its own number in place of
(``embedded_guidance``)."""


class Heard:
    """What a network receives in a sampler's calls: levels and target times in [0, 1], whether they are fake, and its
    context: by argument, every tensor that is neither latents nor time."""

    def __init__(self, transformer):
        self.calls, self.contexts = [], []
        summed = type(transformer)._levels

        def levels(time):
            self.calls.append([value.float().flatten().clone() for value in summed(transformer, time)])
            return summed(transformer, time)

        transformer._levels = levels
        transformer.register_forward_pre_hook(self._given, with_kwargs=True)

    def _given(self, module, args, kwargs):
        named = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        named = {**named, **named.pop("kwargs", {})}
        lists = {name: value if isinstance(value, list | tuple) else [value] for name, value in named.items()}
        tensors = {name: [v for v in value if isinstance(v, torch.Tensor)] for name, value in lists.items()}
        self.contexts.append({name: found for name, found in tensors.items() if found and name not in NO_CONTEXT})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_a_stock_pipeline_tells_the_network_what_training_did(case, tmp_path, dtype):
    """Loaded as the card says: times, target times, the branch, and everything else but the latents themselves.

    In bf16, pipelines round times to 8 binary digits on the way, as they do for their own models.
    """
    name = "bf16" if dtype == torch.bfloat16 else "float32"
    network = disturbed(case.network(dtype=name))
    family = load_family(case.name, case.config.model_copy(update={"frozen_dtype": name}))
    family.TOKENS = case.family.TOKENS
    export(network, family, tmp_path / "s", TwinFlowScheduler(), base="b")
    assert f"torch_dtype={dtype}" in (tmp_path / "s" / "README.md").read_text()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "s", torch_dtype=dtype)
    theirs, ours = Heard(getattr(pipeline, family.PART)), Heard(network.transformer)
    z = case.noise()
    told = {"num_inference_steps": 4, "guidance_scale": 0, "output_type": "latent"}
    case.call(pipeline, z.to(dtype), **told)
    few(family, network, z, family.encode_prompts(PROMPTS), 4)
    assert len(theirs.calls) == len(ours.calls) == 4
    digits = 2**-7 if dtype == torch.bfloat16 else 1e-5
    for (level, target, fake), (mine, wanted, false) in zip(theirs.calls, ours.calls, strict=True):
        assert (level - mine).abs().max() <= digits
        assert target.abs().max() == wanted.abs().max() == 0
        assert not fake.any()
        assert not false.any()
    for given, ours_given in zip(theirs.contexts, ours.contexts, strict=True):
        assert given.keys() == ours_given.keys()
        assert given
        for name, tensors in given.items():
            for one, other in zip(tensors, ours_given[name], strict=True):
                assert one.is_floating_point() == other.is_floating_point(), name
                assert torch.equal(one.float(), other.float()), name  # masks may be of truths or of ones


def test_a_folder_in_use_is_left_alone(sd3, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="is in use"):
        export(sd3.network(), sd3.family, tmp_path, TwinFlowScheduler(), base="b")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("told", [{}, {"torch_dtype": torch.bfloat16}])
def test_a_pipeline_in_bf16_loads_in_one_precision(cases, tmp_path, told):
    """As the presets write it: text encoders and VAE in bf16, whether or not the script says how to load them."""
    for name in ("sd3", "qwen_image"):
        base = cases(name)
        family = load_family(name, base.config.model_copy(update={"frozen_dtype": "bf16"}))
        export(base.network(dtype="bf16"), family, tmp_path / name, TwinFlowScheduler(), base="b")
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / name, **told)
        parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        assert {parameter.dtype for part in parts for parameter in part.parameters()} == {
            told.get("torch_dtype", torch.float32)
        }
        base.call(pipeline, base.noise().to(pipeline.dtype), num_inference_steps=1)


@pytest.mark.slow
def test_the_three_line_script(sd3, tmp_path):
    """In a fresh interpreter, with nothing imported but ``twinrl`` and diffusers."""
    export(sd3.network(), sd3.family, tmp_path / "s", TwinFlowScheduler(), base="b")
    more = "height=16, width=16, max_sequence_length=16"
    script = SCRIPT.format(folder=str(tmp_path / "s"), more=more) + "assert image.size == (16, 16)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([".", *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
