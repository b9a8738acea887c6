"""MNIST: the files (good, damaged, missing), the splits, prompts, and the judge on the real digits."""

import gzip
import hashlib
import logging
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from twinrl.backends import build_network, network_key
from twinrl.backends.unet import UNet
from twinrl.config.errors import InputError
from twinrl.flow.source import Source
from twinrl.lab import mnist, mnist_files
from twinrl.lab.fitting import Recipe
from twinrl.lab.mnist import MNISTSource, parse_label
from twinrl.lab.mnist_files import read_idx, read_splits
from twinrl.lab.pretrain import Pretraining

REAL = Path(os.environ.get("TWINRL_MNIST_ROOT", "nowhere"))
needs_real_digits = pytest.mark.skipif(
    not (REAL / "MNIST").is_dir(), reason="set TWINRL_MNIST_ROOT to a folder with MNIST/raw"
)


def idx(array):
    """An array of bytes as an idx file."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def digits(n, seed=0):
    """n random images and the labels 0, 1, … 9, 0, …"""
    images = np.random.default_rng(seed).integers(0, 256, (n, 28, 28), dtype=np.uint8)
    return images, (np.arange(n) % 10).astype(np.uint8)


def write(root, part, n, packed=True, seed=0):
    """The two files of ``part`` under ``root`` in torchvision's layout."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(("images-idx3", "labels-idx1"), digits(n, seed), strict=True):
        path = folder / f"{part}-{name}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return folder


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(mnist_files, "MIRRORS", ("http://127.0.0.1:9/", "http://localhost:9/"))


def hurry(patch, cache):
    """An empty cache, and a judge and teacher that are hardly trained."""
    patch.setenv("TWINRL_CACHE", str(cache))
    patch.setattr(mnist, "JUDGE_RECIPE", Recipe(steps=3, batch=10, lr=1e-3, seed=0))
    patch.setattr(mnist, "CLASSIFIER_RECIPE", Recipe(steps=3, batch=10, lr=1e-3, seed=1))
    patch.setattr(mnist, "TEACHER_RECIPE", Pretraining(steps=2, batch=4))


@pytest.fixture
def quick(monkeypatch, tmp_path):
    hurry(monkeypatch, tmp_path / "cache")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """For tests that only read it."""
    folder = tmp_path_factory.mktemp("mnist")
    write(folder, "t10k", 100)
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch, folder / "cache")
        return MNISTSource(folder)


@pytest.fixture
def fresh_source(quick, tmp_path):
    """Built in the test's own cache."""
    write(tmp_path / "data", "t10k", 100)
    return MNISTSource(tmp_path / "data")


# --- files


@pytest.mark.parametrize("shape", [(5,), (3, 28, 28), (0, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_round_trip(tmp_path, shape, pack):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / "file"
    path.write_bytes(pack(idx(array)))
    np.testing.assert_array_equal(read_idx(path), array)


@pytest.mark.parametrize("kept", [0, 2, 3, 4, 9, 15, 16, 100])
def test_truncated_file_is_named_with_both_lengths(tmp_path, kept):
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(idx(digits(2)[0])[:kept])
    with pytest.raises(InputError, match=rf"images-idx3-ubyte is truncated; got {kept} bytes.*expected \d+ bytes"):
        read_idx(path)


def test_truncated_gzip_tells_how_much_came_out(tmp_path):
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = gzip.compress(idx(digits(50)[0]))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="truncated") as caught:
        read_idx(path)
    got = int(str(caught.value).split("got ")[1].split()[0])
    assert 10_000 < got < 16 + 50 * 784
    assert f"expected {16 + 50 * 784} bytes" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>", "is no idx file.*<!DO"),
        (idx(digits(2)[1]).replace(b"\x08", b"\x0d", 1), "is no idx file"),
        (idx(digits(2)[1]) + b"x", "is longer than its header says; got 11 bytes.*expected 10 bytes"),
        (b"\x1f\x8b\x08" + bytes(50) + b"garbage", "cannot read"),
    ],
)
def test_foreign_file_is_named(tmp_path, content, message):
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"train-labels-idx1-ubyte {message}|{message}.*train-labels") as caught:
        read_idx(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("labels-idx1", digits(9)[1], "does not belong to.*t10k-images.*got 9 labels; expected 10"),
        ("labels-idx1", np.full(10, 10, np.uint8), "no digit labels; got label 10; expected 0 to 9"),
        ("labels-idx1", digits(10)[0], "does not belong to"),
        ("images-idx3", np.zeros((10, 32, 32), np.uint8), r"no MNIST digits; got an array \(10, 32, 32\)"),
        ("images-idx3", np.zeros((0, 28, 28), np.uint8), "no MNIST digits"),
    ],
)
def test_files_that_do_not_fit_together(tmp_path, name, array, message):
    folder = write(tmp_path, "t10k", 10, packed=False)
    (folder / f"t10k-{name}-ubyte").write_bytes(idx(array))
    with pytest.raises(InputError, match=message):
        read_splits(tmp_path)


def test_missing_offline_says_where_it_looked_and_what_to_do(tmp_path, offline):
    with pytest.raises(InputError) as caught:
        read_splits(tmp_path / "nowhere")
    message = str(caught.value)
    for part in ("train-images-idx3-ubyte[.gz]", "nowhere/MNIST/raw", "127.0.0.1", "data.root", "fix:"):
        assert part in message
    assert "\n" not in message


def test_half_a_training_set_is_not_taken_for_the_small_one(tmp_path, offline):
    folder = write(tmp_path, "t10k", 10)
    write(tmp_path, "train", 10)
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"train-labels-idx1-ubyte\[.gz\] is neither in"):
        read_splits(tmp_path)


def test_missing_files_are_downloaded_and_checked(tmp_path, monkeypatch):
    mirror = write(tmp_path / "mirror", "t10k", 20)
    write(tmp_path / "mirror", "train", 120, seed=1)
    monkeypatch.setattr(mnist_files, "MIRRORS", ("http://127.0.0.1:9/", f"{mirror.as_uri()}/"))
    known = {p.name.removesuffix(".gz"): hashlib.md5(p.read_bytes()).hexdigest() for p in mirror.iterdir()}
    monkeypatch.setattr(mnist_files, "MD5", known)
    train, validation, test = read_splits(tmp_path / "new")
    assert (len(train), len(validation), len(test)) == (110, 10, 20)
    assert sorted(p.name for p in (tmp_path / "new/MNIST/raw").glob("[!.]*")) == sorted(f"{n}.gz" for n in known)


def test_download_with_another_checksum_is_refused(tmp_path, monkeypatch):
    mirror = write(tmp_path / "mirror", "train", 10)
    monkeypatch.setattr(mnist_files, "MIRRORS", (f"{mirror.as_uri()}/",))
    with pytest.raises(InputError, match="md5"):
        read_splits(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_unwritable_folder_is_named(tmp_path, monkeypatch):
    mirror = write(tmp_path / "mirror", "train", 10)
    images = mirror / "train-images-idx3-ubyte.gz"
    monkeypatch.setattr(mnist_files, "MIRRORS", (f"{mirror.as_uri()}/",))
    monkeypatch.setitem(mnist_files.MD5, images.stem, hashlib.md5(images.read_bytes()).hexdigest())
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written.*data.root.*writable"):
        read_splits(tmp_path / "file")


# --- splits


def test_pixels_and_labels_are_those_of_the_files(tmp_path):
    write(tmp_path, "train", 24, packed=False)
    write(tmp_path, "t10k", 10, seed=1)
    test = read_splits(tmp_path)[2]
    images, labels = digits(10, seed=1)
    assert test.pixels.dtype == torch.float32
    assert test.pixels.shape == (10, 1, 28, 28)
    torch.testing.assert_close((test.pixels[:, 0] + 1) * 127.5, torch.from_numpy(images).float())
    assert test.labels.tolist() == labels.tolist()
    assert test.pixels.min() == -1
    assert test.pixels.max() == 1


def test_small_set_is_cut_stratified_disjoint_and_announced(tmp_path, caplog):
    write(tmp_path, "t10k", 1000)
    with caplog.at_level(logging.WARNING):
        splits = read_splits(tmp_path)
    assert "only the 10,000 t10k digits" in caplog.text
    assert [len(split) for split in splits] == [800, 100, 100]
    for split in splits:
        counts = split.labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 1
    rows = torch.cat([split.pixels for split in splits]).flatten(1)
    assert len(rows.unique(dim=0)) == 1000


def test_files_directly_under_the_root_are_found(tmp_path):
    folder = write(tmp_path, "t10k", 20)
    assert [len(split) for split in read_splits(folder)] == [16, 2, 2]


def test_cut_is_the_same_every_time(tmp_path):
    write(tmp_path, "t10k", 100)
    for first, second in zip(read_splits(tmp_path), read_splits(tmp_path), strict=True):
        assert torch.equal(first.pixels, second.pixels)


# --- source


def test_prompts_say_their_label_and_are_parsed_back(source: Source):
    labels = torch.arange(10).repeat(5)
    for held_out in (False, True):
        prompts = source.prompts(labels, seed=0, step=3, held_out=held_out)
        assert torch.equal(source.condition(prompts)["label"], labels)
    assert source.prompts(labels, 0, 1) != source.prompts(labels, 0, 2)


@pytest.mark.parametrize(
    ("prompt", "label"), [("a handwritten three", 3), ("A Handwritten THREE.", 3), ("7", 7), ("digit 0", 0)]
)
def test_prompts_of_users_are_understood(prompt, label):
    assert parse_label(prompt) == label


@pytest.mark.parametrize("prompt", ["a cat", "three or four", "10", "someone", "freighter"])
def test_unknown_prompt_lists_what_is_understood(source, prompt):
    with pytest.raises(InputError, match=r"zero, one, two, three.*a handwritten three"):
        source.condition([prompt])


def test_empty_prompt_is_the_null_condition(source):
    assert source.condition(["", " "])["label"].tolist() == source.null_condition(2)["label"].tolist() == [10, 10]


def test_latents_are_the_pixels(source):
    assert torch.equal(source.latents("validation"), source.validation.pixels)
    assert torch.equal(source.decode(source.encode(source.test.pixels)), source.test.pixels)
    assert source.latents("train").shape[1:] == source.latent_shape


def test_content_hash_follows_pixels_labels_and_judge(quick, tmp_path, monkeypatch):
    write(tmp_path / "a", "t10k", 100)
    folder = write(tmp_path / "b", "t10k", 100)
    first = MNISTSource(tmp_path / "a").content_hash
    assert MNISTSource(tmp_path / "b").content_hash == first
    labels = np.roll(digits(100)[1], 1)
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    assert MNISTSource(tmp_path / "b").content_hash != first
    monkeypatch.setattr(mnist, "JUDGE_RECIPE", Recipe(steps=4, batch=10, lr=1e-3, seed=0))
    assert MNISTSource(tmp_path / "a").content_hash != first


def test_judge_is_cached_and_rebuilt_alike(fresh_source, tmp_path):
    source = fresh_source
    paths = list((tmp_path / "cache").glob("mnist-judge-*.safetensors"))  # the judge's and the classifier's
    written = [path.stat().st_mtime_ns for path in paths]
    again = MNISTSource(tmp_path / "data")
    assert len(paths) == 2
    assert [path.stat().st_mtime_ns for path in paths] == written
    for path in paths:
        path.unlink()
    torch.manual_seed(123)
    rebuilt = MNISTSource(tmp_path / "data")
    x = source.test.pixels
    assert torch.equal(source.judge.logits(x), again.judge.logits(x))
    assert torch.equal(source.judge.logits(x), rebuilt.judge.logits(x))


def test_judge_is_frozen_and_differentiable_in_pixels(source):
    pixels = source.test.pixels.clone().requires_grad_()
    assert source.judge.features(pixels).shape == (10, 64)
    source.scorers["judge_logprob"](pixels, ["a three"] * 10).sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in source.judge.parameters())


def test_scorers_read_the_prompt_and_the_judge_is_held_out(source):
    assert set(source.scorers) == {"judge_logprob", "classifier_logprob"}
    assert source.held_out == {"judge_logprob"}
    pixels, prompts = source.test.pixels[:2], ["a handwritten two", "the digit 9"]
    expected = source.judge.logits(pixels).log_softmax(1)[[0, 1], [2, 9]]
    torch.testing.assert_close(source.scorers["judge_logprob"](pixels, prompts), expected)
    assert not torch.allclose(source.scorers["classifier_logprob"](pixels, prompts), expected)


def test_teacher_is_pretrained_once_and_fits_the_network(fresh_source, tmp_path):
    source = fresh_source
    config = UNet.Config(width=8, condition_width=16)
    network = build_network(config, source, seed=0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = source.teacher_weights(network, network_key(config))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert any(not torch.equal(before[name], value) for name, value in state.items())
    network.load_state_dict(state)
    assert len(list((tmp_path / "cache").rglob("teachers/mnist-*/unet-*.safetensors"))) == 1


def test_building_leaves_the_random_state_alone(quick, tmp_path):
    write(tmp_path, "t10k", 100)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    MNISTSource(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def assert_judges(source, least):
    """Judge and scorer tell new digits: share of the test split, and of the validation split, that is right."""
    for split in (source.validation, source.test):
        assert (source.judge.logits(split.pixels).argmax(1) == split.labels).float().mean() >= least
    for scores in source.scorers.values():
        right = scores(source.test.pixels, source.prompts(source.test.labels, 0, 0))
        wrong = scores(source.test.pixels, source.prompts((source.test.labels + 1) % 10, 0, 0))
        assert (right > wrong).float().mean() >= least


@pytest.mark.slow
def test_judge_learns_what_it_is_shown(tmp_path, monkeypatch):
    """Ten patterns of blocks in noise, instead of digits, in few steps."""
    monkeypatch.setenv("TWINRL_CACHE", str(tmp_path / "cache"))
    for recipe, seed in (("JUDGE_RECIPE", 0), ("CLASSIFIER_RECIPE", 1)):
        monkeypatch.setattr(mnist, recipe, Recipe(steps=60, batch=40, lr=4e-3, seed=seed))
    drawn, labels = np.random.default_rng(0), (np.arange(600) % 10).astype(np.uint8)
    patterns = np.kron(drawn.integers(0, 2, (10, 4, 4)), np.ones((7, 7)))
    images = (200 * patterns[labels] + drawn.integers(0, 56, (600, 28, 28))).astype(np.uint8)
    folder = write(tmp_path / "data", "t10k", 10, packed=False)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        (folder / f"t10k-{name}-ubyte").write_bytes(idx(array))
    assert_judges(MNISTSource(tmp_path / "data"), 0.9)


@needs_real_digits
@pytest.mark.campaign
def test_judge_of_the_real_digits_is_accurate(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINRL_CACHE", str(tmp_path))
    assert_judges(MNISTSource(REAL), 0.98)


@needs_real_digits
def test_real_digits_are_read_and_cut():
    splits = read_splits(REAL)
    assert [len(split) for split in splits] in ([8000, 1000, 1000], [55000, 5000, 10000])
    mean = torch.cat([split.pixels for split in splits]).double().mean()
    assert mean == pytest.approx(2 * 0.1310 - 1, abs=5e-3)  # the published mean of MNIST's pixels is 0.1307
