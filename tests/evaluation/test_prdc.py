"""Precision, recall, density, coverage: point sets with known answers, and the definitions spelled out."""

import math

import pytest
import torch
from torch import Tensor

from twinrl.evaluation.prdc import PRDC, prdc
from twinrl.flow import draws


def column(*values: float) -> Tensor:
    return torch.tensor(values).double()[:, None]


def test_equal_sets():
    points = column(0, 1, 3, 7)
    found = prdc(points, points, k=1)
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    # balls around 0, 1, 3, 7 with radii 1, 1, 2, 4 hold 2, 2, 2, 2 points
    assert found["density"] == 2


def test_far_apart():
    assert prdc(column(0, 1, 2), column(100, 101, 102), k=1) == dict.fromkeys(PRDC, 0.0)


def test_collapsed_samples_are_precise_without_diversity():
    real = column(0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    found = prdc(real, column(4.5, 4.5, 4.5), k=1)
    # 4.5 lies in the balls of 4 and 5 only; balls of collapsed samples have radius 0
    assert found == {"precision": 1.0, "recall": 0.0, "density": 2.0, "coverage": 0.2}


def test_by_hand():
    # k = 1: real balls 0±1, 1±1, 5±4; fake 0.5, 20, 22 with radii 19.5, 2, 2
    found = prdc(column(0, 1, 5), column(0.5, 20, 22), k=1)
    assert found["precision"] == pytest.approx(1 / 3)
    assert found["recall"] == 1.0  # all real points are within 19.5 of 0.5
    assert found["density"] == pytest.approx(2 / 3)  # 0.5 is in the balls of 0 and 1
    assert found["coverage"] == pytest.approx(2 / 3)


def test_balls_are_closed():
    found = prdc(column(0, 2), column(4, 8), k=1)
    assert found["precision"] == 0.5  # 4 lies on the edge of the ball 2±2
    assert found["recall"] == 1.0  # 0 and 2 lie in the ball 4±4


@pytest.mark.parametrize("k", [1, 3, 5])
def test_against_brute_force(k: int):
    real = draws.normal((40, 3), 0, "real").double()
    fake = 0.7 * draws.normal((30, 3), 0, "fake").double() + 0.3
    assert prdc(real, fake, k) == pytest.approx(brute_force(real.tolist(), fake.tolist(), k))


def brute_force(real: list, fake: list, k: int) -> dict[str, float]:
    def ball(centre: list, own: list) -> float:
        return sorted(math.dist(centre, other) for other in own)[k]  # [0] is the centre itself

    def inside(point: list, centre: list, own: list) -> bool:
        return math.dist(point, centre) <= ball(centre, own)

    return {
        "precision": sum(any(inside(f, c, real) for c in real) for f in fake) / len(fake),
        "recall": sum(any(inside(r, c, fake) for c in fake) for r in real) / len(real),
        "density": sum(inside(f, c, real) for f in fake for c in real) / (k * len(fake)),
        "coverage": sum(any(inside(f, c, real) for f in fake) for c in real) / len(real),
    }


def test_non_finite_features_give_nan():
    fake = column(0, 1, math.nan)
    assert all(math.isnan(value) for value in prdc(column(0, 1, 2), fake, k=1).values())


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="N ≥ 6"):
        prdc(column(0, 1, 2), column(0, 1, 2), k=5)
    with pytest.raises(ValueError, match="k must be"):
        prdc(column(0, 1), column(0, 1), k=0)
