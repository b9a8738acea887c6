"""Simulated training logs with planted trouble: norms of several terms, their total, shares, and what was planted.

Every term's log-norm is a slowly falling level plus an autocorrelated Gaussian (AR(1)). The terms' gradients have
fixed cosines C, so with g the vector of norms the total is ``√(gᵀCg)`` and the signed share of a term
``g_i·(Cg)_i / gᵀCg``; shares sum to 1. A planted spike multiplies one term's norm, decays over a few steps, and
the other terms answer, more weakly and one to three steps later, as networks do after a bad update.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from twinrl.run import names

TERMS = ("base", "real_velocity", "adversarial", "rectify")


@dataclass(frozen=True)
class Planted:
    """A spike: from ``step`` on, the norm of ``term`` is ``size`` times its ordinary value, and decays."""

    step: int
    term: str
    size: float


@dataclass(frozen=True)
class Simulated:
    """Log rows, one for each step from 1 on, and what was planted in them."""

    rows: list[dict[str, Any]]
    planted: list[Planted] = field(default_factory=list)


def ar1(rng: np.random.Generator, steps: int, sigma: float, correlation: float) -> np.ndarray:
    """(steps,) stationary Gaussian noise of standard deviation σ with this correlation from step to step."""
    noise = rng.standard_normal(steps) * sigma
    noise[1:] *= np.sqrt(1 - correlation**2)
    for i in range(1, steps):
        noise[i] += correlation * noise[i - 1]
    return noise


def norms(rng: np.random.Generator, steps: int) -> np.ndarray:
    """(steps,) an ordinary term's gradient norms: random level, decay by up to e², log-noise with σ 0.1–0.35."""
    decay = -rng.uniform(0, 2) * np.linspace(0, 1, steps)
    noise = ar1(rng, steps, rng.uniform(0.1, 0.35), rng.uniform(0, 0.8))
    return np.exp(rng.normal(0, 1) + decay + noise)


def plan(rng: np.random.Generator, steps: int, count: int, first: int = 40, apart: int = 60) -> list[Planted]:
    """``count`` spikes of 15–200 times the ordinary norm, from step ``first`` on, at least ``apart`` steps apart."""
    room = steps - 10 - first - apart * (count - 1)
    at = np.sort(rng.integers(0, room, count)) + first + apart * np.arange(count)
    sizes = np.exp(rng.uniform(np.log(15), np.log(200), count))
    return [Planted(int(s), str(rng.choice(TERMS)), float(size)) for s, size in zip(at, sizes, strict=True)]


def spiked(rng: np.random.Generator, factors: np.ndarray, spike: Planted) -> None:
    """Multiply (steps, terms) ``factors`` by a spike of 1–4 steps and by the other terms' answer."""
    for k, term in enumerate(TERMS):
        if term == spike.term:
            delay, length, size = 0, int(rng.integers(1, 5)), spike.size
        else:
            delay, length, size = int(rng.integers(1, 4)), int(rng.integers(1, 4)), spike.size ** rng.uniform(0, 0.5)
        start = spike.step - 1 + delay
        for i in range(length):
            factors[start + i, k] *= size ** (0.5**i)


def cosines(rng: np.random.Generator) -> np.ndarray:
    """(terms, terms) cosines of random directions in 12 dimensions."""
    directions = rng.standard_normal((len(TERMS), 12))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return directions @ directions.T


def rows_of(term_norms: np.ndarray, C: np.ndarray) -> list[dict[str, Any]]:
    """Log rows of (steps, terms) norms under the cosines C."""
    along = term_norms @ C
    squared = (term_norms * along).sum(1)
    shares, total = term_norms * along / squared[:, None], np.sqrt(squared)
    columns = {names.grad(term, "norm_raw"): term_norms[:, k] for k, term in enumerate(TERMS)}
    columns |= {names.grad(term, "share"): shares[:, k] for k, term in enumerate(TERMS)}
    columns[names.GRAD_TOTAL_RAW] = total
    series = {name: column.tolist() for name, column in columns.items()}
    return [
        {"iteration": i, "step": i + 1, **{name: values[i] for name, values in series.items()}}
        for i in range(len(term_norms))
    ]


def simulate(seed: int, steps: int = 500, spikes: int = 0) -> Simulated:
    """A run with this number of planted spikes; equal arguments give equal runs."""
    rng = np.random.default_rng([seed, steps, spikes])
    ordinary = np.stack([norms(rng, steps) for _ in TERMS], axis=1)
    factors = np.ones_like(ordinary)
    planted = plan(rng, steps, spikes) if spikes else []
    for spike in planted:
        spiked(rng, factors, spike)
    return Simulated(rows_of(ordinary * factors, cosines(rng)), planted)
