"""Statistics of pictures: known values, and what a planted change moves."""

import math

import pytest
import torch
from torch import Tensor

from twinrl.evaluation.content import offsets, statistics, variety


def made(n: int = 60, side: int = 16) -> Tensor:
    """Coloured blobs at other places, in [−1, 1]."""
    generator = torch.Generator().manual_seed(0)
    place = torch.rand(n, 2, 1, 1, generator=generator)
    grid = torch.linspace(0, 1, side)
    apart = (grid.view(1, 1, -1) - place[:, 0]).square() + (grid.view(1, -1, 1) - place[:, 1]).square()
    colour = torch.rand(n, 3, 1, 1, generator=generator)
    return (2 * colour * torch.exp(-20 * apart)[:, None] - 1).clamp(-1, 1)


def test_known_values() -> None:
    colours = [-1.0] * 3, [1.0] * 3, [1.0, -1.0, -1.0]
    black, white, red = (torch.ones(1, 3, 16, 16) * torch.tensor(c).view(1, 3, 1, 1) for c in colours)
    found = statistics(torch.cat([black, white, red]))
    assert found["brightness"].tolist() == pytest.approx([0, 1, 0.299])
    assert found["chroma"].tolist() == [0, 0, 1]
    for name in ("contrast", "colours", "edges", "sharpness", "repetition"):
        assert found[name].tolist() == pytest.approx([0, 0, 0], abs=1e-6), name
    stripes = torch.ones(1, 1, 16, 16)
    stripes[..., ::4] = stripes[..., 1::4] = -1
    found = statistics(stripes)
    assert found["repetition"].item() == pytest.approx(1)
    assert found["contrast"].item() == pytest.approx(1)
    assert found["edges"].item() > 0.8
    assert found["colours"].item() == pytest.approx(math.log(2) / math.log(64))


@pytest.mark.parametrize(
    ("change", "statistic"),
    [
        (lambda x: (x + 0.3).clamp(-1, 1), "brightness"),
        (lambda x: (1.6 * x + 0.6).clamp(-1, 1), "contrast"),
        (lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1), "chroma"),
        (lambda x: torch.where(torch.arange(16) % 4 == 0, 1.0, x), "sharpness"),
        (lambda x: torch.where(torch.arange(16) % 8 < 4, 1.0, x), "repetition"),
    ],
)
def test_a_planted_change_is_seen_and_other_real_pictures_are_not(change: object, statistic: str) -> None:
    real, other = made().chunk(2)
    floor = offsets(statistics(other), statistics(real))
    assert max(map(abs, floor.values())) < 0.8  # means of 30 pictures
    moved = offsets(statistics(change(other)), statistics(real))  # type: ignore[operator]
    assert abs(moved[statistic]) > 1 + abs(floor[statistic])


def test_variety_of_copies_and_of_one_picture() -> None:
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(1)).double()
    labels = torch.arange(40) % 4
    found = variety(features, labels, unit=2.0)
    apart = torch.cdist(features, features)
    own = apart[0, labels == 0].sum() / 9 / 2
    assert found["diversity"][0] == pytest.approx(own.item(), rel=1e-5)
    assert found["nearest"][0] == pytest.approx(apart[0, 1:].min().item() / 2, rel=1e-5)
    copied = variety(features[:1].expand(40, 8), labels, unit=2.0)
    assert copied["diversity"].max() == 0
    assert copied["nearest"].max() == 0
    lonely = variety(features, torch.arange(40), unit=2.0)
    assert lonely["diversity"][0] == pytest.approx(apart[0].sum().item() / 39 / 2, rel=1e-5)


def test_offsets_are_in_deviations_of_real_pictures_and_nan_is_not_masked() -> None:
    real = {"a": torch.tensor([0.0, 2.0]), "b": torch.tensor([0.5, 0.5])}
    found = offsets({"a": torch.tensor([3.0, 3.0]), "b": torch.tensor([0.52, 0.52])}, real)
    assert found == pytest.approx({"a": 2.0, "b": 2.0}, rel=1e-5)  # what never varies is measured in hundredths
    assert math.isnan(offsets({"a": torch.tensor([math.nan, 1.0]), "b": real["b"]}, real)["a"])
