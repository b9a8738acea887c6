"""Preprocessing against torchvision's own transforms, and its geometry."""

import pytest
import torch

from tests.rewards.tiny import images
from twinrl.machine.compat import ensure_torchvision
from twinrl.rewards.preprocess import CLIP_MEAN, CLIP_STD, centre_crop, letterbox, normalise, unit_rgb

SIZES = [(32, 32), (40, 24), (24, 40), (512, 320), (37, 53), (20, 20), (32, 17)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_centre_crop_is_clips_own(height, width):
    ensure_torchvision()
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

    theirs = Compose(
        [Resize(32, InterpolationMode.BICUBIC, antialias=True), CenterCrop(32), Normalize(CLIP_MEAN, CLIP_STD)]
    )
    x = images(2, height, width)
    torch.testing.assert_close(centre_crop(x, 32), theirs((x + 1) / 2))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_letterbox_keeps_the_whole_image_in_a_black_square(height, width):
    boxed = letterbox(torch.ones(1, 3, height, width), 32)
    rows, columns = round(height * 32 / max(height, width)), round(width * 32 / max(height, width))
    white, black = normalise(torch.ones(1, 3, 1, 1)), normalise(torch.zeros(1, 3, 1, 1))
    assert boxed.shape == (1, 3, 32, 32)
    inside = torch.isclose(boxed, white, atol=1e-5).all(1)
    assert inside.sum() == rows * columns
    assert torch.isclose(boxed, black, atol=1e-5).all(1).sum() == 32 * 32 - rows * columns
    above, left = (32 - rows) // 2, (32 - columns) // 2
    assert inside[0, above : above + rows, left : left + columns].all()


def test_antialiasing_is_on():
    """A checkerboard shrinks to grey; sampling without antialiasing would keep black and white."""
    board = (torch.arange(256)[:, None] + torch.arange(256)) % 2 * 2.0 - 1
    shrunk = letterbox(board.expand(1, 3, -1, -1), 32)
    torch.testing.assert_close(shrunk, normalise(torch.full((1, 3, 32, 32), 0.5)), atol=0.02, rtol=0)


def test_range_of_pixels():
    assert unit_rgb(torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1))[:, 2, 0, 0].tolist() == [0.0, 0.5, 1.0]
