"""A family that twinrl has not is added by one file (``ovis_image.py`` beside this one) and one entry.

Everything that trainers, data and exports ask of a family then works with it.
"""

import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from rich.console import Console

import twinrl
from tests.backends.families import made, tiny
from tests.backends.families.conftest import Case, disturbed
from tests.backends.families.test_networks import at
from tests.logs import rows
from twinrl import schema
from twinrl.backends.families import FAMILIES, family_class, load_family
from twinrl.backends.families.family import FamilyConfig
from twinrl.backends.families.lora import LoraSettings
from twinrl.commands.export import export
from twinrl.commands.train import train
from twinrl.sampling import euler, sample

NAME, MODULE = "ovis_image", "tests.backends.families.ovis_image"


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
    """The new family, registered, with a tiny pipeline on disk."""
    monkeypatch.setitem(FAMILIES, NAME, f"{MODULE}:OvisImage")
    monkeypatch.setitem(tiny.BUILDERS, NAME, pipeline)
    monkeypatch.setitem(twinrl._COMPONENTS, "OvisImageTwinFlowTransformer", MODULE)
    own = tiny.build(NAME)
    own.save_pretrained(tmp_path / NAME)
    family = load_family(NAME, FamilyConfig(path=str(tmp_path / NAME)))
    return Case(NAME, tmp_path / NAME, own, family)


def test_it_equals_its_own_pipeline_and_starts_as_its_teacher(added: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.backends.families.conftest.CALL", {NAME: {"guidance_scale": 1.0}})
    z, network = added.noise(), added.network()
    theirs = added.call(added.pipeline, z, num_inference_steps=4, sigmas=[1.0, 0.75, 0.5, 0.25], output_type="latent")
    ours = sample(network, z, added.condition, euler(4))
    assert (ours - z).abs().mean() > 0.1
    made.assert_alike(NAME, added.family.from_pipeline(theirs, added.shape), ours)

    t = torch.tensor([0.3, 1.0])
    assert torch.equal(at(network, added, -t, 0 * t), at(network, added, t))
    assert not torch.allclose(at(disturbed(network), added, -t, -t), at(network, added, t))
    assert added.network(lora=LoraSettings(rank=2)).transformer.peft_config


@pytest.mark.slow
def test_from_images_to_a_stock_pipeline_by_the_commands(
    added: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family_class(NAME), "TOKENS", 32)
    family, quiet = made.made(tmp_path, NAME), Console(quiet=True)
    more = [
        "model.lora={rank: 2}", "train={steps: 2, batch: 4}", "tracking.mlflow=false", f"run.dir={tmp_path / 'runs'}",
        "terms.reward={branches: [e2e]}", "reward={model: brightness, gradient: {eta: 50}}",
        "evaluation={n: 20, nfe: [1], grid_samples: 2, batch: 4, velocity_rows: 4}",
    ]  # fmt: skip
    settings = schema.load("twinflow", [*family.overrides, *more])
    assert train(settings, False, quiet) == 0
    assert [math.isfinite(row["reward/mean"]) for row in rows(settings.directory)] == [True, True]
    export(settings.directory, tmp_path / "student", False, None, None, None, quiet)
    student = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    image = student("a red cat", num_inference_steps=2, guidance_scale=0, height=32, width=32).images[0]
    assert image.size == (32, 32)
