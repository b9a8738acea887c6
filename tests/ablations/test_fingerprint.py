"""Fingerprints: what changes one, and what must not."""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType

import pytest
from rich.console import Console

from ablations import fingerprint as prints
from ablations.fingerprint import fingerprint, source_hash, sources
from tests.ablations.tiny import without_figures
from tests.fake_source import register, small
from twinrl.commands.train import train
from twinrl.training import schema
from twinrl.training.schema import RunConfig

CODE = 'def f(x):\n    """Doc."""\n    return x * {factor}  # comment\n'


def settings(**machine: object) -> RunConfig:
    content = schema.load("twinflow").model_dump(mode="json")
    return RunConfig.model_validate(content | {"machine": {"device": "cpu", "threads": 1} | machine})


def package(folder: Path, factor: int = 2) -> Path:
    for name in ("terms", "tracking"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "code.py").write_text(CODE.format(factor=factor))
    return folder


def test_comments_docstrings_and_layout_do_not_count_code_does(tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.py" for name in "abc")
    a.write_text(CODE.format(factor=2))
    b.write_text("# licence\ndef f(x):\n    '''Other doc.'''\n\n    return (x *\n        2)\n")
    c.write_text(CODE.format(factor=3))
    assert source_hash(a) == source_hash(b) != source_hash(c)


def test_only_numeric_packages_count(tmp_path: Path) -> None:
    before = sources(package(tmp_path))
    (tmp_path / "tracking" / "code.py").write_text("x = 1\n")
    (tmp_path / "README.md").write_text("words")
    assert sources(tmp_path) == before
    (tmp_path / "terms" / "code.py").write_text(CODE.format(factor=30))
    assert sources(tmp_path) != before


def test_a_commit_alone_changes_nothing(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, "-C", str(tmp_path), *words], check=True, capture_output=True)

    before = sources(package(tmp_path))
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    git("commit", "--allow-empty", "-m", "second")
    assert sources(tmp_path) == before


def test_data_threads_device_and_torch_count_names_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    base = fingerprint(settings(), "content")
    assert fingerprint(settings(device="cpu:0"), "content") == base
    assert len({base, fingerprint(settings(), "other"), fingerprint(settings(threads=2), "content")}) == 3
    monkeypatch.setattr(prints.metadata, "version", lambda name: "0.0.1")
    assert fingerprint(settings(), "content") != base


def test_own_components_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "terms_to_count.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = prints.own_modules({"terms": {"a": {"kind": "terms_to_count.Term"}, "b": {"kind": "base"}}})
    assert found == {("terms_to_count", tmp_path / "terms_to_count.py")}


def test_start_weights_count_by_content(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "ema.safetensors").write_bytes(b"weights")
    before = prints.start_weights(str(tmp_path))
    (checkpoint / "ema.safetensors").write_bytes(b"other")
    assert before != prints.start_weights(str(tmp_path)) != prints.start_weights("teacher") == ""


def test_start_weights_in_shards_count_by_content(tmp_path: Path) -> None:
    shards = tmp_path / "checkpoints" / "step-00000010" / "shards"
    shards.mkdir(parents=True)
    (shards.parent / "state.json").write_text("{}")
    (shards / ".metadata").write_bytes(b"layout")
    found = set()
    for first, second in ((b"a", b"b"), (b"other", b"b"), (b"a", b"other")):
        (shards / "__0_0.distcp").write_bytes(first)
        (shards / "__1_0.distcp").write_bytes(second)
        found.add(prints.start_weights(str(tmp_path)))
    assert len(found) == 3


def test_start_weights_keep_their_hash(tmp_path: Path) -> None:
    """Of one process's checkpoint: the digest of its safetensors files' digests, as finished trials have it."""
    checkpoint = tmp_path / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    for name in ("student", "ema", "optimizer"):
        (checkpoint / f"{name}.safetensors").write_bytes(name.encode())
    (checkpoint / "state.json").write_text("{}")
    parts = [hashlib.sha256(name).hexdigest().encode() + b"\0" for name in (b"ema", b"optimizer", b"student")]
    assert prints.start_weights(str(tmp_path)) == hashlib.sha256(b"".join(parts)).hexdigest()


def test_what_a_trial_cannot_reach_does_not_count(tmp_path: Path) -> None:
    """A new family of models or a change of sharding leaves trials of one process without a family as they are."""
    for part in ("backends/families", "data", "fsdp", "terms"):
        (tmp_path / part).mkdir(parents=True)
    parts = {"backends/families/new.py", "data/tars.py", "fsdp/sharded.py"}
    before = sources(tmp_path, prints.unused(settings()))
    for part in parts:
        (tmp_path / part).write_text("x = 1\n")
        assert sources(tmp_path, prints.unused(settings())) == before
    several, family = prints.unused(settings(), processes=2), RunConfig.model_construct(
        model=settings().model.model_copy(update={"family": "sd3"})
    )  # fmt: skip
    assert (set(several), set(prints.unused(family))) == (set(prints.WITHOUT_FAMILY), set(prints.WITHOUT_RANKS))
    assert prints.unused(family, processes=2) == ()
    for unused in (several, prints.unused(family), ()):
        assert sources(tmp_path, unused) != before
    (tmp_path / "fsdp" / "ranks.py").write_text("x = 1\n")
    assert sources(tmp_path, prints.unused(settings())) != before


def test_what_is_left_out_exists() -> None:
    assert all(
        (prints.PACKAGE / part).exists()
        for part in (*prints.NOT_NUMERIC_FILES, *prints.WITHOUT_FAMILY, *prints.WITHOUT_RANKS)
    )


def test_processes_count() -> None:
    assert fingerprint(settings(), "content") != fingerprint(settings(), "content", processes=2)


def called(action: Callable[[], object]) -> set[str]:
    """Files of the functions that are called, not of the bodies of modules and classes."""
    found: set[str] = set()

    def trace(frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code.co_flags & CO_OPTIMIZED:
            found.add(frame.f_code.co_filename)

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return found


@pytest.mark.slow
def test_a_trial_runs_nothing_of_what_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No function of those files is called by a whole run, with validation, checkpoint and final table."""
    register(monkeypatch)
    without_figures(monkeypatch)
    short, codes = small(tmp_path, "train.steps=4", "checkpoint.every=2", "evaluation.every=2"), []
    files = called(lambda: codes.append(train(short, True, Console(quiet=True))))
    reached = {Path(file).relative_to(prints.PACKAGE) for file in files if file.startswith(str(prints.PACKAGE))}
    assert codes == [0]
    assert {Path("training/trainer.py"), Path("run/checkpoints.py"), Path("evaluation/table.py")} <= reached
    left_out = prints.unused(settings())
    assert [path for path in reached if any(path.is_relative_to(part) for part in left_out)] == []


@pytest.mark.slow
def test_imports_no_torch() -> None:
    code = "import sys, ablations.fingerprint, ablations.trial; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
