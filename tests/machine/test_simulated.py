"""Runs ``with_devices.py`` in a process that has the devices of a simulation."""

from pathlib import Path

import pytest

from twinrl.config.errors import InputError
from twinrl.machine.files import cache_dir
from twinrl.machine.simulated import helper

TESTS = Path(__file__).with_name("with_devices.py")


@pytest.mark.slow
def test_with_devices() -> None:
    with helper.started("pytest", cache_dir(), "-p", "no:cacheprovider", str(TESTS)) as process:
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "passed" in said


@pytest.mark.slow
def test_files_of_the_working_directory_stand_for_no_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calendar.py").write_text("open('proof', 'w')")
    with helper.started("calendar", cache_dir(), "2026") as process:
        said, _ = process.communicate()
    assert "2026" in said
    assert not (tmp_path / "proof").exists()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(helper.shutil, "which", lambda _: None)
    with pytest.raises(InputError, match=r"C\+\+ compiler"):
        helper.compiled(tmp_path)


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("#error no such torch\n")
    monkeypatch.setattr(helper, "SOURCE", broken)
    with pytest.raises(InputError, match="no such torch"):
        helper.compiled(tmp_path)
    assert not list(tmp_path.glob("*.so"))
