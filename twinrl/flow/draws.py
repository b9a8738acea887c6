"""Keyed randomness: every random number of a run is a function of (seed, purpose, step).

Nothing is drawn from a global stream, so a resumed run, a run on other devices and two arms of a study see
the same data order, times and noise. Generators live on the CPU and the result is moved, which makes the
numbers independent of the device.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """A fresh CPU generator for ``purpose`` at ``step``; distinct keys give independent streams.

    Arguments:
        seed: the run's seed.
        purpose: what the numbers are for, e.g. ``"noise"``; part of the reproducibility contract.
        step: training step, epoch or any other counter.
    """
    key = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(key, "big") >> 1)


def seed_global(seed: int) -> None:
    """Seed the global streams of the CPU and, where CUDA is in use, of its devices; dropout draws from them.

    The same numbers as after ``torch.manual_seed``, which for each absent accelerator also writes down where it was
    called: 1 ms, several times a step.

    Arguments:
        seed: from −2⁶³ to 2⁶⁴ − 1; a negative one is taken modulo 2⁶⁴.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def seed_stream(seed: int, purpose: str, step: int) -> None:
    """Seed the global streams for one step, so that a resumed step repeats."""
    seed_global(generator(seed, purpose, step).initial_seed())


def uniform(shape: tuple[int, ...], seed: int, purpose: str, step: int = 0) -> Tensor:
    """U[0, 1) in float32, on the CPU."""
    return torch.rand(shape, generator=generator(seed, purpose, step), device="cpu", dtype=torch.float32)


def normal(shape: tuple[int, ...], seed: int, purpose: str, step: int = 0) -> Tensor:
    """N(0, 1) in float32, on the CPU."""
    return torch.randn(shape, generator=generator(seed, purpose, step), device="cpu", dtype=torch.float32)


def normal_rows(shape: tuple[int, ...], seed: int, purpose: str, step: int, rows: Iterable[int]) -> Tensor:
    """(R, *shape) N(0, 1) in float32, on the CPU: each of the R ``rows`` of a batch has a stream of its own."""
    return torch.stack([normal(shape, seed, f"{purpose}, row {row}", step) for row in rows])


def beta(uniforms: Tensor, alpha: float, beta: float) -> Tensor:
    """Beta(alpha, beta) by inverse CDF of ``uniforms`` in [0, 1): the same draw under every shape.

    Arms that differ only in their Beta parameters therefore stay paired. Beta(1, 1) returns ``uniforms``
    unchanged.

    Raises:
        ValueError: a parameter is not positive.
    """
    if alpha <= 0 or beta <= 0:
        raise ValueError(f"Beta parameters must be positive, got ({alpha}, {beta})")
    if alpha == beta == 1:
        return uniforms
    from scipy.special import betaincinv

    quantile = betaincinv(alpha, beta, uniforms.double().cpu().numpy())
    return torch.from_numpy(quantile).to(uniforms)


def shuffled_rows(n: int, batch: int, seed: int, step: int, purpose: str = "data order") -> Tensor:
    """The ``batch`` data rows (in 0…n−1) of training step ``step``: epochs of keyed permutations, joined end to end.

    No row repeats before every row was seen once; a batch may straddle two epochs (or several, if batch > n).
    """
    start, stop = step * batch, (step + 1) * batch
    epochs = range(start // n, (stop - 1) // n + 1)
    order = torch.cat([torch.randperm(n, generator=generator(seed, purpose, e), device="cpu") for e in epochs])
    offset = start - epochs.start * n
    return order[offset : offset + batch]
