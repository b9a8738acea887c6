"""The script from end to end at a tiny size. No assertion about time."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.scripts import script

bench = script("watch")


@pytest.mark.slow
def test_the_script_writes_numbers_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result"
    bench.main(["--sizes", "tiny", "--rounds", "2", "--warmup", "0", "--out", str(out)])
    (line,) = json.loads(out.with_suffix(".json").read_text())["sizes"]
    assert set(line["wall"]) == set(bench.ARMS)
    for ratio in line["wall"].values():
        assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
    assert line["extra"]["parameters"] < line["extra"]["defaults"]  # shares hold a gradient of each loss
    assert out.with_suffix(".md").read_text() == capsys.readouterr().out[:-1]
