"""Distances between two sets of feature vectors: Fréchet (FD) and kernel (KID).

Own code rather than torchmetrics: that library takes images through a feature module, imports in seconds and
draws KID's subsets from the global random stream, which validation inside training must not touch. The tests
compare both.

Every function takes features (N, D) as tensors or arrays and works in float64 on the CPU. A non-finite
feature gives ``nan``: a diverged generator is recorded, neither masked nor a crash.
"""

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Features: TypeAlias = Tensor | np.ndarray


def as_matrix(features: Features, minimum: int = 2) -> Tensor:
    """``features`` (N, D) as a float64 CPU tensor; refuses other ranks and fewer than ``minimum`` rows."""
    matrix = torch.as_tensor(features).detach().to("cpu", torch.float64)
    if matrix.dim() != 2 or len(matrix) < minimum:
        raise ValueError(f"features must be (N ≥ {minimum}, D), got shape {tuple(matrix.shape)}")
    return matrix


def both_finite(a: Tensor, b: Tensor) -> bool:
    """Whether both sets are finite; raises where their widths D differ."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"feature widths differ: {a.shape[1]} and {b.shape[1]}")
    return bool(a.isfinite().all() and b.isfinite().all())


def _mean_and_root(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and a factor R with RᵀR = the sample covariance (divisor N − 1)."""
    mean = x.mean(0)
    return mean, torch.linalg.qr(x - mean, mode="r").R / (len(x) - 1) ** 0.5


def frechet_distance(a: Features, b: Features) -> float:
    """Fréchet distance ``‖μ₁−μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½)`` of the Gaussians fitted to two feature sets.

    With Σᵢ = RᵢᵀRᵢ the last trace is the nuclear norm of R₁R₂ᵀ. No matrix square root of a (nearly) singular
    product is taken, so N ≤ D is fine and the result is real and symmetric.

    Arguments:
        a: (N, D) features. b: (M, D) features.

    Returns:
        The squared distance, ≥ 0 up to rounding. It is biased upwards by about (1/N + 1/M)·D-dependent terms:
        compare only at equal N, and beside the real-against-real floor at that N.

    Source: Heusel et al. 2017 (arXiv:1706.08500), equation 6.
    """
    x, y = as_matrix(a), as_matrix(b)
    if not both_finite(x, y):
        return float("nan")
    (mean_x, root_x), (mean_y, root_y) = _mean_and_root(x), _mean_and_root(y)
    cross = torch.linalg.svdvals(root_x @ root_y.T).sum()
    return float((mean_x - mean_y).square().sum() + root_x.square().sum() + root_y.square().sum() - 2 * cross)


def _polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """``k(x, y) = (x·y/D + 1)³``."""
    base = x @ y.T / x.shape[1] + 1
    return base * base * base  # several times faster than ** 3


def _mean_within(gram: Tensor, strata: Tensor | None) -> Tensor:
    """Unbiased mean kernel of a set with itself: (N, N) → ().

    A point's product with itself is replaced by its mean product with the others of its stratum. Without
    strata that is the mean over all pairs of different points.
    """
    same = torch.ones_like(gram) if strata is None else (strata[:, None] == strata[None]).to(gram)
    others = same - torch.eye(len(gram), dtype=gram.dtype)
    if (others.sum(1) == 0).any():
        raise ValueError("every stratum needs at least two points")
    stand_in = (gram * others).sum(1) / others.sum(1)
    return (gram.sum() - gram.diagonal().sum() + stand_in.sum()) / gram.numel()


def kernel_distance(a: Features, b: Features, strata_a: Tensor | None = None, strata_b: Tensor | None = None) -> float:
    """KID: the *unbiased* MMD² estimate with the cubic polynomial kernel, over the full sets (no subsets).

    Arguments:
        a: (N, D) features. b: (M, D) features.
        strata_a: (N,) integers, where ``a`` was drawn with fixed numbers of points per class: pairs within a
            class are then rarer than in free draws, which would shift the estimate by about −1/N times how
            much more alike points of one class are. strata_b: (M,), likewise.

    Returns:
        An estimate whose mean does not depend on N and M; for equal distributions its mean is 0, so single
        values may be slightly negative.

    Raises:
        ValueError: a stratum has a single point, so nothing is known about pairs within it.

    Source: Bińkowski et al. 2018 (arXiv:1801.01401), section 4; estimator: Gretton et al. 2012, equation 3.
    """
    x, y = as_matrix(a), as_matrix(b)
    if not both_finite(x, y):
        return float("nan")
    within_x = _mean_within(_polynomial_kernel(x, x), strata_a)
    within_y = _mean_within(_polynomial_kernel(y, y), strata_b)
    return float(within_x + within_y - 2 * _polynomial_kernel(x, y).mean())
