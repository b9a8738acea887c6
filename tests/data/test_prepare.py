"""Preparing a folder with real models: what is encoded, what is left out, and what a kill costs."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.data.tiny import TinyEncoder, encoded, picture, quiet, settings, write_pairs
from tests.rounding import assert_rounded
from twinrl.config.errors import InputError
from twinrl.data import CachedDataset, PrepareConfig
from twinrl.data.buckets import Bucket, BucketFit
from twinrl.data.cache import writing
from twinrl.data.captions import Example
from twinrl.data.images import decode, pixels
from twinrl.data.prepare import ENTRIES, MANIFEST, REPORT, Prepared, count_reasons, prepare
from twinrl.data.problems import CORRUPT, EMPTY_CAPTION, NO_BUCKET, NO_CAPTION, NOT_AN_IMAGE, NOT_FINITE, TOO_SMALL
from twinrl.data.verify import Pair, divided, verify
from twinrl.machine.files import unfinished

SIZES = [(64, 64), (90, 60), (60, 90), (64, 60), (40, 60), (96, 64), (64, 80)] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 pairs in three buckets."""
    path = tmp_path_factory.mktemp("data") / "pictures"
    write_pairs(path, SIZES)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The folder, to be changed."""
    shutil.copytree(folder, tmp_path / "pictures")
    return tmp_path / "pictures"


def files(prepared: Path) -> dict[str, bytes]:
    """Everything that preparing left, by name."""
    found = (path for path in prepared.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(prepared).as_posix(): path.read_bytes() for path in found}


def run(folder: Path, to: Path, encoder: TinyEncoder, config: PrepareConfig | None = None) -> Prepared:
    encoder.images = encoder.prompts = 0
    return prepare(folder, encoder, config or settings(), to, quiet)


@pytest.mark.slow
@torch.no_grad()
def test_the_cache_holds_what_the_models_give(folder: Path, tmp_path: Path, encoder: TinyEncoder) -> None:
    result = run(folder, tmp_path / "out", encoder)
    assert (result.encoded_images, result.encoded_prompts) == (28, 29)  # and the empty prompt
    assert (encoder.images, encoder.prompts) == (28, 29)
    seen = 0
    for split in ("train", "validation"):
        data = CachedDataset(tmp_path / "out", split, encoder.key)
        for index, name in enumerate(data.names(range(len(data)))):
            pair = next(pair for pair in result.pairs if pair.example.name == name)
            image = pixels(decode((folder / name).read_bytes()), pair.fit)[None]
            assert_rounded(data.latents([index]), encoder.encode_images(image), 1000)
            caption = (folder / name).with_suffix(".txt").read_text().strip()
            assert data.captions([index]) == [caption]
            alone, cached = encoder.encode_prompts([caption]), data.conditions([index])
            length = alone["mask"].shape[1]
            assert_rounded(cached["text"][:, :length], alone["text"], 200)
            assert torch.equal(cached["mask"].sum(1), alone["mask"].sum(1))
            assert torch.equal(cached["text"][:, length:], torch.zeros_like(cached["text"][:, length:]))
            seen += 1
    assert seen == 28


def test_all_conditions_of_a_data_set_can_be_joined(folder: Path, tmp_path: Path, encoder: TinyEncoder) -> None:
    run(folder, tmp_path / "out", encoder)
    data = CachedDataset(tmp_path / "out")
    some, other, null = data.conditions([0, 1, 2]), data.conditions([3]), data.null_condition(2)
    assert {name: value.shape[1:] for name, value in some.items()} == {
        name: value.shape[1:] for name, value in other.items()
    }
    assert torch.cat([some["text"], other["text"], null["text"]]).shape[0] == 6
    assert null["mask"].sum(1).tolist() == [1, 1]  # the end-of-text token alone
    longest = max(len((folder / name).with_suffix(".txt").read_text().strip()) for name in data.names(range(len(data))))
    assert some["mask"].shape[1] >= longest + 1


def test_training_reads_batches_of_one_shape(folder: Path, tmp_path: Path, encoder: TinyEncoder) -> None:
    run(folder, tmp_path / "out", encoder)
    data = CachedDataset(tmp_path / "out")
    assert sum(data.lengths.values()) == len(data)
    sampler = data.sampler(batch=4, seed=3)
    shapes = set()
    for step in range(12):
        bucket, rows = sampler.batch(step)
        latents = data.latents(rows)
        assert latents.shape == (len(rows), *data.latent_shapes[bucket])
        assert latents.shape[-2:] == (data.buckets[bucket].height // 2, data.buckets[bucket].width // 2)
        shapes.add(latents.shape)
    assert len(shapes) == 3


def test_again_encodes_nothing(folder: Path, tmp_path: Path, encoder: TinyEncoder) -> None:
    run(folder, tmp_path / "out", encoder)
    before = files(tmp_path / "out")
    result = run(folder, tmp_path / "out", encoder)
    assert (encoder.images, encoder.prompts, result.encoded_images) == (0, 0, 0)
    assert files(tmp_path / "out") == before


@pytest.mark.slow
def test_only_what_changed_is_encoded(copy: Path, tmp_path: Path, encoder: TinyEncoder) -> None:
    run(copy, tmp_path / "out", encoder)
    (copy / "003.txt").write_text("another caption")
    run(copy, tmp_path / "out", encoder)
    assert (encoder.images, encoder.prompts) == (0, 1)
    (copy / "004.png").rename(copy / "renamed.png")
    (copy / "004.txt").rename(copy / "renamed.txt")
    shutil.copy(copy / "005.png", copy / "twin.png")
    shutil.copy(copy / "005.txt", copy / "twin.txt")
    result = run(copy, tmp_path / "out", encoder)
    assert (encoder.images, encoder.prompts, len(result.pairs)) == (0, 0, 29)
    write_pairs(copy, [(70, 64)], start=100)
    run(copy, tmp_path / "out", encoder)
    assert (encoder.images, encoder.prompts) == (1, 1)
    # the square images that are not square already lose another part
    off_centre = {"crop": "centre_weighted"} | settings().buckets.model_dump(exclude={"crop", "sizes"})
    result = run(copy, tmp_path / "out", encoder, settings(buckets=off_centre))
    assert encoder.prompts == 0
    assert 0 < encoder.images == len({p.latent for p in result.pairs if p.fit.box[0] % 1 or p.fit.box[1] % 1})
    encoder.key = "other weights"
    run(copy, tmp_path / "out", encoder)
    assert (encoder.images, encoder.prompts) == (29, 30)


def test_the_split_survives_added_files_and_new_captions(copy: Path, tmp_path: Path, encoder: TinyEncoder) -> None:
    def splits() -> dict[str, str]:
        return {pair.example.name: pair.split for pair in verify(copy, settings(validation=0.3), None, quiet).pairs}

    before = splits()
    assert set(before.values()) == {"train", "validation"}
    write_pairs(copy, SIZES, start=200)
    (copy / "001.txt").write_text("changed")
    after = splits()
    assert len(after) == 2 * len(before)
    assert {name: after[name] for name in before} == before


def test_every_bucket_of_some_images_has_one_for_validation() -> None:
    """At 10 %, buckets of five and more; copies stay on one side, and nothing else moves."""
    small, large, few = Bucket(32, 32), Bucket(64, 32), Bucket(32, 64)
    places = {small: [0.5, 0.9, 0.4, 0.4, 0.8, 0.7], large: [0.05, 0.3, 0.09, 0.2, 0.6], few: [0.11, 0.2]}
    example, box = Example("a", "a", None), (0.0, 0.0, 1.0, 1.0)
    pairs = [
        Pair(example, "key", "text", BucketFit(bucket, box), place)
        for bucket, found in places.items()
        for place in found
    ]
    chosen = [(pair.fit.bucket, pair.place) for pair in divided(pairs, 0.1) if pair.split == "validation"]
    assert chosen == [(small, 0.4), (small, 0.4), (large, 0.05), (large, 0.09)]
    assert all(pair.split == "train" for pair in divided(pairs, 0))


@pytest.mark.slow
def test_names_and_the_order_of_ratios_decide_nothing(copy: Path, tmp_path: Path, encoder: TinyEncoder) -> None:
    run(copy, tmp_path / "a", encoder)
    for number, path in enumerate(sorted(copy.glob("*.png"))):
        for suffix in (".png", ".txt"):
            path.with_suffix(suffix).rename(copy / f"{(7 * number) % 29} other name{suffix}")
    ratios = settings().buckets.model_dump(exclude={"sizes"}) | {"ratios": ["2:3", "1:1", "3:2"]}
    run(copy, tmp_path / "b", encoder, settings(buckets=ratios))
    a, b = CachedDataset(tmp_path / "a"), CachedDataset(tmp_path / "b")
    assert a.content_hash == b.content_hash
    assert a.names(range(len(a))) != b.names(range(len(b)))
    for step in range(6):
        one, other = a.sampler(4, seed=0).batch(step), b.sampler(4, seed=0).batch(step)
        assert one.bucket == other.bucket
        assert_rounded(a.latents(one.rows), b.latents(other.rows), 1000)
        assert a.captions(one.rows) == b.captions(other.rows)


FLAWS = {
    "cut.png": CORRUPT, "cut.jpg": CORRUPT, "text.png": CORRUPT, "notes.pdf": NOT_AN_IMAGE, "small.png": TOO_SMALL,
    "panorama.png": NO_BUCKET, "silent.png": EMPTY_CAPTION, "alone.png": NO_CAPTION,
}  # fmt: skip
ODD = ("gray.png", "deep.png", "clear.png", "turned.jpg")


def add_odd_and_flawed(folder: Path) -> None:
    good = picture(64, 64, 1000)
    turned = Image.Exif()
    turned[0x0112] = 6
    data = {
        "cut.png": encoded(good)[:300], "cut.jpg": encoded(good, "JPEG")[:-200], "text.png": b"no image at all",
        "notes.pdf": b"%PDF", "small.png": encoded(picture(20, 20)), "panorama.png": encoded(picture(400, 60)),
        "silent.png": encoded(good), "alone.png": encoded(good), "gray.png": encoded(good.convert("L")),
        "deep.png": encoded(good.convert("L").convert("I").point(lambda v: v * 257).convert("I;16")),
        "clear.png": encoded(good.convert("RGBA")), "turned.jpg": encoded(picture(90, 60), "JPEG", exif=turned),
    }  # fmt: skip
    for name, content in data.items():
        (folder / name).write_bytes(content)
        if name not in ("notes.pdf", "alone.png"):
            (folder / name).with_suffix(".txt").write_text("" if name == "silent.png" else f"the odd {name}")


def test_every_flaw_is_counted_and_reported(copy: Path, tmp_path: Path, encoder: TinyEncoder) -> None:
    add_odd_and_flawed(copy)
    (copy / "cut.txt").write_text("shared by both")
    strict = settings(buckets=settings().buckets.model_dump(exclude={"sizes", "outside"}) | {"outside": "skip"})
    result = run(copy, tmp_path / "out", encoder, strict)
    report = [json.loads(line) for line in (tmp_path / "out" / REPORT).read_text().splitlines()]
    assert {row["name"]: row["reason"] for row in report if row["name"] in FLAWS} == FLAWS
    assert all(row["detail"] for row in report if row["reason"] in (CORRUPT, TOO_SMALL, NO_BUCKET))
    assert sum(count_reasons(result.problems).values()) == len(report)
    used = {pair.example.name: pair.fit.bucket.name for pair in result.pairs}
    assert set(ODD) < set(used)
    assert used["turned.jpg"] == "24x40"  # 90 × 60 on its side
    assert len(used) + len(report) == 28 + len(FLAWS) + len(ODD)


def test_prompts_need_no_images(tmp_path: Path, encoder: TinyEncoder) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"prompt number {i}\n" for i in range(30)) + "\n")
    result = run(tmp_path / "prompts.txt", tmp_path / "out", encoder)
    assert (result.encoded_images, result.encoded_prompts) == (0, 31)
    assert count_reasons(result.problems) == {EMPTY_CAPTION: 1}
    data = CachedDataset(tmp_path / "out")
    assert not data.has_images
    assert data.latent_shapes == {"32x32": (4, 16, 16), "40x24": (4, 12, 20), "24x40": (4, 20, 12)}
    bucket, rows = data.sampler(4, seed=0).batch(0)
    assert set(rows.tolist()) <= set(data.members[bucket].tolist())
    assert data.conditions(rows)["text"].shape[0] == len(rows)


def test_non_finite_encodings_are_left_out_and_counted(
    copy: Path, tmp_path: Path, encoder: TinyEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(copy / "000.png", copy / "twin.png")
    (copy / "twin.txt").write_text("the twin")
    truth, bad = encoder.encode_images, decode((copy / "000.png").read_bytes())
    first = pixels(bad, next(p for p in verify(copy, settings(), None, quiet).pairs if p.example.name == "000.png").fit)

    def overflow(batch: torch.Tensor) -> torch.Tensor:
        latents = truth(batch).clone()
        latents[[bool(torch.equal(row, first)) for row in batch], 0, 0, 0] = torch.inf
        return latents

    monkeypatch.setattr(encoder, "encode_images", overflow)
    result = run(copy, tmp_path / "out", encoder)
    assert {p.name for p in result.problems} == {"000.png", "twin.png"}
    assert count_reasons(result.problems) == {NOT_FINITE: 2}
    assert len(result.pairs) == 27
    for split in ("train", "validation"):
        data = CachedDataset(tmp_path / "out", split)
        assert all(bool(data.latents([i]).isfinite().all()) for i in range(len(data)))


def test_files_that_change_or_vanish_meanwhile_are_counted(copy: Path, tmp_path: Path, encoder: TinyEncoder) -> None:
    def meddle(stage: str, done: int, total: int | None) -> None:
        if (stage, done) == ("verify", len(SIZES)):
            (copy / "003.png").write_bytes(encoded(picture(64, 60, seed=99)))
            (copy / "005.png").unlink()

    result = prepare(copy, encoder, settings(), tmp_path / "out", meddle)
    assert {problem.name: problem.detail for problem in result.problems} == {
        "003.png": "the file changed while the data were prepared",
        "005.png": "No such file or directory",
    }
    assert len(result.pairs) == encoder.images == len(SIZES) - 2


class Interrupted(BaseException):
    """What a signal handler might raise."""


@pytest.mark.slow
def test_interruption_at_any_call_loses_one_shard_and_changes_nothing(
    folder: Path, tmp_path: Path, encoder: TinyEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, tmp_path / "undisturbed", encoder)
    truth = {name: getattr(encoder, name) for name in ("encode_images", "encode_prompts")}
    left = -1

    def counted(name: str, batch: object) -> object:
        nonlocal left
        left -= 1
        if left < 0:
            raise Interrupted
        return truth[name](batch)

    for name in truth:
        monkeypatch.setattr(encoder, name, lambda batch, name=name: counted(name, batch))
    tries = 0
    while tries < 60:
        left, tries = 3, tries + 1  # a shard takes two calls: each try completes one
        try:
            run(folder, tmp_path / "out", encoder)
            break
        except Interrupted:
            for shards in (tmp_path / "out").glob("encoder-*/*"):  # as a kill while writing leaves it
                number = len(list(shards.glob("shard-*.safetensors")))
                unfinished(shards / f"shard-{number:06}.safetensors").write_text("half a shard")
            with pytest.raises(InputError, match="not a complete prepared folder"):
                CachedDataset(tmp_path / "out")
    assert 10 < tries < 60
    clean = {name: data for name, data in files(tmp_path / "out").items() if ".new." not in name}
    assert clean == files(tmp_path / "undisturbed")


SCRIPT = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.data.tiny import TinyEncoder, quiet, settings
from twinrl.data import prepare

class Slow(TinyEncoder):
    def encode_images(self, pixels):
        if self.images == 14:  # three shards of 4, and half of the next
            Path(sys.argv[3]).touch()
            time.sleep(600)
        return super().encode_images(pixels)

prepare(Path(sys.argv[1]), Slow(), settings(), Path(sys.argv[2]), quiet)
"""


@pytest.mark.slow
def test_a_killed_process_and_a_second_one_equal_an_undisturbed_one(
    folder: Path, tmp_path: Path, encoder: TinyEncoder
) -> None:
    run(folder, tmp_path / "undisturbed", encoder)
    out, reached = tmp_path / "out", tmp_path / "reached"
    command, root = [sys.executable, "-c", SCRIPT, str(folder), str(out), str(reached)], Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not reached.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert reached.exists()
    assert len(list(out.rglob("latents/shard-*.safetensors"))) == 3
    run(folder, out, encoder)
    assert encoder.images == 28 - 3 * 4
    assert files(out) == files(tmp_path / "undisturbed")


def test_wrong_input_is_one_line(folder: Path, tmp_path: Path, encoder: TinyEncoder) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_text("no image")
    (tmp_path / "bad" / "x.txt").write_text("caption")
    with pytest.raises(InputError, match="nothing to train on; got 1 × corrupt image; fix: see"):
        run(tmp_path / "bad", tmp_path / "out", encoder)
    with pytest.raises(InputError, match="no file or folder"):
        run(tmp_path / "nowhere", tmp_path / "out", encoder)
    with pytest.raises(InputError, match="would lie inside the data; fix: choose another with --to"):
        run(folder, folder / "out", encoder)
    with writing(tmp_path / "out"), pytest.raises(InputError, match="another process prepares"):
        run(folder, tmp_path / "out", encoder)


def test_a_damaged_or_foreign_cache_is_one_line(folder: Path, tmp_path: Path, encoder: TinyEncoder) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="not a complete prepared folder"):
        CachedDataset(tmp_path)
    run(folder, out, encoder)
    with pytest.raises(InputError, match="prepared with another encoder; got tiny-0; expected sdxl"):
        CachedDataset(out, encoder="sdxl")
    shard = next(iter(sorted(out.rglob("latents/shard-*.safetensors"))))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(InputError, match=r"shard-000000\.safetensors is damaged.*fix: delete it"):
        CachedDataset(out)
    shard.unlink()
    with pytest.raises(InputError, match="is not in the cache; fix: run `twinrl data prepare"):
        CachedDataset(out)
    run(folder, out, encoder)
    assert encoder.images == 4
    entries = (out / ENTRIES).read_text().splitlines(keepends=True)
    manifest = json.loads((out / MANIFEST).read_text())
    assert len(CachedDataset(out)) > 0
    (out / ENTRIES).write_text("".join(entries[1:]))
    with pytest.raises(InputError, match=r"entries\.jsonl and manifest\.json of two different runs"):
        CachedDataset(out)
    (out / ENTRIES).write_text('{"name": "x"}\n')
    with pytest.raises(InputError, match=r"entries\.jsonl, line 1, is damaged; got bucket"):
        CachedDataset(out)
    for content, said in (("[]", "object"), (json.dumps(manifest | {"format": 9}), "format"), ("{", "JSON")):
        (out / MANIFEST).write_text(content)
        with pytest.raises(InputError, match=rf"manifest\.json is damaged; got .*{said}"):
            CachedDataset(out)
    huge = {"lengths": {"text": 10**15}, "buckets": [manifest["buckets"][0] | {"width": 10**15}]}
    for key, value in huge.items():
        (out / MANIFEST).write_text(json.dumps(manifest | {key: value}))
        with pytest.raises(InputError, match=rf"manifest\.json is damaged; got {key}.*less than or equal"):
            CachedDataset(out)
    for key in ("encoder", "content_hash", "images", "lengths", "buckets"):
        (out / MANIFEST).write_text(json.dumps(manifest | {key: [{"a": 1}]}))
        with pytest.raises(InputError, match=rf"manifest\.json is damaged; got {key}"):
            CachedDataset(out)
