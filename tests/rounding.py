"""How far apart two computations of the same number may be, on any processor: the one rule behind the tests' bounds.

A sum or a dot product of n numbers, in a format whose roundings are at most u of a number, is off by at most
γ = n·u / (1 − n·u) times the sum of the sizes of what is added (Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., eq. 3.5). Two computations that round in different places are apart by at most 2γ of it.

So a bound names three things that a reader can check: the format, the number of roundings in the longest chain (of a
network: the widths of its layers, added up), and the scale: the size of what is added up, *before* it cancels. A bound
that none of them gives comes from float64, or from a margin that several seeds show, and says so beside the number.
What a run makes of the last bits (Adam's step of a gradient near 0, a hundred steps on) has no bound: compare such
runs in float64, over few steps, or by what they mean.
"""

import torch
from torch import Tensor

UNIT = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
"""Largest relative error of one rounding."""


def bound(roundings: float, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """Largest distance of two computations of one number.

    Arguments:
        roundings: operations in the longest chain of either.
        scale: size of the numbers that are added up, before they cancel.
        dtype: format of the operations.
    """
    off = roundings * UNIT[dtype]
    assert off < 0.5, f"{roundings} roundings in {dtype} leave no digit to compare"
    return 2 * scale * off / (1 - off)


def assert_rounded(
    actual: Tensor, expected: Tensor, roundings: float, scale: float | None = None, msg: str | None = None
) -> None:
    """Two tensors of one shape are equal but for rounding; a nan equals a nan.

    Arguments:
        actual, expected: of one format, whose roundings are meant.
        roundings: as for :func:`bound`.
        scale: as for :func:`bound`; by default the largest finite size in ``expected``, right where nothing cancels.
        msg: said beside the difference, such as the tensor's name.
    """
    if scale is None:
        finite = expected.detach()[expected.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
    atol = bound(roundings, scale, expected.dtype)
    said = None if msg is None else lambda difference: f"{msg}: {difference}"
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, equal_nan=True, msg=said)
