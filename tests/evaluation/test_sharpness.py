"""Sharpness: known values, and blur lowers it."""

import pytest
import torch

from twinrl.evaluation.sharpness import laplacian_variance


def test_a_linear_ramp_has_no_laplacian() -> None:
    ramp = torch.arange(8.0).repeat(8, 1)[None, None] / 8
    assert laplacian_variance(ramp) == pytest.approx(0, abs=1e-10)


def test_a_checkerboard_by_hand() -> None:
    board = (torch.arange(6)[:, None] + torch.arange(6)) % 2 * 2.0 - 1  # inner Laplacians are ±8, half of each sign
    assert laplacian_variance(board[None, None]).item() == pytest.approx(64 * 16 / 15)


def test_blur_lowers_it_for_every_image() -> None:
    x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (laplacian_variance(torch.nn.functional.avg_pool2d(x, 3, 1, 1)) < laplacian_variance(x)).all()
