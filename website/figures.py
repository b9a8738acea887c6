"""Draws the pictures of docs/twinflow.md: the times of the branches, jumps on a known flow, the force of rectify.

    python -m website.figures

Data in one dimension are a mixture of Gaussians, whose flow is known exactly; times are those that training draws.
"""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from twinrl.flow import transport
from twinrl.flow.branches import BatchDraws, divide
from twinrl.training import schema
from website.places import REPOSITORY

IMAGES = REPOSITORY / "docs" / "images"
COLOURS = {"e2e": "#D55E00", "mul": "#009E73", "any": "#0072B2", "adv": "#CC79A7"}
REAL, FAKE = "#0072B2", "#CC79A7"
STEPS = 200
ROWS = 1200
VISIBLE = 0.02
"""Density of samples from which on that picture has arrows."""
RENOISE_TIME = 0.4
"""τ of the picture of rectify."""


@dataclass(frozen=True)
class Mixture:
    """Data in one dimension: Gaussians of equal deviation.

    Attributes:
        means, weights: of the Gaussians; weights sum to 1.
        deviation: of each.
    """

    means: tuple[float, ...]
    weights: tuple[float, ...]
    deviation: float = 0.15

    def density(self, x: np.ndarray) -> np.ndarray:
        return self._parts(x, 0.0)[0].sum(0)

    def velocity(self, x_t: np.ndarray, t: float) -> np.ndarray:
        """E[z − x | x_t] at noise level t in [0, 1]: the velocity that a flow model learns."""
        density, off, variance = self._parts(x_t, t)
        posterior = density / density.sum(0)
        data = np.array(self.means)[:, None] + (1 - t) * self.deviation**2 / variance * off
        return (posterior * (t / variance * off - data)).sum(0)

    def _parts(self, x_t: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray, float]:
        """(density of each Gaussian's rows at x_t, x_t less its mean, its variance) at noise level t."""
        variance = (1 - t) ** 2 * self.deviation**2 + t**2
        off = x_t - (1 - t) * np.array(self.means)[:, None]
        scale = np.array(self.weights)[:, None] / np.sqrt(2 * np.pi * variance)
        return scale * np.exp(-(off**2) / (2 * variance)), off, variance

    def paths(self, z: np.ndarray) -> np.ndarray:
        """(STEPS + 1, B) positions from noise at t = 1 down to data at t = 0, by Euler steps."""
        positions = [z]
        for t in np.linspace(1, 0, STEPS + 1)[:-1]:
            positions.append(positions[-1] - self.velocity(positions[-1], t) / STEPS)
        return np.stack(positions)


DATA = Mixture((-1.2, 1.0), (0.4, 0.6))
GENERATED = Mixture((-0.6, 1.0), (0.2, 0.8), 0.25)
"""What a one-step generator makes that has not learned all of it."""


def branch_times(axes: Axes) -> None:
    """(t, r) of the rows of one large batch, by branch, as the preset `twinflow` draws them."""
    settings = schema.load("twinflow")
    x = torch.zeros(ROWS, 1)
    c = {"label": torch.zeros(ROWS)}
    batch = divide(settings.branches, settings.time, x, c, c, BatchDraws(0, 0, (ROWS, 1)))
    for name, colour in COLOURS.items():
        rows, sign = batch.on((name,)), -1 if name == "adv" else 1  # its term evaluates the network at −t
        axes.scatter(sign * rows.t, sign * rows.r, s=70 if name == "e2e" else 4, color=colour, label=name, zorder=3)
    axes.set(
        title="Times that each branch asks for", xlabel="t, where the network stands", ylabel="r, where it jumps to"
    )
    axes.axhline(0, color="0.8", lw=0.8)
    axes.axvline(0, color="0.8", lw=0.8)
    axes.legend(frameon=False, fontsize=8)


def jumps(axes: Axes) -> None:
    """Paths of the exact flow, and the one jump that has the same ends."""
    z = np.linspace(-2, 2, 11)
    paths = DATA.paths(z)
    axes.plot(np.linspace(1, 0, STEPS + 1), paths, color="0.65", lw=1)
    for start, end in zip(z, paths[-1], strict=True):
        axes.plot([1, 0], [start, end], color=COLOURS["e2e"], lw=0.9, ls="--")
    axes.plot([], [], color="0.65", label="path in many steps")
    axes.plot([], [], color=COLOURS["e2e"], ls="--", label="one jump, (t, r) = (1, 0)")
    axes.invert_xaxis()
    axes.set_ylim(-3.1, 2.1)
    axes.set(title="The network learns the jump", xlabel="t, from noise to data", ylabel="x")
    axes.legend(frameon=False, fontsize=8, loc="lower left")


def rectify_force(axes: Axes) -> None:
    """Density of data and of one-step samples, and Δv, which moves the samples, as arrows."""
    x = np.linspace(-2, 2, 400)
    axes.plot(x, DATA.density(x), color=REAL, label="data")
    axes.fill_between(x, GENERATED.density(x), color=FAKE, alpha=0.25, lw=0, label="one-step samples")
    at = np.linspace(-1.5, 1.8, 18)
    at = at[GENERATED.density(at) > VISIBLE]
    axes.quiver(at, np.full_like(at, -0.12), delta_v(at), np.zeros_like(at), angles="xy", scale_units="xy", scale=5,
                width=0.006, color=COLOURS["e2e"])  # fmt: skip
    axes.set(title=f"Δv moves samples towards the data (τ = {RENOISE_TIME})", xlabel="x", ylabel="density")
    axes.set_ylim(-0.25, None)
    axes.legend(frameon=False, fontsize=8)


def delta_v(x: np.ndarray, tau: float = RENOISE_TIME) -> np.ndarray:
    """Δv at the noisy points whose noise is zero: the fake branch's velocity less the real one's."""
    position = torch.from_numpy(x)
    x_tau = transport.interpolate(position, torch.zeros_like(position), torch.full_like(position, tau)).numpy()
    return GENERATED.velocity(x_tau, tau) - DATA.velocity(x_tau, tau)


def main() -> None:
    for name, draw in {"times": branch_times, "jumps": jumps, "rectify": rectify_force}.items():
        figure = Figure(figsize=(6, 3.9), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(11)
        figure.savefig(IMAGES / f"twinflow-{name}.png", dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
