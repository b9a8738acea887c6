"""What is kept beside a laboratory: found again to the bit, made anew where the file is not what was asked for."""

import logging
import math
import threading
from pathlib import Path

import pytest
import torch

from tests.evaluation.toy import ToySource
from twinrl.evaluation import LabelProtocol, final_table, shelf
from twinrl.evaluation.protocol import JudgedImages
from twinrl.evaluation.shelf import Entry, Shelf
from twinrl.training import schema
from twinrl.training.laboratory import Laboratory

CPU = torch.device("cpu")


@pytest.fixture
def kept(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "judged", {"content": "a"})


def entry() -> Entry:
    return Entry({"x": torch.arange(6.0, dtype=torch.float64).view(2, 3) / 7}, [0.1 + 0.2, math.nan, -math.inf, "name"])


def never(*arguments: object, **options: object) -> Entry:
    raise AssertionError("made again")


def the_file(kept: Shelf) -> Path:
    (path,) = kept.folder.glob("*.safetensors")
    return path


def same(a: Entry, b: Entry) -> bool:
    return repr(a.plain) == repr(b.plain) and torch.equal(a.tensors["x"], b.tensors["x"])


def test_found_again_to_the_bit(kept: Shelf):
    kept.get("rows", entry, steps=5)
    assert same(kept.get("rows", never, steps=5), entry())


def test_other_circumstances_are_another_entry(kept: Shelf):
    kept.get("rows", entry, steps=5)
    for other, name, decides in (
        (kept, "rows", {"steps": 6}),
        (kept, "rows", {}),
        (kept, "row", {"steps": 5}),
        (Shelf(kept.folder, {"content": "b"}), "rows", {"steps": 5}),
    ):
        made = []
        other.get(name, lambda made=made: made.append(1) or entry(), **decides)
        assert made, (name, decides)


@pytest.mark.parametrize("harm", ["cut", "emptied", "a bit", "foreign", "a folder"])
def test_a_damaged_or_foreign_file_is_made_again_with_a_line(kept: Shelf, harm: str, caplog: pytest.LogCaptureFixture):
    kept.get("rows", entry)
    path = the_file(kept)
    content = path.read_bytes()
    if harm == "foreign":
        kept.get("rows", lambda: Entry({"x": torch.zeros(1)}), steps=1)
        (other,) = set(kept.folder.glob("*.safetensors")) - {path}
        other.rename(path)
    elif harm == "a folder":
        path.unlink()
        path.mkdir()
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes({"cut": content[: len(content) // 2], "emptied": b"", "a bit": flipped}[harm])
    with caplog.at_level(logging.WARNING):
        assert same(kept.get("rows", entry), entry())
    assert "made again" in caplog.text
    assert len(caplog.text.strip().splitlines()) == 1
    assert same(kept.get("rows", never), entry())


def test_writers_at_once_leave_one_whole_file(kept: Shelf):
    start = threading.Barrier(6)
    found = []

    def write() -> None:
        start.wait()
        found.append(kept.get("rows", entry))

    threads = [threading.Thread(target=write) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert same(kept.get("rows", never), entry())
    assert the_file(kept)


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert same(Shelf(tmp_path / "file" / "judged", {}).get("rows", entry), entry())


def test_nothing_is_kept_of_what_has_no_digest():
    assert Shelf.of(ToySource(), {}, CPU) is None


@pytest.mark.laboratory
@pytest.mark.slow
def test_code_libraries_and_threads_decide(monkeypatch: pytest.MonkeyPatch, lab):
    def decides() -> object:
        made = Shelf.of(lab, {}, CPU)
        assert made is not None
        return made.decides

    before = decides()
    assert before == decides()
    monkeypatch.setattr(shelf, "_code", lambda: "edited")
    assert decides() != before
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 17)
    assert decides() != before


def test_judged_images_return_from_tensors():
    judged = JudgedImages(
        torch.arange(2), torch.rand(2, 3), torch.ones(2), {"a/b": torch.rand(2)}, torch.ones(2).bool(),
        {"edges": torch.rand(2)},
    )  # fmt: skip
    again = JudgedImages.of(judged.tensors("reference") | judged.tensors("other"), "reference")
    assert torch.equal(again.features, judged.features)
    assert torch.equal(again.scores["a/b"], judged.scores["a/b"])
    assert again.scores.keys() == judged.scores.keys()
    assert torch.equal(again.content["edges"], judged.content["edges"])


@pytest.mark.slow
def test_a_second_run_of_a_laboratory_has_the_rows_of_the_first(
    lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("TWINRL_CACHE", str(tmp_path))
    tiny = "evaluation={n: 20, nfe: [1], teacher_steps: 2, velocity_rows: 5, grid_samples: 1}"
    provider = Laboratory(schema.load("lab", [tiny]), lab, CPU)
    network, teacher = provider.student().eval(), provider.teacher()

    def judged() -> dict[str, object]:
        return provider.final(network)[1].as_dict()

    alone = final_table(LabelProtocol(lab, provider.settings.evaluation, "test"), network, teacher).as_dict()
    first = judged()
    assert first == alone
    with monkeypatch.context() as patch:
        patch.setattr(LabelProtocol, "judge_real", never)
        patch.setattr("twinrl.evaluation.table.resplit_interval", never)
        patch.setattr("twinrl.evaluation.table.nfe", lambda sampler, guidance=None: 1 if guidance is None else never())
        assert judged() == first
    files = sorted(tmp_path.rglob("*.safetensors"))
    found = [path.name.rpartition("-")[0] for path in files]
    assert found == ["real-images-test", "real-rows-test", "teacher-row-test"]
    for path in files:
        path.write_bytes(path.read_bytes()[:-3])
    assert judged() == first
    assert caplog.text.count("made again") == 3
    other = dict(teacher.state_dict())
    monkeypatch.setattr(lab, "_teachers", lambda *arguments: {name: 1.01 * value for name, value in other.items()})
    assert judged() != first
