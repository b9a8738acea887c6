"""Adapters: the base stays frozen, the student starts as its teacher, files are diffusers'."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.backends.families.conftest import assert_gradients_alike, disturbed, gradients_of
from tests.backends.families.forward import T, at
from tests.backends.families.held import from_pipeline
from tests.backends.families.made import assert_alike
from tests.rounding import assert_rounded
from twinrl.backends.families.export import export_lora, with_lora
from twinrl.backends.families.family import FamilyConfig, FrozenTeacher
from twinrl.backends.families.lora import ADAPTER_FILE, ALPHA_FILE, TWIN_FILE, LoraSettings
from twinrl.config.errors import InputError

LORA = LoraSettings(rank=2)


def test_adapters_second_time_and_sign_are_all_that_is_trained(case):
    network = case.network(lora=LORA)
    trained = {n.removeprefix("transformer.") for n, p in network.named_parameters() if p.requires_grad}
    twin = set(network.transformer.twin_parameters())
    assert twin < trained
    assert all("lora_" in name for name in trained - twin)
    adapted = {name.split(".lora_")[0] for name in trained - twin}
    assert all(any(name.endswith(target) for name in adapted) for target in case.family.LORA_TARGETS)


def test_initial_adapters_depend_on_the_seed_alone(sd3):
    config = sd3.config.model_copy(update={"lora": LORA})
    before = torch.random.get_rng_state()
    first, again, other = (sd3.family.network(config, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {name for name in first if not torch.equal(first[name], other[name])} == {n for n in first if "lora_A" in n}


@pytest.mark.slow
def test_a_new_adapter_changes_nothing(case):
    assert torch.equal(at(case.network(lora=LORA), case), at(case.network(), case))


def test_saved_adapters_give_the_same_student(case, tmp_path):
    network = disturbed(case.network(lora=LORA))
    export_lora(network, case.family, tmp_path / "lora", base="owner/base")
    again = with_lora(case.network(), case.family, tmp_path / "lora")
    for t, r in ((T, T), (T, 0 * T), (-T, -T)):
        assert_alike(case.name, at(again, case, t, r), at(network, case, t, r))


def test_a_stock_pipeline_reads_the_adapters(flow, tmp_path):
    """The file is diffusers' own format: a stock transformer with it equals the student at r = t."""
    from tests.backends.families import tiny

    network = disturbed(flow.network(lora=LORA))
    export_lora(network, flow.family, tmp_path / "lora", base="owner/base")
    pipeline = tiny.build(flow.name)
    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.scheduler, z = tiny.euler(), flow.noise()
    theirs = flow.call(pipeline, z, num_inference_steps=1, sigmas=[1.0], output_type="latent")
    ones = torch.ones(2)
    assert_alike(flow.name, from_pipeline(flow.family, theirs, flow.shape), z - at(network, flow, ones))


@pytest.mark.slow
def test_a_frozen_teacher_pass_leaves_the_students_gradients_alone(case):
    """It switches the adapters off and on again between the student's forward and backward pass."""

    def gradients(with_teacher):
        network = disturbed(case.network(lora=LORA, gradient_checkpointing=True)).train()
        velocity = network(case.noise(), T, 0.5 * T, case.condition)
        if with_teacher:
            FrozenTeacher(network)(case.noise(), T, T, case.condition)
        velocity.square().mean().backward()
        return gradients_of(network)

    assert_gradients_alike(gradients(True), gradients(False))


def test_alpha_scales_the_update(sd3):
    def update(alpha):
        network = sd3.network(lora=LoraSettings(rank=2, alpha=alpha))
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(1e-3)
                if "lora_A" in name:
                    parameter.fill_(1e-2)
        return at(network, sd3) - at(sd3.network(), sd3)

    ratio = update(4).norm() / update(2).norm()
    assert ratio == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("metadata", [True, False], ids=["with metadata", "without"])
@pytest.mark.parametrize("file", [ADAPTER_FILE, ALPHA_FILE])
def test_any_loader_scales_the_adapters_rightly(sd3, tmp_path, file, metadata):
    """By alpha tensors, by metadata, or by neither, as programs do: (alpha or rank) / rank times B·A."""
    network = disturbed(sd3.network(lora=LoraSettings(rank=2, alpha=7)))
    export_lora(network, sd3.family, tmp_path / "lora", base="b")
    with safe_open(tmp_path / "lora" / file, "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  not a mapping
        told = json.loads((stored.metadata() or {}).get("lora_adapter_metadata", "{}")) if metadata else {}
    layers = {n: m for n, m in network.transformer.named_modules() if "default" in getattr(m, "lora_A", {})}
    assert layers
    for path, layer in layers.items():
        a, b = (tensors[f"transformer.{path}.lora_{each}.weight"] for each in "AB")
        alpha = tensors.get(f"transformer.{path}.alpha", told.get("transformer.lora_alpha", len(a)))
        assert_rounded(float(alpha) / len(a) * (b @ a), layer.get_delta_weight("default"), 8)


@pytest.mark.slow
def test_a_card_says_how_the_base_was_loaded(cases, tmp_path):
    """Followed to the letter on a base that is float32 on disk it gives the student that was trained."""
    for name in ("sd3", "stable_diffusion"):
        case = cases(name)
        network = disturbed(case.network(lora=LORA, dtype="bf16"))
        config = case.config.model_copy(update={"dtype": "bf16", "lora": LORA})
        export_lora(network, case.family, tmp_path / name, base=str(case.folder), config=config)
        card = (tmp_path / name / "README.md").read_text()
        (line,) = (line for line in card.splitlines() if line.startswith("config = "))
        told = eval(line.removeprefix("config = "), {"FamilyConfig": FamilyConfig})
        assert (told.path, told.dtype) == (case.folder.name, "bf16")
        base = case.family.network(told.model_copy(update={"path": str(case.folder)}))
        again = with_lora(base, case.family, tmp_path / name)
        assert torch.equal(at(again, case, T, 0 * T), at(network, case, T, 0 * T))


def test_targets_that_name_nothing_are_refused(sd3):
    with pytest.raises(InputError, match=r"lora.targets names no layer; got to_quark"):
        sd3.network(lora=LoraSettings(targets=("to_quark",)))


def test_files_of_another_model_are_refused(cases, tmp_path):
    sd3, flux = cases("sd3"), cases("z_image")
    export_lora(sd3.network(lora=LORA), sd3.family, tmp_path / "lora", base="b")
    assert "twin_sign" in load_file(tmp_path / "lora" / TWIN_FILE)
    with pytest.raises(InputError, match="belongs to another transformer"):
        with_lora(flux.network(), flux.family, tmp_path / "lora")
    with pytest.raises(InputError, match="no LoRA student"):
        with_lora(sd3.network(), sd3.family, tmp_path)


def test_a_student_without_adapters_has_none_to_export(sd3, tmp_path):
    with pytest.raises(InputError, match="no adapters"):
        export_lora(sd3.network(), sd3.family, tmp_path / "x", base="b")
