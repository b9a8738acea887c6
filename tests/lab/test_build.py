"""Building: the same content every time, found again, checked, and rebuilt where the recipe changed."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from twinrl.backends import DiT, build_network, network_key
from twinrl.config.errors import InputError
from twinrl.lab import LabRecipe, load_lab
from twinrl.lab.digits import Warp
from twinrl.lab.fitting import Recipe
from twinrl.lab.pretrain import Pretraining
from twinrl.lab.progress import watched_by

SHORT = Recipe(steps=2, batch=8, lr=1e-3, seed=1)
TINY = LabRecipe(
    warp=Warp(variants=0),
    codec=SHORT,
    judge=SHORT,
    clip=SHORT,
    hps=SHORT,
    preference_judge=SHORT,
    teacher=Pretraining(steps=2, batch=8),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("TWINRL_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def tiny(cache):
    return load_lab(progress=False, recipe=TINY)


def folder_of(cache, recipe=TINY):
    return cache / f"digits-{recipe.hash()[:12]}"


@pytest.mark.slow
def test_rebuilding_gives_the_same_content_whatever_the_threads(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TWINRL_CACHE", str(tmp_path))
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert load_lab(progress=False, recipe=TINY).content_hash == tiny.content_hash
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.slow
def test_the_data_are_shown_while_models_are_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINRL_CACHE", str(tmp_path))
    shares, shown = [0.0], {}
    recipe = dataclasses.replace(TINY, teacher=Pretraining(steps=20, batch=8))
    with watched_by(lambda what, share: shares.append(share), lambda title, rows: shown.update(rows, at=shares[-1])):
        lab = load_lab(recipe=recipe)
    assert 0 < shown["at"] < 1
    first = [int((lab.validation.labels == label).nonzero()[0]) for label in range(10)]
    assert torch.equal(shown["digit"], lab.validation.pixels[first])
    assert torch.allclose(shown["through the codec"], lab.decode(lab.latents("validation")[first]), atol=1e-5)


def test_loading_again_finds_the_cache(tiny, cache):
    before = folder_of(cache).stat().st_mtime_ns
    assert load_lab(progress=False, recipe=TINY).content_hash == tiny.content_hash
    assert folder_of(cache).stat().st_mtime_ns == before


def test_another_recipe_is_another_folder(cache):
    changed = dataclasses.replace(TINY, codec=dataclasses.replace(SHORT, lr=2e-3))
    assert folder_of(cache, changed) != folder_of(cache)


def test_only_safetensors_and_the_manifest_are_stored(tiny, cache):
    assert {file.suffix for file in folder_of(cache).iterdir()} == {".safetensors", ".json"}


def test_changed_weights_are_noticed(tiny, cache):
    file = folder_of(cache) / "judge.safetensors"
    intact = file.read_bytes()
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, file)
    try:
        with pytest.raises(InputError, match="delete") as error:
            load_lab(progress=False, recipe=TINY)
        assert str(folder_of(cache)) in str(error.value)
    finally:
        file.write_bytes(intact)


def test_teachers_of_other_networks_are_pretrained_once(tiny, cache):
    config = DiT.Config(width=16, depth=1, heads=2, condition_width=16)
    one, other = (build_network(config, tiny, seed) for seed in (1, 2))
    initial = {name: value.clone() for name, value in one.state_dict().items()}
    weights = tiny.teacher_weights(one, network_key(config))
    assert all(torch.equal(initial[name], value) for name, value in one.state_dict().items())
    file = cache / "teachers" / tiny.content_hash[:12] / f"{network_key(config)}.safetensors"
    stamp = file.stat().st_mtime_ns
    again = tiny.teacher_weights(other, network_key(config))
    assert file.stat().st_mtime_ns == stamp
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    other.load_state_dict(again)


def test_a_damaged_teacher_names_its_file(tiny, cache):
    config = DiT.Config(width=16, depth=1, heads=4, condition_width=16)
    network = build_network(config, tiny, 0)
    tiny.teacher_weights(network, network_key(config))
    file = cache / "teachers" / tiny.content_hash[:12] / f"{network_key(config)}.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(InputError, match="delete") as error:
        tiny.teacher_weights(network, network_key(config))
    assert str(file) in str(error.value)
