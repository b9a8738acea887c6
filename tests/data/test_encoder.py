"""A real family end to end: a tiny Qwen-Image pipeline on disk, a folder of pictures, its network on cached rows."""

import json
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.backends.families import tiny as families
from tests.data.tiny import encoded, picture, write_pairs
from tests.rounding import assert_rounded
from twinrl.backends.families import load_family
from twinrl.backends.families.family import FamilyConfig
from twinrl.cli import _console
from twinrl.commands.data import EncodingOptions, load_encoder, prepare_data
from twinrl.config.errors import InputError
from twinrl.data import CachedDataset, PrepareConfig
from twinrl.data.encoder import FamilyEncoder
from twinrl.data.images import decode, pixels
from twinrl.data.prepare import MANIFEST, REPORT
from twinrl.data.verify import verify

SETTINGS = ["buckets.ratios=['1:1', '3:2']", "buckets.area=1024", "buckets.multiple=8", "batch=2", "validation=0"]
CPU = EncodingOptions("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "qwen"
    families.build("qwen_image").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pictures"
    write_pairs(path, [(64, 64), (96, 64), (64, 60), (90, 60)])
    (path / "cut.png").write_bytes(encoded(picture(64, 64))[:100])
    (path / "cut.txt").write_text("cut off")
    return path


def command(path: Path, model: Path | None, to: Path, *settings: str) -> str:
    console = Console(file=StringIO(), width=200)
    assert prepare_data(path, str(model) if model else None, to, [*SETTINGS, *settings], CPU, console) == 0
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
@torch.no_grad()
def test_the_network_sees_the_same_from_the_cache_as_from_the_encoders(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    command(pictures, model, tmp_path)
    config = FamilyConfig(path=str(model))
    family = load_family("qwen_image", config)
    data = CachedDataset(tmp_path, encoder=FamilyEncoder(family).key)
    bucket, rows = data.sampler(2, seed=0).batch(0)
    assert data.latent_shapes[bucket] == family.latent_shape(data.buckets[bucket].height, data.buckets[bucket].width)
    places = {pair.example.name: pair.fit for pair in verify(pictures, _config(), None, lambda *_: None).pairs}
    images = [pixels(decode((pictures / name).read_bytes()), places[name]) for name in data.names(rows)]
    latents = data.latents(rows)
    assert_rounded(latents, family.encode(torch.stack(images)), 1000)
    cached, fresh = data.conditions(rows), family.encode_prompts(data.captions(rows))
    assert cached["text"].shape[1] < fresh["text"].shape[1] == family.TOKENS
    network, t = family.network(config).eval(), torch.tensor([0.7, 0.3])
    assert_rounded(network(latents, t, t, cached), network(latents, t, t, fresh), 500)
    null, empty = data.null_condition(2), family.null_condition(2)
    assert_rounded(network(latents, t, t, null), network(latents, t, t, empty), 500)


def _config() -> PrepareConfig:
    return PrepareConfig.model_validate({"buckets": {"ratios": ["1:1", "3:2"], "area": 1024, "multiple": 8}})


def test_the_command_says_what_it_did(model: Path, pictures: Path, tmp_path: Path) -> None:
    output = command(pictures, model, tmp_path)
    assert "read as format text" in output
    assert "encoded 4 images and 5 prompts that the cache lacked" in output
    assert [line.split() for line in output.splitlines() if line.startswith(("32x32", "all"))] == [
        ["32x32", "2", "0"], ["all", "4", "0"],
    ]  # fmt: skip
    assert "corrupt image     1      cut.png" in output
    assert "no pair fell into the validation split" in output
    assert "encoded 0 images and 0 prompts" in command(pictures, model, tmp_path)
    assert json.loads((tmp_path / MANIFEST).read_text())["encoder"].startswith("qwen_image-float32-")


@pytest.mark.slow
def test_captions_that_a_text_encoder_cuts_are_counted(tmp_path: Path) -> None:
    """Three tokenizers, two that read 16 letters; the libraries' own remarks stay out of sight."""
    families.build("sd3").save_pretrained(tmp_path / "sd3")
    write_pairs(tmp_path / "pictures", [(64, 64)] * 3)
    (tmp_path / "pictures" / "000.txt").write_text("short")
    said = command(tmp_path / "pictures", tmp_path / "sd3", tmp_path / "out")
    for name in ("tokenizer", "tokenizer_2"):
        assert f"2 of these prompts are longer than the 16 tokens of {name}, which sees their beginning" in said
    assert "tokenizer_3" not in said
    assert "are longer" not in command(tmp_path / "pictures", tmp_path / "sd3", tmp_path / "out")  # all cached


def test_without_a_model_the_data_are_verified_alone(pictures: Path, tmp_path: Path) -> None:
    output = command(pictures, None, tmp_path)
    assert "verified only" in output
    assert "cut.png" in output
    assert json.loads((tmp_path / REPORT).read_text())["reason"] == "corrupt image"
    assert not (tmp_path / MANIFEST).exists()


def test_keys_tell_weights_and_precision_apart(model: Path) -> None:
    family = load_family("qwen_image", FamilyConfig(path=str(model)))
    key = FamilyEncoder(family).key
    assert FamilyEncoder(load_family("qwen_image", FamilyConfig(path=str(model)))).key == key
    half = FamilyEncoder(load_family("qwen_image", FamilyConfig(path=str(model), frozen_dtype="bf16"))).key
    assert half.startswith("qwen_image-bfloat16-")
    with torch.no_grad():
        next(family.pipeline.text_encoder.parameters())[0, 0] += 1e-3
    assert FamilyEncoder(family).key != key


def test_another_vocabulary_is_another_encoder(model: Path, tmp_path: Path) -> None:
    family = load_family("qwen_image", FamilyConfig(path=str(model)))
    before = FamilyEncoder(family).key
    family.encode_prompts(["a", "bc"])  # which sets padding and truncation
    assert FamilyEncoder(family).key == before
    family.pipeline.tokenizer.add_tokens(["cat"])
    assert FamilyEncoder(family).key != before


def test_names_are_printed_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "caf\udce9[/b]"  # a byte that is no UTF-8
    write_pairs(folder, [(64, 64)])
    (folder / "odd[").mkdir()
    (folder / "odd[" / "b]:smile:.png").write_bytes(b"")  # its path reads odd[/b]:smile:.png
    monkeypatch.chdir(tmp_path)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # as the command's own output
    assert prepare_data(folder, None, None, SETTINGS, CPU, _console()) == 0
    text = capsys.readouterr().out.replace("\n", "")
    assert r"caf\xe9[/b] read as format text" in text
    assert "odd[/b]:smile:.png" in text
    assert (tmp_path / "prepared" / "b]" / REPORT).is_file()


@pytest.mark.slow
def test_two_folders_never_share_a_target(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for year, name in enumerate(["photos.2023", "photos.2024", "old/photos.2024"]):
        write_pairs(tmp_path / name, [(64, 64)], start=year)
    for name in ["photos.2023", "photos.2024", "photos.2023"]:
        prepare_data(Path(name), str(model), None, SETTINGS, CPU, Console(quiet=True))
    assert {path.parent.name for path in Path("prepared").rglob(MANIFEST)} == {"photos.2023", "photos.2024"}
    with pytest.raises(
        InputError, match=r"photos.2024 holds other data; got those of .*/photos.2024; fix: name another"
    ):
        prepare_data(Path("old/photos.2024"), str(model), None, SETTINGS, CPU, Console(quiet=True))


def test_wrong_models_and_settings_are_one_line(model: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder nowhere"):
        command(pictures, Path("nowhere"), tmp_path)
    with pytest.raises(InputError, match="did you mean buckets"):
        prepare_data(pictures, None, tmp_path, ["bucket.area=3"], CPU, Console())
    with pytest.raises(InputError, match="size does not fit qwen_image"):
        load_encoder(str(model), PrepareConfig.model_validate({"buckets": {"sizes": [[34, 34]], "multiple": 2}}), CPU)
    with pytest.raises(InputError, match="device 'cuda:99' is not available"):
        load_encoder(str(model), _config(), EncodingOptions("cuda:99"))
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(InputError, match="of no known family; got WanPipeline; expected StableDiffusion3Pipeline"):
        load_encoder(str(tmp_path), _config(), CPU)
