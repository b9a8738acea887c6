"""Sharpness of images by the variance of their Laplacian: blurred samples have little of it."""

import torch
from torch import Tensor
from torch.nn.functional import conv2d


def laplacian_variance(pixels: Tensor) -> Tensor:
    """(B, C, H, W) pixels in [−1, 1] → (B,) variance of the 4-neighbour Laplacian over all inner pixels and channels.

    *When to use*: to compare samples with real images of the same kind; noise raises it too, so read it beside the
    judge's accuracy (Pech-Pacheco et al., ICPR 2000).
    """
    kernel = torch.tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=pixels.dtype, device=pixels.device)
    laplacian = conv2d(pixels.flatten(0, 1)[:, None], kernel[None, None])
    return laplacian.unflatten(0, pixels.shape[:2]).flatten(1).var(1)
