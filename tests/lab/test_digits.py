"""The digits: fixed, disjoint, stratified splits; honest evaluation images; captions."""

import pytest
import torch

from twinrl.lab.digits import CLASSES, HELD_OUT_TEMPLATES, SIDE, TEMPLATES, Warp, captions, load_digit_splits

WARP = Warp(variants=2)


@pytest.fixture(scope="module")
def splits():
    return load_digit_splits(WARP)


def originals(splits):
    return splits["train"].pixels[: len(splits["train"]) // (1 + WARP.variants)]


def test_sizes_and_ranges(splits):
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 997 * 3,
        "validation": 300,
        "test": 500,
    }
    for split in splits.values():
        assert split.pixels.shape[1:] == (3, SIDE, SIDE)
        assert split.pixels.dtype == torch.float32
        assert split.pixels.abs().max() <= 1
        assert split.labels.dtype == torch.int64


def test_evaluation_splits_are_balanced(splits):
    assert torch.bincount(splits["test"].labels).tolist() == [50] * 10
    assert torch.bincount(splits["validation"].labels).tolist() == [30] * 10


def test_every_scan_is_in_exactly_one_split(splits):
    """Distances between the splits' real images are those of different scans, and all 1797 are used."""
    images = [originals(splits), splits["validation"].pixels, splits["test"].pixels]
    flat = torch.cat(images)[:, 0].flatten(1)
    assert len(flat) == 1797
    assert len(flat.unique(dim=0)) == 1797


def test_splits_and_variants_are_fixed(splits):
    again = load_digit_splits(WARP)
    for name, split in splits.items():
        assert torch.equal(split.pixels, again[name].pixels)
        assert torch.equal(split.labels, again[name].labels)


def test_variants_stay_close_to_their_original_but_differ(splits):
    real, *variants = splits["train"].pixels.chunk(1 + WARP.variants)
    for variant in variants:
        own = (variant - real).square().mean(dim=(1, 2, 3))
        other = (variant - real.roll(1, dims=0)).square().mean(dim=(1, 2, 3))
        assert own.min() > 0
        assert own.mean() < 0.35 * other.mean()
    assert not torch.equal(variants[0], variants[1])


def test_without_variants_training_images_are_unwarped(splits):
    assert torch.equal(load_digit_splits(Warp(variants=0))["train"].pixels, originals(splits))


def test_captions_name_their_digit_and_depend_on_seed_and_step_alone():
    labels = torch.arange(10).repeat(20)
    texts = captions(labels, seed=3, step=5)
    assert texts == captions(labels, seed=3, step=5)
    assert texts != captions(labels, seed=3, step=6)
    assert texts != captions(labels, seed=4, step=5)
    assert all(CLASSES[label] in text.split() for label, text in zip(labels.tolist(), texts, strict=True))


def test_held_out_captions_come_from_the_held_out_templates_alone():
    labels = torch.full((200,), 7)
    seen = {text.replace("seven", "{}") for text in captions(labels, 0, 0)}
    held_out = {text.replace("seven", "{}") for text in captions(labels, 0, 0, held_out=True)}
    assert seen == set(TEMPLATES)
    assert held_out == set(HELD_OUT_TEMPLATES)
    assert not seen & held_out


def test_held_out_templates_use_known_words_only():
    """They test recombination; a word never seen in training would have an arbitrary embedding."""
    known = {word for template in TEMPLATES for word in template.split()}
    assert {word for template in HELD_OUT_TEMPLATES for word in template.split()} <= known
