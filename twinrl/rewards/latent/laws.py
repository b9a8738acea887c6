"""First-order laws of the direction estimators: what K directions in D dimensions can know about a gradient g.

With ``ĝ = (1/K) Σ d_k·(d_k·g)`` and E[d dᵀ] = I, all are unbiased, and

    directions     E‖ĝ‖²/‖g‖²       alignment E[ĝ·g]/(‖g‖·√E‖ĝ‖²)
    gaussian       1 + (D+1)/K      √(K/(D+K+1))
    rademacher     1 + (D−1)/K      √(K/(D+K−1))
    orthonormal    D/K              √(K/D)

The alignment is the root-mean-square cosine, exactly for orthonormal directions (ĝ is g's projection onto a random
K-dimensional subspace, scaled by D/K) and up to O(1/D) for the others. Four directions at 3×1328×1328 pixels give a
cosine of 8.7e-4 and 1150 times the norm. The laws say nothing about curvature, rounding or the autoencoder; they are
bounds on hope.
"""

from typing import Literal

Kind = Literal["gaussian", "rademacher", "orthonormal"]


def norm_inflation(kind: Kind, dimensions: int, directions: int) -> float:
    """``E‖ĝ‖²/‖g‖²`` of K directions in D dimensions."""
    if kind == "orthonormal":
        return dimensions / directions
    return 1 + (dimensions + (1 if kind == "gaussian" else -1)) / directions


def rms_cosine(kind: Kind, dimensions: int, directions: int) -> float:
    """Root-mean-square cosine between ĝ and g."""
    return norm_inflation(kind, dimensions, directions) ** -0.5
