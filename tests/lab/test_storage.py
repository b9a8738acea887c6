"""Content hashes and publication."""

import threading
import time

import pytest
import torch

from twinrl.config.errors import InputError
from twinrl.lab import storage
from twinrl.lab.storage import content_hash, load_json, load_tensors, publish, save_tensors


def groups():
    return {"a": {"x": torch.arange(6.0).view(2, 3), "y": torch.tensor(3)}, "b": {"x": torch.ones(2)}}


def test_hash_depends_on_content_alone():
    a = groups()
    reordered = {"b": a["b"], "a": {"y": a["a"]["y"], "x": a["a"]["x"].t().contiguous().t()}}
    assert content_hash(a, ["t"]) == content_hash(reordered, ["t"])


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g["a"]["x"][0].__setitem__(0, 1e-30),
        lambda g: g["a"].update(x=g["a"]["x"].view(3, 2)),
        lambda g: g["a"].update(x=g["a"]["x"].double()),
        lambda g: g["a"].update(z=g["a"].pop("x")),
        lambda g: g.update(c=g.pop("b")),
    ],
)
def test_hash_notices(change):
    changed = groups()
    change(changed)
    assert content_hash(changed, ["t"]) != content_hash(groups(), ["t"])


def test_hash_notices_texts():
    assert content_hash(groups(), ["t"]) != content_hash(groups(), ["u"])


def test_concurrent_publishers_write_once_and_never_show_half(tmp_path):
    path, written = tmp_path / "artefact", []

    def write(folder):
        folder.mkdir()
        (folder / "one").write_text("1")
        time.sleep(0.2)
        assert not path.exists()
        (folder / "two").write_text("2")
        written.append(folder)

    threads = [threading.Thread(target=publish, args=(path, write)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert sorted(file.name for file in path.iterdir()) == ["one", "two"]


def test_a_failed_writer_leaves_nothing_and_the_next_one_succeeds(tmp_path):
    def fail(folder):
        folder.mkdir()
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        publish(tmp_path / "artefact", fail)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []
    publish(tmp_path / "artefact", lambda file: file.write_text("ok"))
    assert (tmp_path / "artefact").read_text() == "ok"


def test_what_a_killed_writer_left_is_removed(tmp_path):
    left = tmp_path / ".artefact.new"
    left.mkdir()
    publish(tmp_path / "artefact", lambda file: file.write_text("ok"))
    assert not left.exists()


def test_damaged_files_name_themselves_and_the_remedy(tmp_path):
    file = tmp_path / "w.safetensors"
    save_tensors(file, {"x": torch.ones(3)})
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError) as error:
        load_tensors(file, tmp_path)
    assert str(file) in str(error.value)
    assert f"delete {tmp_path}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_broken_json_are_damage(tmp_path):
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        load_json(tmp_path / "m.json", tmp_path)
    with pytest.raises(InputError, match="damaged"):
        load_tensors(tmp_path / "none.safetensors", tmp_path)


def test_a_long_wait_for_another_process_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(storage, "SILENT_SECONDS", 0.05)
    path, made = tmp_path / "artefact", threading.Event()

    def write(file):
        while f"another process makes {path}: waiting for it" not in caplog.text:
            time.sleep(0.01)
        file.touch()
        made.set()

    first = threading.Thread(target=publish, args=(path, write))
    first.start()
    while not path.with_name(".artefact.lock").exists():
        time.sleep(0.01)
    publish(path, write)
    first.join()
    assert made.is_set()
