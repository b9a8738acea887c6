"""Pixels as pictures have them."""

import numpy as np
import torch
from torch import Tensor

BROKEN = (230, 0, 126)
"""What a pixel that is not finite is shown as."""


def as_uint8(pixels: Tensor) -> np.ndarray:
    """(..., C, H, W) pixels in [−1, 1] → (..., H, W, 3) uint8; non-finite ones magenta, C 1 or 3."""
    pixels = pixels.detach().cpu().float()
    channels_last = pixels.movedim(-3, -1).expand(*pixels.shape[:-3], *pixels.shape[-2:], 3)
    levels = ((channels_last.clamp(-1, 1) + 1) * 127.5).round()
    finite = channels_last.isfinite().all(-1, keepdim=True)
    return torch.where(finite, levels, torch.tensor(BROKEN).float()).to(torch.uint8).numpy()
