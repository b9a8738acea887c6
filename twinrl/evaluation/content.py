"""What pictures are made of: light, colour, edges, repetition, variety. What a reward can change unnoticed by a judge.

Every statistic is a number of one picture, so that a set's mean has an interval. :func:`offsets` gives the means in
deviations of real pictures, the common unit of all statistics: 0 is as real pictures are, and the floor is what other
real pictures get.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601)."""
EDGE = 0.1
"""Slope of an edge, in units of the whole range of light a pixel."""
LEVELS = 4
"""Levels of each channel among which colours are counted."""
LEAST_DEVIATION = 0.01
"""A statistic that is the same in all real pictures is measured in units of this; all are about 0 to 1."""


def statistics(pixels: Tensor) -> dict[str, Tensor]:
    """Statistic → (B,) of each picture, about 0 to 1.

    Arguments:
        pixels: (B, C, H, W) in [−1, 1], C 1 or 3, finite.

    - ``brightness``, ``contrast``: mean and twice the deviation of the light.
    - ``chroma``: mean of max − min over the channels. ``colours``: entropy of the colours, on 4 levels a channel, over
      its largest value.
    - ``edges``: share of the pixels whose light has a Sobel slope above 0.1. ``sharpness``: root mean square of the
      light's Laplacian.
    - ``repetition``: largest autocorrelation of the light at shifts of an eighth of the side or more: 1 for a grid.
    """
    rgb = (pixels.float().expand(-1, 3, -1, -1) + 1) / 2
    light = (rgb * rgb.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return {
        "brightness": light.flatten(1).mean(1),
        "contrast": 2 * light.flatten(1).std(1, correction=0),
        "chroma": (rgb.amax(1) - rgb.amin(1)).flatten(1).mean(1),
        "colours": _entropy(rgb),
        "edges": (_slope(light) > EDGE).float().flatten(1).mean(1),
        "sharpness": _filtered(light, [[0, 1, 0], [1, -4, 1], [0, 1, 0]]).square().flatten(1).mean(1).sqrt(),
        "repetition": _repetition(light[:, 0]),
    }


def _filtered(light: Tensor, kernel: list[list[float]]) -> Tensor:
    return conv2d(pad(light, (1, 1, 1, 1), mode="replicate"), light.new_tensor(kernel)[None, None])


def _slope(light: Tensor) -> Tensor:
    """Length of the light's gradient by Sobel's filters, a pixel."""
    sobel = [[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]
    across, down = _filtered(light, sobel) / 8, _filtered(light, [list(row) for row in zip(*sobel, strict=True)]) / 8
    return torch.hypot(across, down)


def _entropy(rgb: Tensor) -> Tensor:
    """(B,) entropy of the pictures' colours over the largest that it can be."""
    level = (rgb * LEVELS).long().clamp(0, LEVELS - 1)
    colour = ((level[:, 0] * LEVELS + level[:, 1]) * LEVELS + level[:, 2]).flatten(1)
    kinds = LEVELS**3
    counts = rgb.new_zeros(len(rgb), kinds).scatter_add_(1, colour, torch.ones_like(rgb[:, 0]).flatten(1))
    share = counts / counts.sum(1, keepdim=True)
    return -torch.special.xlogy(share, share).sum(1) / math.log(kinds)


def _repetition(light: Tensor) -> Tensor:
    """(B,) largest circular autocorrelation of (B, H, W) at shifts that are not small; 0 where all is one tone."""
    height, width = light.shape[-2:]
    centred = light - light.mean((1, 2), keepdim=True)
    spectrum = torch.fft.rfft2(centred)
    correlation = torch.fft.irfft2(spectrum * spectrum.conj(), s=(height, width))
    power = correlation[:, :1, :1]
    down, across = (torch.minimum(s := torch.arange(n), n - s) for n in (height, width))
    near = (down[:, None] < height / 8) & (across[None] < width / 8)
    found = (correlation / power.clamp(min=1e-12)).masked_fill(near, -1).amax((1, 2))
    return torch.where(power.flatten() > 1e-9, found.clamp(min=0), 0)


def variety(features: Tensor, labels: Tensor, unit: float) -> dict[str, Tensor]:
    """How pictures differ from one another in a judge's features.

    ``diversity``: (B,) mean distance to the others of the label, or to all where it is alone there. ``nearest``: (B,)
    distance to the most similar one, 0 for a copy.

    Arguments:
        features: (B, D). labels: (B,). unit: of the distances.
    """
    apart = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist") / unit
    others = ~torch.eye(len(labels), dtype=torch.bool)
    same = (labels[:, None] == labels[None]) & others
    same = torch.where(same.any(1, keepdim=True), same, others)
    return {
        "diversity": (apart * same).sum(1) / same.sum(1).clamp(min=1),
        "nearest": apart.masked_fill(~others, math.inf).amin(1),
    }


def offsets(made: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> dict[str, float]:
    """Statistic → the mean of pictures less that of real ones, in deviations of real pictures; nan where a picture is
    not finite."""
    found = {}
    for name, values in real.items():
        known = values[values.isfinite()]
        scale = max(float(known.std(correction=0)), LEAST_DEVIATION) if len(known) else math.nan
        found[name] = float((made[name].mean() - known.mean()) / scale)
    return found
