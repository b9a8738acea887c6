"""From pixels in [−1, 1] to what CLIP-like towers take, differentiable and without a detour through 8 bits.

Both ways resize bicubically with ``antialias=True``, spelt out because torchvision's default has changed, and
normalise with OpenAI's mean and standard deviation (Radford et al., arXiv:2103.00020):

- :func:`letterbox`, HPSv2's: the longest side becomes S, the rest is *black*: zeros are padded before the mean is
  subtracted, the odd pixel on the right and at the bottom;
- :func:`centre_crop`, CLIP's own: the shortest side becomes S, the centre S×S is cut out. What lies outside the
  crop has no gradient.

Bicubic overshoot beyond [0, 1] is kept, as the packages that work on tensors keep it.
"""

import torch
from torch import Tensor

from twinrl.machine.compat import ensure_torchvision
from twinrl.machine.moving import moved

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def unit_rgb(images: Tensor) -> Tensor:
    """(B, 3, H, W) or (B, 1, H, W) in [−1, 1] → (B, 3, H, W) in [0, 1]."""
    return (images.expand(-1, 3, -1, -1) + 1) / 2


def letterbox(images: Tensor, side: int) -> Tensor:
    """Whole images in a black square: (B, 3 or 1, H, W) in [−1, 1] → (B, 3, side, side), normalised."""
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    rows, columns = round(height * scale), round(width * scale)
    above, left = (side - rows) // 2, (side - columns) // 2
    padding = (left, side - columns - left, above, side - rows - above)
    return normalise(torch.nn.functional.pad(resize(unit_rgb(images), rows, columns), padding))


def centre_crop(images: Tensor, side: int) -> Tensor:
    """The central square: (B, 3 or 1, H, W) in [−1, 1] → (B, 3, side, side), normalised."""
    height, width = images.shape[-2:]
    shortest = min(height, width)
    rows, columns = side * height // shortest, side * width // shortest
    above, left = round((rows - side) / 2), round((columns - side) / 2)
    resized = resize(unit_rgb(images), rows, columns)
    return normalise(resized[..., above : above + side, left : left + side])


def resize(images: Tensor, rows: int, columns: int) -> Tensor:
    """Bicubic with antialiasing; the identity where the size is right already."""
    if images.shape[-2:] == (rows, columns):
        return images
    ensure_torchvision()
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize as resized

    return resized(images, [rows, columns], InterpolationMode.BICUBIC, antialias=True)


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] → zero mean and unit variance over CLIP's training images."""
    constants = (moved(torch.tensor(value, dtype=images.dtype), images.device) for value in (CLIP_MEAN, CLIP_STD))
    mean, std = (value[:, None, None] for value in constants)
    return (images - mean) / std
