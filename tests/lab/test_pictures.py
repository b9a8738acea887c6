"""A laboratory of one's own pictures: what is built, found again, refused, and gone on with after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.lab import made
from tests.lab.made import TINY
from tests.rounding import assert_rounded
from twinrl.config.errors import InputError
from twinrl.evaluation import EvaluationConfig, LabelProtocol
from twinrl.flow.reading import InMemory
from twinrl.lab import open_lab
from twinrl.lab.build import MANIFEST
from twinrl.lab.clip import WordTokenizer, words_of
from twinrl.lab.load import build_lab, folder_of, network_of
from twinrl.lab.pictures import LEAST, OTHER, classes_of, split_rows
from twinrl.lab.progress import watched_by
from twinrl.lab.recipe import LabRecipe, for_pictures
from twinrl.training import schema


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Pictures, a cache of their own, and a laboratory called ``made``."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWINRL_CACHE", str(folder / "cache"))
        made.write(folder / "pictures")
        assert build_lab(folder_of("made"), made.material(folder / "pictures"), TINY, {}, progress=False)
        yield folder


@pytest.fixture(scope="module")
def own(home):
    return open_lab("made")


def test_it_has_what_the_digits_have(own):
    assert own.name == "made"
    assert own.classes == ("circle", "letter", "square")
    assert own.latent_shape == (4, 8, 8) == tuple(own.latents("test").shape[1:])
    assert set(own.scorers) == {"lab_clip", "lab_hps", "lab_judge"}
    assert own.held_out == {"lab_judge"}
    assert [len(split) for split in (own.train, own.validation, own.test)] == [180, 30, 30]


def test_every_picture_is_in_one_split_with_its_caption_and_class(own):
    known = {made.drawn(number)[1:] for number in range(240)}
    splits = (own.train, own.validation, own.test)
    assert len(torch.cat([split.pixels for split in splits]).flatten(1).unique(dim=0)) == 240
    for split in splits:
        assert split.pixels.abs().max() <= 1
        assert {(c, own.classes[k]) for c, k in zip(split.captions, split.labels.tolist(), strict=True)} <= known


def test_latents_are_the_encoded_pixels(own):
    with torch.no_grad():
        encoded = own.encode(own.test.pixels[:8])
    layers = [m for m in own.models.codec.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert_rounded(encoded, own.latents("test")[:8], roundings=sum(m.weight[0].numel() for m in layers))


def test_prompts_of_a_class_are_captions_of_its_training_pictures(own):
    labels = torch.arange(3).repeat(40)
    prompts = own.prompts(labels, 1, 2)
    assert prompts == own.prompts(labels, 1, 2) != own.prompts(labels, 1, 3)
    by_class = zip(own.train.captions, own.train.labels.tolist(), strict=True)
    assert set(zip(prompts, labels.tolist(), strict=True)) <= set(by_class)


def test_training_and_validation_ask_for_a_picture_by_its_own_caption(own):
    reader, rows = InMemory.of(own, "train", torch.device("cpu"), torch.float32), torch.tensor([5, 0, 7])
    prompts, condition = reader.captioned(rows, 0, 0)
    assert prompts == [own.train.captions[row] for row in (5, 0, 7)]
    assert torch.equal(condition["text"], own.condition(prompts)["text"])
    protocol = LabelProtocol(own, EvaluationConfig(n=20, velocity_rows=5), "test")
    assert protocol.prompts == [own.test.captions[row] for row in protocol.rows.tolist()]
    assert torch.equal(protocol.images.pixels, own.test.pixels[protocol.rows])


def test_the_same_build_is_found_again_and_another_one_refused(home):
    content = made.material(home / "pictures")
    assert not build_lab(folder_of("made"), content, TINY, {}, progress=False)
    with pytest.raises(InputError, match="holds another laboratory"):
        build_lab(folder_of("made"), made.material(home / "pictures", label=None), TINY, {}, progress=False)


def test_what_another_process_has_built_meanwhile_is_checked(home, tmp_path, monkeypatch):
    monkeypatch.setattr("twinrl.lab.load.publish", lambda path, write: shutil.copytree(folder_of("made"), path))
    with pytest.raises(InputError, match="holds another laboratory"):
        build_lab(tmp_path / "lab", made.material(home / "pictures", label=None), TINY, {}, progress=False)
    assert build_lab(tmp_path / "same", made.material(home / "pictures"), TINY, {}, progress=False)


def test_renamed_files_are_the_same_content(home, tmp_path):
    lines = [json.loads(line) for line in (home / "pictures/metadata.jsonl").read_text().splitlines()]
    for line in lines:
        shutil.copy(home / "pictures" / line["file_name"], tmp_path / f"x{line['file_name']}")
        line["file_name"] = f"x{line['file_name']}"
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, reversed(lines))))
    assert not build_lab(folder_of("made"), made.material(tmp_path), TINY, {}, progress=False)


class Killed(Exception):  # noqa: N818
    """Stands for a kill: what was not written is lost."""


@pytest.mark.slow
@pytest.mark.parametrize("label", ["shape", None])
def test_a_build_that_was_killed_goes_on_to_the_same_content(home, tmp_path, label):
    content, place = made.material(home / "pictures", label), tmp_path / "lab"
    build_lab(tmp_path / "whole", content, TINY, {}, progress=False)
    for after in (3, 5, 9):
        ticks = iter(range(after))

        def told(what: str, share: float, ticks=ticks) -> None:
            if next(ticks, None) is None:
                raise Killed

        with watched_by(told), pytest.raises(Killed):
            build_lab(place, content, TINY, {}, seconds=0.0)
        assert not place.exists()
        assert list(tmp_path.glob(".lab.*.parts/*.safetensors"))
    build_lab(place, content, TINY, {}, progress=False)
    assert open_lab(str(place)).content_hash == open_lab(str(tmp_path / "whole")).content_hash
    assert not list(tmp_path.glob(".lab.*.parts"))


def test_without_a_column_classes_are_found(home, tmp_path):
    build_lab(tmp_path / "lab", made.material(home / "pictures", None), TINY, {}, progress=False)
    found = open_lab(str(tmp_path / "lab"))
    assert 1 <= len(found.classes) <= TINY.form.clusters
    assert len(set(found.classes)) == len(found.classes)
    assert found.train.labels.bincount(minlength=len(found.classes)).min() >= LEAST
    assert found.test.labels.bincount(minlength=len(found.classes)).min() >= 2


def test_a_recipe_is_written_and_read():
    assert LabRecipe.of(json.loads(json.dumps(TINY.plain()))) == TINY
    assert min(getattr(for_pictures(32, 1), name).steps for name in ("hps", "codec", "grouping")) >= 20
    assert for_pictures(32, 15).clip.steps == for_pictures(32, 60).clip.steps / 2
    assert for_pictures(64, 240).codec.steps == 2 * for_pictures(64).codec.steps == 2 * for_pictures(32).codec.steps


def test_words_are_letters_and_marks_of_any_script():
    assert words_of("Keycap: *, l'été 日本") == ["keycap", ":", "*", ",", "l", "'", "été", "日", "本"]
    tokens = WordTokenizer(["a", "b"], 5)(["a B c", "a a a a a"])
    assert tokens.tolist() == [[1, 3, 4, 2, 5], [1, 3, 3, 3, 5]]


def test_small_classes_are_joined_and_every_split_has_each():
    names = ["a & b"] * 40 + ["c"] * 17 + ["d"] * 3 + [""] * 2
    labels, classes = classes_of(names)
    assert classes == ("a-b", OTHER)  # c goes, too: d and the nameless alone would be too few
    assert labels.bincount().tolist() == [40, 22]
    parts = split_rows(labels)
    assert torch.cat(list(parts.values())).sort().values.tolist() == list(range(62))
    assert all(labels[rows].bincount(minlength=2).min() >= 2 for rows in parts.values())


# --- in a configuration


def test_a_run_on_it_takes_its_network_unless_one_is_named(home):
    data = "data={source: lab, lab: made}"
    assert network_of("made")["width"] == schema.load("lab", [data]).model.network.width == 8
    assert schema.load("lab", [data, "model.network=mlp"]).model.network.kind == "mlp"
    assert schema.load("lab", [data]).hash != schema.load("lab", ["model.network={kind: unet, width: 8}"]).hash


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data={source: lab, lab: none}"], "there is no laboratory none.*twinrl lab build"),
        (["data.source=lab"], "lab is null.*twinrl lab build"),
        (["data.lab=made"], "source is digits and lab is made"),
        (["data.root=imgs"], "data.root has no effect with data.source=digits.*twinrl lab build"),
        (["data={source: lab, lab: made, root: imgs}"], "data.root has no effect"),
    ],
)
def test_what_does_not_go_together_is_refused(home, overrides, message):
    with pytest.raises(InputError, match=message) as caught:
        schema.load("lab", overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["brought.Network", "mlpp"])
def test_a_network_that_no_laboratory_has_is_not_looked_for(home, tmp_path, monkeypatch, kind):
    """The laboratory may be somebody else's, and the class code that comes with it."""
    shutil.copytree(folder_of("made"), tmp_path / "lab")
    manifest = json.loads((tmp_path / "lab" / MANIFEST).read_text())
    manifest["recipe"]["network"]["kind"] = kind
    (tmp_path / "lab" / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / "brought.py").write_text("open('proof', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for read in (open_lab, network_of):
        with pytest.raises(InputError, match=f"damaged: the network '{kind}', which is none of mlp"):
            read(str(tmp_path / "lab"))
    assert not (tmp_path / "proof").exists()


def test_a_damaged_laboratory_is_refused(home, tmp_path):
    shutil.copytree(folder_of("made"), tmp_path / "lab")
    manifest = json.loads((tmp_path / "lab" / MANIFEST).read_text())
    manifest["captions"]["captions"]["train"][0] += "!"
    (tmp_path / "lab" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="damaged"):
        open_lab(str(tmp_path / "lab"))


# --- the command


def command(*arguments: str, cache: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"TWINRL_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-m", "twinrl", "lab", "build", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


@pytest.mark.campaign
def test_real_kills_at_ten_moments_change_nothing(tmp_path):
    """Each kill lets the smallest build of the command go on for a while longer."""
    pictures = made.write(tmp_path / "pictures")
    arguments = (str(pictures), "--label", "shape", "--minutes", "1", "--to")
    whole = command(*arguments, "whole", cache=tmp_path)
    assert whole.wait() == 0, whole.communicate()[0]
    moments = torch.rand(10, generator=torch.Generator().manual_seed(0)) * 20
    for seconds in moments.tolist():
        going = command(*arguments, "killed", cache=tmp_path)
        time.sleep(5 + seconds)
        going.send_signal(signal.SIGKILL)
        going.wait()
    last = command(*arguments, "killed", cache=tmp_path)
    assert last.wait() == 0, last.communicate()[0]
    hashes = [json.loads((tmp_path / "labs" / name / MANIFEST).read_text()) for name in ("whole", "killed")]
    assert hashes[0]["content_hash"] == hashes[1]["content_hash"]
