"""Fingerprints: what changes one, and what must not."""

import subprocess
import sys
from pathlib import Path

import pytest

from ablations import fingerprint as prints
from ablations.fingerprint import fingerprint, source_hash, sources
from twinrl import schema
from twinrl.schema import RunConfig

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
    (tmp_path / "my_terms.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = prints.own_modules({"terms": {"a": {"kind": "my_terms.Term"}, "b": {"kind": "base"}}})
    assert found == {("my_terms", tmp_path / "my_terms.py")}


def test_start_weights_count_by_content(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "ema.safetensors").write_bytes(b"weights")
    before = prints.start_weights(str(tmp_path))
    (checkpoint / "ema.safetensors").write_bytes(b"other")
    assert before != prints.start_weights(str(tmp_path)) != prints.start_weights("teacher") == ""


def test_imports_no_torch() -> None:
    code = "import sys, ablations.fingerprint, ablations.trial; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
