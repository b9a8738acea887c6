"""Real handwritten digits from inside scikit-learn: images, splits and captions. Nothing is downloaded.

The 1797 images of ``sklearn.datasets.load_digits`` (UCI optical recognition of handwritten digits, 8×8
pixels, 17 grey levels) are sampled smoothly at 32×32. 997 training images are too few for a generative model,
so the training split also holds mildly warped variants of each; validation and test hold real, unwarped images
only.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from twinrl.flow.draws import generator
from twinrl.flow.source import Split
from twinrl.lab.material import Material

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

TEMPLATES = (
    "a handwritten {}",
    "a handwritten digit {}",
    "the digit {}",
    "a photo of the digit {}",
    "a scan of a handwritten {}",
    "a drawing of the number {}",
    "the number {} in white ink",
    "a small picture of a {}",
    "{} in white on black paper",
)
HELD_OUT_TEMPLATES = (
    "a photo of a handwritten {}",
    "a scan of the number {}",
    "a small drawing of the digit {}",
    "a picture of the number {} on black paper",
)

SIDE = 32
TEST_PER_CLASS = 50
VALIDATION_PER_CLASS = 30
_SEED = 0


@dataclass(frozen=True)
class Warp:
    """How far the training variants stray from their original; uniform in ± each range.

    Attributes:
        variants: number of variants of each training image, beside the original.
        rotation: in degrees.
        shear: horizontal, as a tangent; the slant of handwriting.
        scale: relative.
        shift: as a fraction of the image's side.
        elastic: amplitude of the smooth random displacement, as a fraction of the side.
    """

    variants: int = 5
    rotation: float = 7.0
    shear: float = 0.10
    scale: float = 0.06
    shift: float = 0.03
    elastic: float = 0.012


def load_digit_splits(warp: Warp = Warp()) -> dict[str, Split]:
    """The fixed splits ``train``, ``validation`` and ``test``, stratified by class.

    Validation has 30 and test 50 images of each class. Train holds the other 997 images first, then
    ``warp.variants`` warped copies of them in the same order.
    """
    images, labels = _scans()
    parts = _stratified(labels)
    splits = {name: _split(_render(images[part]), labels[part]) for name, part in parts.items()}
    variants = [_render(images[parts["train"]], warp, number) for number in range(warp.variants)]
    originals = splits["train"]
    splits["train"] = Split(
        pixels=torch.cat([originals.pixels, *map(_as_rgb, variants)]),
        labels=originals.labels.repeat(1 + warp.variants),
    )
    return splits


class DigitCaptions:
    """Templates around the digit's name; satisfies ``twinrl.lab.material.Captions``."""

    vocabulary: tuple[str, ...] = tuple(
        sorted(
            {word for template in TEMPLATES + HELD_OUT_TEMPLATES for word in template.split()} - {"{}"} | set(CLASSES)
        )
    )
    kept: tuple[str, ...] = CLASSES

    def of(self, split: Split, rows: Tensor, seed: int, step: int) -> list[str]:
        """One keyed caption for each of the rows (n,)."""
        return captions(split.labels[rows], seed, step)

    def batch(self, split: Split, rows: Tensor, seed: int, step: int) -> tuple[list[str], Tensor]:
        """One keyed caption of each class, and the rows' labels (n,)."""
        return captions(torch.arange(len(CLASSES)), seed, step), split.labels[rows]

    def prompts(self, labels: Tensor, seed: int, step: int, held_out: bool = False) -> list[str]:
        """As :func:`captions`."""
        return captions(labels, seed, step, held_out)

    def plain(self) -> list[list[str]]:
        """Both lists of templates."""
        return [list(TEMPLATES), list(HELD_OUT_TEMPLATES)]


def digits(splits: Mapping[str, Split]) -> Material:
    """What the digits' laboratory is built from, given :func:`load_digit_splits`."""
    return Material("digits", "digit", splits, CLASSES, DigitCaptions(), grey=True)


def captions(labels: Tensor, seed: int, step: int, held_out: bool = False) -> list[str]:
    """One caption for each label in 0…9, its template drawn by (seed, step) from the chosen templates."""
    templates = HELD_OUT_TEMPLATES if held_out else TEMPLATES
    drawn = torch.randint(len(templates), (len(labels),), generator=generator(seed, "caption template", step))
    return [
        templates[template].format(CLASSES[label])
        for template, label in zip(drawn.tolist(), labels.tolist(), strict=True)
    ]


def all_captions(templates: tuple[str, ...] = TEMPLATES) -> list[list[str]]:
    """Every caption, one list of templates for each class."""
    return [[template.format(word) for template in templates] for word in CLASSES]


def _scans() -> tuple[Tensor, Tensor]:
    """The original images (1797, 1, 8, 8) in [−1, 1] and their labels (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    return images, torch.from_numpy(digits.target).long()


def _stratified(labels: Tensor) -> dict[str, Tensor]:
    """Row numbers of each split, a keyed permutation within each class, in increasing order."""
    parts: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for label in range(len(CLASSES)):
        members = (labels == label).nonzero()[:, 0]
        order = members[torch.randperm(len(members), generator=generator(_SEED, "split", label))]
        test, validation, train = order.tensor_split((TEST_PER_CLASS, TEST_PER_CLASS + VALIDATION_PER_CLASS))
        for name, part in (("train", train), ("validation", validation), ("test", test)):
            parts[name].append(part)
    return {name: torch.cat(part).sort().values for name, part in parts.items()}


def _render(scans: Tensor, warp: Warp | None = None, number: int = 0) -> Tensor:
    """Scans (N, 1, 8, 8) sampled bicubically at 32×32, along a warped grid where ``warp`` is given."""
    n = len(scans)
    affine = torch.eye(2, 3).expand(n, 2, 3) if warp is None else _affine(n, warp, number)
    grid = affine_grid(affine, [n, 1, SIDE, SIDE], align_corners=False)
    if warp is not None:
        grid = grid + _displacement(n, warp, number)
    return grid_sample(scans, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(-1, 1)


def _affine(n: int, warp: Warp, number: int) -> Tensor:
    """(N, 2, 3) keyed random rotations, shears, scalings and shifts, in ``affine_grid``'s convention."""
    random = 2 * torch.rand((6, n), generator=generator(_SEED, "warp", number)) - 1
    angle = random[0] * math.radians(warp.rotation)
    shear = random[1] * warp.shear
    scale = 1 + warp.scale * random[2:4]
    shift = 2 * warp.shift * random[4:6]  # the grid spans [−1, 1]
    cos, sin = angle.cos(), angle.sin()
    first = torch.stack([cos * scale[0], (shear * cos - sin) * scale[1], shift[0]], dim=-1)
    second = torch.stack([sin * scale[0], (shear * sin + cos) * scale[1], shift[1]], dim=-1)
    return torch.stack([first, second], dim=1)


def _displacement(n: int, warp: Warp, number: int) -> Tensor:
    """(N, 32, 32, 2) smooth keyed displacements, a 4×4 Gaussian field sampled bicubically."""
    coarse = torch.randn((n, 2, 4, 4), generator=generator(_SEED, "elastic", number))
    smooth = interpolate(coarse, size=(SIDE, SIDE), mode="bicubic", align_corners=True)
    return 2 * warp.elastic * smooth.permute(0, 2, 3, 1)


def _split(grey: Tensor, labels: Tensor) -> Split:
    return Split(pixels=_as_rgb(grey), labels=labels)


def _as_rgb(grey: Tensor) -> Tensor:
    """(N, 1, H, W) → (N, 3, H, W)."""
    return grey.repeat(1, 3, 1, 1)
