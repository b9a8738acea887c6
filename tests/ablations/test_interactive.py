"""A study from Python: the same trials, frame and report as by the commands; outcomes are planted."""

from pathlib import Path

import pytest

from ablations import interactive
from tests.ablations.planted import Planted
from tests.ablations.test_running import by_rate
from tests.ablations.tiny import write
from twinrl.config.errors import InputError


@pytest.mark.slow
def test_run_frame_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Planted(by_rate).install(monkeypatch)
    study = interactive.study(write(tmp_path / "mine.yaml"), root=tmp_path / "work")
    assert len(study.plan.missing) == 4
    with pytest.raises(InputError, match="no finished trial"):
        _ = study.frame
    study.run(cpus=1)
    assert study.plan.missing == []
    assert sorted(zip(study.frame["arm"], study.frame["seed"], strict=True)) == [
        ("rate=large", 0), ("rate=large", 1), ("rate=small", 0), ("rate=small", 1),
    ]  # fmt: skip
    written = study.report()
    assert written.page.is_file()
    assert written.answer.endswith(".")


def test_a_study_that_is_not_there() -> None:
    with pytest.raises(InputError):
        interactive.study("no-such-study")
