"""Precision, recall, density and coverage of generated features, by balls around nearest neighbours."""

import torch
from torch import Tensor

from twinrl.evaluation.distances import Features, as_matrix, both_finite

PRDC = ("precision", "recall", "density", "coverage")


def _pairwise(x: Tensor, y: Tensor) -> Tensor:
    """(N, M) Euclidean distances, exact for duplicates (no expansion of the square)."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(x: Tensor, k: int) -> Tensor:
    """(N,) distance of every point to its k-th nearest neighbour in the same set, itself not counted."""
    return _pairwise(x, x).kthvalue(k + 1, dim=1).values


def prdc(real: Features, fake: Features, k: int = 5) -> dict[str, float]:
    """Fidelity (precision, density) and diversity (recall, coverage) of ``fake`` against ``real``.

    Balls are closed and reach to the k-th nearest neighbour within the ball's own set:

    - precision: share of fake points inside any real ball, in [0, 1];
    - recall: share of real points inside any fake ball, in [0, 1];
    - density: mean number of real balls around a fake point, over k; in [0, N/k], about 1 for equal sets;
    - coverage: share of real balls that contain a fake point, in [0, 1].

    Arguments:
        real: (N, D) features. fake: (M, D) features. k: neighbours, 1 ≤ k < min(N, M).

    Returns:
        The four numbers by name; all ``nan`` if a feature is not finite.

    *When to use*: beside FD or KID, to see whether a better distance was bought with diversity. Outliers in
    either set enlarge balls, hence precision and recall; density and coverage suffer less.

    Source: precision, recall: Kynkäänniemi et al. 2019 (arXiv:1904.06991), equation 2; density, coverage:
    Naeem et al. 2020 (arXiv:2002.09797), equations 3 and 4.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    x, y = as_matrix(real, k + 1), as_matrix(fake, k + 1)
    if not both_finite(x, y):
        return dict.fromkeys(PRDC, float("nan"))
    between, real_radii = _pairwise(x, y), _radii(x, k)[:, None]  # (N, M), (N, 1)
    in_real_ball, in_fake_ball = between <= real_radii, between <= _radii(y, k)[None]
    return {
        "precision": in_real_ball.any(0).double().mean().item(),
        "recall": in_fake_ball.any(1).double().mean().item(),
        "density": in_real_ball.double().sum(0).mean().item() / k,
        "coverage": in_real_ball.any(1).double().mean().item(),
    }
