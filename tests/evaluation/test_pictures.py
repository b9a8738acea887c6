"""Grids and figures: sizes, colours and what is said; how they look was judged by eye."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from analysis.study_page import origin
from twinrl.evaluation.figures import gradient_norms, save, time_scatter, training_curves
from twinrl.evaluation.grids import GAP, diversity_grid, sample_grid, training_grid
from twinrl.evaluation.grids import save as save_grid
from twinrl.machine.pixels import BROKEN, as_uint8
from twinrl.run import runlog
from twinrl.run.runlog import RunLog


def texts(figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in (axis.title, axis._left_title)]


class TestAsUint8:
    def test_range_and_clamping(self):
        levels = as_uint8(torch.tensor([-3.0, -1, 0, 1, 3]).view(5, 1, 1, 1).expand(5, 3, 1, 1))
        assert levels[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]

    def test_one_channel_becomes_grey(self):
        assert as_uint8(torch.zeros(2, 1, 4, 5)).shape == (2, 4, 5, 3)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_non_finite_pixels_are_seen(self, bad: float):
        pixels = torch.zeros(3, 2, 2)
        pixels[1, 0, 0] = bad
        levels = as_uint8(pixels)
        assert tuple(levels[0, 0]) == BROKEN
        assert (levels[1:] == 128).all()


class TestGrids:
    def test_pixels_arrive_enlarged_and_unblurred(self):
        images = torch.rand(2, 3, 3, 8, 8) * 2 - 1
        page = np.asarray(sample_grid(images, ["first", "second"], ["a", "b", "c"], title="t", note="n", scale=4))
        expected = as_uint8(images)[1, 2].repeat(4, 0).repeat(4, 1)
        found = [
            (y, x)
            for y in range(page.shape[0] - 32)
            for x in range(page.shape[1] - 32)
            if np.array_equal(page[y : y + 32, x : x + 32], expected)
        ]
        assert len(found) == 1

    @pytest.mark.parametrize("labels", [["first", "second"], ["", ""]])
    def test_a_report_shows_a_grid_from_its_first_image_on(self, labels: list[str], tmp_path: Path):
        images = torch.rand(2, 3, 3, 8, 8) * 2 - 1
        save_grid(sample_grid(images, labels, title="t", scale=4), tmp_path / "grid.png")
        save_grid(sample_grid(images, labels, title="t", scale=4), tmp_path / "grid.jpg")  # has no such text
        for name, shown in (("grid.png", True), ("grid.jpg", False)):
            with Image.open(tmp_path / name) as picture:
                left, top = origin(picture)
                found = np.asarray(picture)[top : top + 32, left : left + 32]
            assert shown == np.array_equal(found, as_uint8(images)[0, 0].repeat(4, 0).repeat(4, 1))

    def test_small_images_are_made_large_enough_to_see(self):
        narrow, wide = (sample_grid(torch.zeros(1, k, 3, 32, 32), [""]) for k in (1, 2))
        assert wide.width - narrow.width == 96 + GAP
        assert sample_grid(torch.zeros(1, 1, 3, 256, 256), [""]).width < 300

    def test_long_labels_fit(self):
        short, long = (sample_grid(torch.zeros(1, 1, 3, 8, 8), [label]) for label in ("a", "a" * 40))
        assert long.width > short.width + 200

    def test_wrong_shapes_are_refused(self):
        with pytest.raises(ValueError, match="R labels"):
            sample_grid(torch.zeros(2, 3, 3, 8, 8), ["one"])

    def test_over_training(self):
        two, three = (training_grid([torch.zeros(4, 3, 8, 8)] * n, range(n)) for n in (2, 3))
        assert three.height > two.height
        assert three.width == two.width

    def test_diversity_keeps_whole_rows(self):
        fits, cut = (diversity_grid(torch.rand(n, 3, 8, 8), "a seven", columns=5) for n in (10, 14))
        assert fits.size == cut.size


class TestTimeScatter:
    def test_signs_are_told_apart_and_marked_experimental(self):
        t = torch.tensor([0.5, 1.0, -0.3, -0.9, 1.0])
        figure = time_scatter(t, torch.tensor([0.2, 0.0, -0.3, -0.9, 0.0]))
        labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert labels == ["real, t ≥ 0 (3 rows)", "fake, t < 0 (2 rows)"]
        assert any("experimental" in text for text in texts(figure))
        assert any("2 rows at (1, 0)" in text.get_text() for text in figure.axes[0].texts)


def norms(value: float) -> dict[str, float]:
    """Gradient norms of a term and of the total, and the term's share."""
    return {"grad/base/norm_raw": value, "grad/base/share": value / 10, "grad/total/norm_raw": value}


def marked(axis) -> list[int]:
    """Where a panel's curves are marked as not finite."""
    return [int(x) for line in axis.lines if line.get_marker() == "x" for x in line.get_xdata()]


class TestTrainingCurves:
    rows = (
        {"step": 1, "loss/base": 1.0, "loss/total": 2.0},
        {"step": 2, "loss/base": "nan", "loss/total": "inf", "val/fd_1nfe": 0.5},
        {"step": 3, "loss/base": 0.5, "loss/total": 1.0},
    )

    def test_panels_follow_the_data(self):
        figure = training_curves(self.rows, floor={"fd": 0.1})
        assert [text for text in texts(figure) if text] == ["Loss", "Fréchet distance to real images ↓"]
        labels = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
        assert labels == ["1 NFE", "real images (floor)"]

    def test_non_finite_values_are_marked_where_they_were(self):
        axis = training_curves(self.rows).axes[0]
        marks = [line for line in axis.lines if line.get_marker() == "x" and len(line.get_xdata())]
        assert [line.get_xdata().tolist() for line in marks] == [[2], [2]]
        assert "not finite" in [text.get_text() for text in axis.get_legend().get_texts()]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_what_the_log_reads_back_is_marked(self, tmp_path, bad: float):
        """In both pictures of a run: its log gives non-finite values as floats, and what a row lacks is a gap."""
        rows = [{"iteration": k, "step": k + 1, "loss/total": 1.0, **norms(2.0 + k)} for k in range(6)]
        rows[3] |= {"loss/total": bad, **norms(bad)}
        rows[4] = {"iteration": 4, "step": 5, "grad/total/norm_raw": 1.0}
        with RunLog(tmp_path / "log.jsonl") as log:
            for row in rows:
                log.append(row)
        read = runlog.read(tmp_path / "log.jsonl")
        assert [marked(axis) for axis in training_curves(read).axes] == [[4], [4]]
        assert [marked(axis) for axis in gradient_norms(read).axes] == [[3, 3], [3]]

    def test_nothing_finite_is_drawn_too(self, tmp_path):
        nothing = [{"iteration": k, "step": k + 1, **norms(float("nan"))} for k in range(3)]
        for figure, marks in ((training_curves(nothing), [1, 2, 3]), (gradient_norms(nothing), [0, 1, 2, 0, 1, 2])):
            assert marked(figure.axes[0]) == marks
            assert save(figure, tmp_path / "nothing.png").stat().st_size > 1000

    def test_gaps_are_not_marked(self):
        axis = training_curves(self.rows).axes[1]
        assert not [line for line in axis.lines if line.get_marker() == "x"]

    def test_a_spike_stays_visible(self):
        norms = np.ones(1000)
        norms[500] = 1000
        axis = training_curves({"step": np.arange(1000), "grad/total/norm_raw": norms}).axes[0]
        assert max(line.get_ydata().max() for line in axis.lines) == 1000

    def test_frames_and_mappings(self):
        import pandas as pd

        columns = {"step": [1, 2], "val/velocity_mse": [0.5, 0.4]}
        assert texts(training_curves(columns)) == texts(training_curves(pd.DataFrame(columns)))

    def test_nothing_to_draw(self):
        with pytest.raises(ValueError, match="no training metric"):
            training_curves({"step": [1, 2]})
        with pytest.raises(ValueError, match="no column 'step'"):
            training_curves({"loss/base": [1, 2]})

    def test_saved_as_a_picture(self, tmp_path):
        from PIL import Image

        with Image.open(save(training_curves(self.rows), tmp_path / "curves.png")) as picture:
            assert picture.width > 1000
