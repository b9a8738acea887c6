"""Random directions of finite differences, normalised alike: ``E[d dᵀ] = I``, so each has norm √D on average.

Hence ``ĝ = (1/K) Σ d_k·(d_k·g)`` is an unbiased estimate of the gradient g for all three laws, and a step ε moves a
coordinate by about ε. To first order they differ in how far a single estimate strays
(:mod:`twinrl.rewards.latent.laws`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from twinrl.errors import InputError
from twinrl.rewards.latent.contract import RowDraws


def gaussian(rows: RowDraws, x: Tensor, count: int) -> Iterator[Tensor]:
    """Independent N(0, I) directions.

    Raises:
        ValueError: the draws are for another number of images, which would be broadcast silently.
    """
    for k in range(count):
        d = rows.normal(f"reward direction {k}", tuple(x.shape[1:])).to(x)
        if d.shape != x.shape:
            raise ValueError(f"draws for {len(d)} rows and {len(x)} images")
        yield d


def rademacher(rows: RowDraws, x: Tensor, count: int) -> Iterator[Tensor]:
    """Independent signs ±1: all directions have the norm √D exactly."""
    for d in gaussian(rows, x, count):
        yield torch.where(d < 0, -1.0, 1.0).to(x)


def orthonormal(rows: RowDraws, x: Tensor, count: int) -> Iterator[Tensor]:
    """√D times orthonormal vectors, uniformly distributed (QR of Gaussian ones); K directions are held at once.

    Raises:
        InputError: more directions than dimensions.
    """
    dimensions = x[0].numel()
    if count > dimensions:
        raise InputError(
            f"{count} orthogonal directions do not exist in {dimensions} dimensions",
            fix=f"use at most {dimensions} directions",
        )
    drawn = torch.stack([d.flatten(1) for d in gaussian(rows, x, count)], dim=-1)  # (B, D, K)
    basis = torch.linalg.qr(drawn).Q * dimensions**0.5
    for k in range(count):
        yield basis[..., k].reshape(x.shape)
