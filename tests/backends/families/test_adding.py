"""A family that twinrl has not is added by one file, the one of docs/extending.md, named by its dotted path.

Everything that trainers, data and exports ask of a family then works with it.
"""

import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

from tests import pages
from tests.backends.families import tiny
from tests.backends.families.conftest import SWITCHES, Case, disturbed
from tests.backends.families.forward import at
from tests.backends.families.held import from_pipeline
from tests.backends.families.made import assert_alike
from tests.data.tiny import write_pairs
from tests.logs import rows
from twinrl.backends.families import FAMILIES, load_family
from twinrl.backends.families.family import FamilyConfig
from twinrl.backends.families.lora import LoraSettings
from twinrl.backends.families.sd3 import SD3
from twinrl.config.components import ComponentError
from twinrl.sampling import euler, sample
from twinrl.training import schema

NAME = "my_family.OvisImage"
(PAGE,) = (text for title, text in pages.sections("extending").items() if title.startswith("Family"))


def pipeline() -> Any:
    transformer = diffusers.OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    config = transformers.Qwen3Config(
        vocab_size=80, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return diffusers.OvisImagePipeline(
        transformer=transformer, scheduler=tiny.euler(), vae=tiny.kl_vae(), tokenizer=tiny.qwen_tokenizer(),
        text_encoder=transformers.Qwen3Model(config),
    )  # fmt: skip


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Case:
    """The page's family, with a tiny pipeline on disk."""
    for name, text in pages.files(PAGE).items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(tiny.BUILDERS, NAME, pipeline)
    made = tiny.build(NAME)
    made.save_pretrained(tmp_path / "pipeline")
    family = load_family(NAME, FamilyConfig(path=str(tmp_path / "pipeline")))
    return Case(NAME, tmp_path / "pipeline", made, family)


def test_it_equals_its_own_pipeline_and_starts_as_its_teacher(added: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.backends.families.conftest.CALL", {NAME: {"guidance_scale": 1.0}})
    z, network = added.noise(), added.network()
    theirs = added.call(added.pipeline, z, num_inference_steps=4, sigmas=[1.0, 0.75, 0.5, 0.25], output_type="latent")
    ours = sample(network, z, added.condition, euler(4))
    assert (ours - z).abs().mean() > 0.1
    assert_alike(NAME, from_pipeline(added.family, theirs, added.shape), ours)

    t = torch.tensor([0.3, 1.0])
    assert torch.equal(at(network, added, -t, 0 * t), at(network, added, t))
    assert not torch.allclose(at(disturbed(network), added, -t, -t), at(network, added, t))
    assert added.network(lora=LoraSettings(rank=2)).transformer.peft_config


@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_takes_whatever_is_registered(name: str) -> None:
    switches = [f"model.{key}={str(value).lower()}" for key, value in SWITCHES.get(name, {}).items()]
    given = [f"model={{family: {name}, path: x}}", *switches, "data={source: folder, root: x}"]
    assert schema.load("twinflow", given).model.family == name


SMALL = {
    "data": "--device cpu buckets.sizes=[[32,32]] buckets.multiple=8 validation=0.3",
    "train": "'train={steps: 2, batch: 4}' tracking.mlflow=false run.dir=runs 'terms.reward={branches: [e2e]}' "
    "'reward={model: brightness, gradient: {eta: 50}}' "
    "'evaluation={n: 20, nfe: [1], grid_samples: 2, batch: 4, velocity_rows: 4}'",
    "export": "",
}
STOCK = """
import twinrl
import my_family
from diffusers import DiffusionPipeline
student = DiffusionPipeline.from_pretrained("student")
image = student("a red cat", num_inference_steps=2, guidance_scale=0, height=32, width=32).images[0]
assert image.size == (32, 32)
"""


@pytest.mark.slow
@pytest.mark.campaign
def test_from_images_to_a_stock_pipeline_by_the_commands(added: Case, tmp_path: Path) -> None:
    """The page's commands, and a process that knows no more of twinrl than the family's file."""
    write_pairs(tmp_path / "images", [(32, 32)] * 16)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path]), "OMP_NUM_THREADS": "1"}

    def does(*arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]

    for command in pages.commands(PAGE):
        (run,) = (tmp_path / "runs").glob("*-s0") if "<run>" in command else (None,)
        words = shlex.split(command.replace("runs/<run>", str(run)))[1:]
        does("-m", "twinrl", *words, *shlex.split(SMALL[words[0]]))
    does("-c", STOCK)
    (run,) = (tmp_path / "runs").glob("*-s0")
    assert [math.isfinite(row["reward/mean"]) for row in rows(run)] == [True, True]


# --- what an own family returns -------------------------------------------------------------------------------


class Wrong(SD3):
    """Says what each case makes it say."""

    def _encode_prompts(self, prompts):
        return SAYS.get("_encode_prompts", super()._encode_prompts)(prompts)

    def encode(self, pixels):
        return SAYS.get("encode", super().encode)(pixels)

    def decode(self, latents):
        return SAYS.get("decode", super().decode)(latents)

    def latent_shape(self, height, width):
        return SAYS.get("latent_shape", super().latent_shape)(height, width)


SAYS = {}
CALLS = {
    "_encode_prompts": lambda family: family.encode_prompts(["a", "b"]),
    "encode": lambda family: family.encode(torch.zeros(2, 3, 16, 16)),
    "decode": lambda family: family.decode(torch.zeros(2, family.channels, 2, 2)),
    "latent_shape": lambda family: family.latent_shape(16, 16),
}


@pytest.mark.parametrize("wrong", [None, "text", torch.zeros(3, 5)], ids=["none", "text", "shape"])
@pytest.mark.parametrize("method", CALLS)
def test_a_family_that_returns_something_else(sd3, monkeypatch, method, wrong):
    family = load_family(f"{__name__}.Wrong", FamilyConfig(path=str(sd3.folder)))
    monkeypatch.setattr(family, "TOKENS", 16)
    CALLS[method](family)
    monkeypatch.setitem(SAYS, method, lambda *given: wrong)
    line = getattr(Wrong, method).__wrapped__.__code__.co_firstlineno
    with pytest.raises(ComponentError, match=rf"Wrong\.{method} returns .* at .*test_adding\.py:{line}; expected "):
        CALLS[method](family)
