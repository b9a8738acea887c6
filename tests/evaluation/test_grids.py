"""Grids of a run's samples, from what lies in its folder."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from twinrl.evaluation import grids
from twinrl.run import layout


@pytest.mark.timeout(60)
def test_damaged_snapshots_are_named_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A picture over training is not worth the end of a run."""
    samples, whole = tmp_path / "samples", torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    samples.mkdir()
    paths = [samples / f"{layout.of_step(step)}.safetensors" for step in range(7)]
    save_file({"pixels": whole}, paths[0])
    paths[1].write_bytes(paths[0].read_bytes()[:40])
    save_file({"pixels": whole.reshape(-1)}, paths[2])
    save_file({"pixels": whole.float()}, paths[3])
    save_file({"other": whole}, paths[4])
    paths[5].mkdir()
    save_file({"pixels": whole}, paths[6])
    drawn: list[tuple[list[torch.Tensor], list[int]]] = []

    class Picture:
        info: dict[str, str] = {}  # noqa: RUF012

        def save(self, path: Path, **_: object) -> None:
            path.touch()

    def training_grid(snapshots: list[torch.Tensor], steps: list[int], rows: list[str]) -> Picture:
        drawn.append((snapshots, steps))
        return Picture()

    monkeypatch.setattr(grids, "training_grid", training_grid)
    with caplog.at_level(logging.WARNING, "twinrl"):
        grids.save_over_training(samples, ("a", "b"), tmp_path / "over.png")
    ((snapshots, steps),) = drawn
    assert steps == [0, 6]
    assert all(torch.equal(snapshot, torch.ones(2, 3, 4, 4)) for snapshot in snapshots)
    assert all(path.name in caplog.text for path in paths[1:6])
