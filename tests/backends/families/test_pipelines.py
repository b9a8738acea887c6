"""What goes in: folders, hub names, published TwinFlow weights; and one line on what is wrong with the rest."""

import json
import logging
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.backends.families.conftest import SWITCHES
from tests.backends.families.forward import T, at
from twinrl.backends.families import FAMILIES, family_class, load_family
from twinrl.backends.families.family import FamilyConfig, FamilyNetwork
from twinrl.backends.families.pipelines import check_values
from twinrl.config.errors import InputError

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(sd3, tmp_path):
    """A copy of SD3's folder to damage."""
    return shutil.copytree(sd3.folder, tmp_path / "sd3")


def load(folder, name="sd3"):
    config = FamilyConfig(path=str(folder), **SWITCHES.get(name, {}))
    return load_family(name, config).network(config)


def refused(folder, name="sd3"):
    with pytest.raises(InputError) as caught:
        load(folder, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_family_is_registered_under_its_name():
    assert [family_class(name).NAME for name in FAMILIES] == list(FAMILIES)


def test_a_network_that_lacks_a_method_is_told_before_anything_is_loaded(monkeypatch):
    class Half(FamilyNetwork):
        pass

    class Mine(family_class("sd3")):
        NETWORK = Half

    monkeypatch.setattr("twinrl.backends.families.own", lambda *_: Mine)
    with pytest.raises(
        InputError, match=r"family 'mine\.Mine': NETWORK lacks velocity; fix: write what .*FamilyNetwork"
    ):
        family_class("mine.Mine")


def test_unknown_family_lists_the_known():
    with pytest.raises(InputError, match="unknown family 'sdxl'; expected one of sd3, qwen_image"):
        family_class("sdxl")


def test_neither_folder_nor_hub_name(tmp_path):
    assert refused(tmp_path / "none").endswith("expected a diffusers folder or a hub name like owner/name")


def test_a_hub_name_without_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "the model hub cannot be reached" in refused("owner/model")


def test_a_hub_name_in_the_cache_is_used_without_network(sd3, monkeypatch, tmp_path):
    """The cache's layout: a reference to a revision, and its snapshot."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--tiny"
    shutil.copytree(sd3.folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert torch.equal(at(load("owner/tiny"), sd3), at(sd3.network(), sd3))


def test_an_ordinary_folder(tmp_path):
    assert refused(tmp_path) == f"{tmp_path} is no diffusers pipeline; expected a file model_index.json in it"


def test_another_familys_folder(folder):
    message = refused(folder, "flux")
    assert "got StableDiffusion3Pipeline; expected FluxPipeline" in message


@pytest.mark.parametrize("component", ["vae", "text_encoder_3", "transformer"])
def test_a_missing_component(folder, component):
    shutil.rmtree(folder / component)
    assert f"lacks a component; got no folder {component}" in refused(folder)


def test_a_damaged_index(folder):
    (folder / "model_index.json").write_text("{")
    assert "model_index.json is damaged" in refused(folder)


def test_a_transformer_without_configuration(folder):
    (folder / "transformer" / "config.json").unlink()
    assert "config.json is missing" in refused(folder)


def test_damaged_weights(folder):
    (folder / WEIGHTS).write_bytes(b"no weights")
    assert "transformer cannot be loaded" in refused(folder)


@pytest.mark.parametrize("file", ["text_encoder/model.safetensors", "vae/config.json", "tokenizer_2/tokenizer.json"])
def test_damaged_components(folder, file):
    (folder / file).write_text("garbage")
    with pytest.raises(InputError, match=r"(loaded|damaged); got .*; fix: download or save the pipeline again"):
        load_family("sd3", FamilyConfig(path=str(folder)))


ODD = {
    "half a channel": ("transformer", {"in_channels": 4.5}, "in_channels .* got 4.5; expected a whole number"),
    "text": ("transformer", {"patch_size": "2"}, "patch_size .* got '2'; expected a whole number"),
    "a list of text": ("vae", {"block_out_channels": ["a"]}, "block_out_channels .* expected a whole number"),
    "no list": ("vae", {"down_block_types": 4}, "down_block_types .* expected a list"),
    "truth": ("vae", {"use_quant_conv": "no"}, "use_quant_conv .* expected bool"),
    "not finite": ("vae", {"scaling_factor": float("nan")}, "scaling_factor .* got nan; expected a number"),
    "layers for a year": ("transformer", {"num_layers": 10**9}, "num_layers .* expected 0 to 1000"),
    "text encoder": ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers .* expected 0 to 1000"),
    "sizes that do not fit": ("transformer", {"num_attention_heads": 3}, "cannot be loaded; got "),
    "400 digits": ("vae", {"sample_size": int("7" * 400), "layers_per_block": -1}, "layers_per_block .* 0 to 1000"),
    "below zero": ("transformer", {"in_channels": -4}, "cannot be loaded; got "),
}


@pytest.mark.parametrize("case", ODD)
def test_values_of_descriptions(folder, case):
    part, values, words = ODD[case]
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    assert re.search(words, message := refused(folder)), message
    assert str(folder / part) in message


def test_every_family_is_described_by_values_that_fit(cases):
    """As diffusers and transformers write them; those of published models are of the same classes."""
    for name in FAMILIES:
        check_values(cases(name).folder)


@pytest.mark.parametrize(
    "entry", [["antigravity", "Model"], ["wave", "Model"], ["diffusers"], ["diffusers", 4], [[], "x"]]
)
def test_components_of_odd_libraries(folder, entry):
    """No module is imported because a folder says so."""
    index = json.loads((folder / "model_index.json").read_text()) | {"vae": entry}
    (folder / "model_index.json").write_text(json.dumps(index))
    message = refused(folder)
    assert "of another library" in message or "is damaged" in message
    assert "antigravity" not in sys.modules


def test_a_pipeline_is_no_component(folder):
    """Its own index would name any module."""
    index = json.loads((folder / "model_index.json").read_text()) | {"vae": ["diffusers", "DiffusionPipeline"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    inner = {"_class_name": "DiffusionPipeline", "unet": ["antigravity", "Model"]}
    (folder / "vae" / "model_index.json").write_text(json.dumps(inner))
    with pytest.raises(InputError, match="vae is a pipeline and no component"):
        load_family("sd3", FamilyConfig(path=str(folder)))
    assert "antigravity" not in sys.modules


def test_code_beside_the_weights_is_not_run(folder, tmp_path, monkeypatch):
    """transformers asks whether to, and here somebody answers yes."""
    proof, part = tmp_path / "proof", folder / "text_encoder"
    attack = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (part / "config.json").write_text(json.dumps(attack))
    (part / "theirs.py").write_text(f"open({str(proof)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    with pytest.raises(InputError, match="cannot be loaded; got "):
        load(folder)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["text_encoder/transformers.py", "None.py"])
def test_code_that_older_versions_of_diffusers_run_is_refused(folder, name):
    """They look for a component's library, and for the pipeline's class, in the folder first."""
    (folder / name).touch()
    assert f"brings code that loading would run; got {folder / name}" in refused(folder)


def test_a_tokenizer_without_vocabulary_is_not_made_up(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer has no vocabulary; got tokenizer_config\.json"):
        load_family("sd3", FamilyConfig(path=str(folder)))


def test_missing_weights_are_not_made_up(folder):
    weights = load_file(folder / WEIGHTS)
    del weights["proj_out.bias"]
    save_file(weights, folder / WEIGHTS)
    assert "lacks weights; got no proj_out.bias (1 in all)" in refused(folder)


LOST = {"vae": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_3": "model"}


@pytest.mark.parametrize("part", LOST)
def test_missing_weights_of_a_frozen_component_are_not_made_up(folder, part):
    """The libraries would fill them with random numbers."""
    file = folder / part / f"{LOST[part]}.safetensors"
    weights = load_file(file)
    lost = sorted(weights)[len(weights) // 2]
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{part} lacks weights; got no {re.escape(lost)} \(1 in all\)"):
        load_family("sd3", FamilyConfig(path=str(folder)))


@pytest.mark.parametrize(
    ("part", "values"), [("vae", {"use_post_quant_conv": True}), ("text_encoder", {"num_hidden_layers": 3})]
)
def test_a_description_of_more_than_the_weights_is_refused(folder, part, values):
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(InputError, match=f"{part} lacks weights"):
        load_family("sd3", FamilyConfig(path=str(folder)))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_s_components_are_whole(cases, name):
    """Also those whose weights have other names in their files."""
    load_family(name, FamilyConfig(path=str(cases(name).folder), **SWITCHES.get(name, {})))


def test_variants_that_cannot_be_trained(cases, tmp_path):
    changes = {"qwen_image": "use_additional_t_cond", "sana": "guidance_embeds"}
    for name, option in changes.items():
        copied = shutil.copytree(cases(name).folder, tmp_path / name)
        pipeline = cases(name).pipeline
        config = {k: v for k, v in pipeline.transformer.config.items() if not k.startswith("_")}
        type(pipeline.transformer)(**config | {option: True}).save_pretrained(copied / "transformer")
        assert option in refused(copied, name) or "SANA-Sprint" in refused(copied, name)


# --- published TwinFlow checkpoints ---------------------------------------------------------------------


def published(case, folder, names=lambda name: True):
    """``folder`` with a second time module as public code saves it, and no sign."""
    network = case.network()
    second = {n: p for n, p in network.transformer.twin_parameters().items() if n != "twin_sign"}
    second = {n: torch.randn_like(p).detach() for n, p in second.items() if names(n)}
    file = folder / case.family.PART / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | second, file)
    return second


def test_published_second_times_load_and_the_missing_sign_is_said(case, tmp_path, caplog):
    folder = shutil.copytree(case.folder, tmp_path / "published")
    second = published(case, folder)
    with caplog.at_level(logging.INFO, logger="twinrl"):
        network = load(folder, case.name)
    loaded = network.transformer.twin_parameters()
    assert all(torch.equal(loaded[name], value) for name, value in second.items())
    assert loaded["twin_sign"].abs().sum() == 0
    assert "has no sign embedding" in caplog.text
    assert "has no second time embedding" not in caplog.text
    assert torch.equal(at(network, case), at(case.network(), case))
    assert torch.equal(at(network, case, -T, -T), at(network, case, T, T))


@pytest.mark.slow
def test_what_published_second_times_mean(sd3, tmp_path):
    """temb + temb₂(1000·r)·(t − r), as the public SD3 transformer has it."""
    folder = shutil.copytree(sd3.folder, tmp_path / "published")
    published(sd3, folder)
    network, r = load(folder), 0.4 * T
    transformer, pooled = network.transformer, sd3.condition["pooled"]
    stock = sd3.pipeline.transformer.time_text_embed
    expected = stock(1000 * T, pooled) + transformer.time_text_embed_2(1000 * r, pooled) * (T - r)[:, None]
    with transformer.at(T, r):
        torch.testing.assert_close(transformer.time_text_embed(1000 * T, pooled), expected)


def test_a_stock_checkpoint_says_that_both_are_new(sd3, caplog):
    with caplog.at_level(logging.INFO, logger="twinrl"):
        sd3.network()
    assert "has no second time embedding: it starts without effect" in caplog.text
    assert "has no sign embedding" in caplog.text


def test_half_a_second_time_is_refused(sd3, folder):
    published(sd3, folder, names=lambda name: "text_embedder" in name)
    assert "has a part of time_text_embed_2 only" in refused(folder)


def test_content_hash_is_the_weights_not_the_place(sd3, folder):
    family = load_family("sd3", FamilyConfig(path=str(folder)))
    before = family.content_hash
    assert before == sd3.family.content_hash
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"proj_out.bias": weights["proj_out.bias"] + 1}, folder / WEIGHTS)
    assert family.content_hash != before


def test_settings_are_checked():
    from pydantic import ValidationError

    with pytest.raises(ValidationError):
        FamilyConfig(path="x", dtype="fp8")
    fields = FamilyConfig.model_fields
    assert [name for name, field in fields.items() if not field.description] == []
    assert json.loads(FamilyConfig(path="x", lora={"rank": 8}).model_dump_json())["lora"]["rank"] == 8
