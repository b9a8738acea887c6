"""Random directions of finite differences, normalised alike: ``E[d dᵀ] = I``, so each has norm √D on average.

Hence ``ĝ = (1/K) Σ d_k·(d_k·g)`` is an unbiased estimate of the gradient g for all three laws, and a step ε moves a
coordinate by about ε. To first order, in D dimensions,

    directions     E‖ĝ‖²/‖g‖²       alignment E[ĝ·g]/(‖g‖·√E‖ĝ‖²)
    gaussian       1 + (D+1)/K      √(K/(D+K+1))
    rademacher     1 + (D−1)/K      √(K/(D+K−1))
    orthonormal    D/K              √(K/D)

The alignment is the root-mean-square cosine: exactly for orthonormal directions (ĝ is g's projection onto a random
K-dimensional subspace, scaled by D/K), up to O(1/D) for the others. Four directions at 3×1328×1328 pixels give a cosine
of 8.7e-4 and 1150 times the norm. Curvature, rounding and the autoencoder only take from it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from twinrl.config.errors import InputError
from twinrl.machine.moving import moved
from twinrl.rewards.latent.contract import RowDraws


def gaussian(rows: RowDraws, x: Tensor, count: int) -> Iterator[Tensor]:
    """Independent N(0, I) directions.

    Raises:
        ValueError: the draws are for another number of images, which would be broadcast silently.
    """
    for k in range(count):
        d = moved(rows.normal(f"reward direction {k}", tuple(x.shape[1:])), x.device, x.dtype)
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
