"""Draws the figures of papers/published-run.md from the components that training uses.

python papers/figures.py
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import beta as beta_law

from twinrl.renoise import RENOISE
from twinrl.terms.losses import Barron, time_weight
from twinrl.training import schema

IMAGES = Path(__file__).parent / "images"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.45"
STEPS = 1000
PRESETS = {"published": ORANGE, "corrected": BLUE}


def renoise_densities(axes: Axes, preset: str) -> None:
    """Density of the shaped times at five moments of the run."""
    law = RENOISE.build(schema.load(preset).renoise)
    t = np.linspace(0.002, 0.998, 400)
    for share in (0, 0.1, 0.2, 0.3):
        now = law.at(round(share * STEPS), STEPS)
        axes.plot(t, beta_law.pdf(t, now.alpha, now.beta), color=PRESETS[preset], alpha=0.3 + 2 * share, lw=1.6)
        at = 0.97 if now.beta == 1 else 0.62
        axes.annotate(f"{share:.0%}", (at, beta_law.pdf(at, now.alpha, now.beta) + 0.03), fontsize=7, color=GREY)
    axes.set(title=f"10, 11  renoise of `{preset}`: {', '.join(law.config.placement)}", xlabel="time", ylim=(0, 4.2))


def reward_weights(axes: Axes) -> None:
    """When the reward acts, relative to its final weight."""
    for preset, colour in PRESETS.items():
        settings = schema.load(preset)
        assert settings.reward is not None
        end = settings.renoise_end()
        share = float(end or 0) / settings.train.steps
        steps = settings.train.steps
        weights = [settings.reward.schedule.weight_at(i, steps, end) for i in range(steps)]
        for rule in settings.gradients.rules("reward").values():
            weights = [w * rule.ratio.value(i, steps, end) for i, w in enumerate(weights)]
        axes.plot(np.linspace(0, 1, len(weights)), np.array(weights) / max(weights), color=colour, label=preset)
        axes.axvline(share, color=GREY, lw=0.7, ls=":")
    axes.annotate("renoise ends", (0.31, 0.05), fontsize=7, color=GREY)
    axes.set(title="6  weight of the reward", xlabel="share of the run", ylabel="of its final weight")
    axes.legend(frameon=False, fontsize=8)


def barron_force(axes: Axes) -> None:
    """Norm of the gradient per sample against the residual's rms: what the loss still shows of it."""
    rms = np.logspace(-4, 1.5, 200)
    target, D = torch.zeros(1, 256, 1, 1), 256
    for limit, colour, label in (
        (1e6, ORANGE, "m/c² ≤ 1e6 (published)"),
        (None, BLUE, "plain Barron"),
        (0, GREY, "l2"),
    ):
        force = []
        for r in rms:
            F = torch.full_like(target, float(r)).requires_grad_()
            loss = F.square().mean() if limit == 0 else Barron(Barron.Config(max_ratio=limit))(F, target).sum()
            force.append(torch.autograd.grad(loss, F)[0].norm().item() * D**0.5)
        axes.loglog(rms, force, color=colour, label=label, ls="--" if limit == 0 else "-", zorder=3 if limit else 2)
    axes.set(title="8  force of a residual", xlabel="rms of the residual", ylabel="gradient norm · √D")
    axes.legend(frameon=False, fontsize=8)


def time_weights(axes: Axes) -> None:
    """The weight of a row against the length of its jump."""
    jump = torch.linspace(0, 1, 200)
    for clamped, colour, label in ((True, ORANGE, "argument in ±1.2 (published)"), (False, BLUE, "plain")):
        axes.plot(jump, time_weight(torch.ones(200), 1 - jump, clamped), color=colour, label=label)
    axes.set(title="20  time weight", xlabel="t − r", ylabel="weight")
    axes.legend(frameon=False, fontsize=8)


def eight_bits(axes: Axes) -> None:
    """What 8 bits leave of a perturbation ε·d, the published ε."""
    from twinrl.rewards.latent.finite_difference import to_8_bit

    generator = torch.Generator().manual_seed(0)
    y = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    d = 0.01 * torch.randn(y.shape, generator=generator)
    seen = (to_8_bit(y + d) - to_8_bit(y)).flatten()
    axes.scatter(d.flatten()[::6], seen[::6], s=2, color=ORANGE, alpha=0.4, linewidths=0)
    axes.plot([-0.04, 0.04], [-0.04, 0.04], color=GREY, lw=0.8)
    axes.set(title="3  a perturbation through 8 bits", xlabel="ε·d, ε = 0.01", ylabel="what the reward model sees")


def precision(axes: Axes) -> None:
    """Error of the residual when the predictions are rounded to bf16: R divides by Δ = 0.01."""
    generator = torch.Generator().manual_seed(0)
    F, G = torch.randn(2, 4096, generator=generator)
    jumps, errors = np.linspace(0.02, 1, 40), []
    for jump in jumps:
        exact = (jump * F - (jump - 0.01) * G) / 0.01
        rounded = (jump * F.bfloat16().float() - (jump - 0.01) * G.bfloat16().float()) / 0.01
        errors.append((rounded - exact).square().mean().sqrt().item())
    axes.plot(jumps, errors, color=ORANGE, label="bf16 predictions")
    axes.axhline(1, color=GREY, lw=0.8, ls="--")
    axes.annotate("clamp κ of R", (0.02, 1.03), fontsize=7, color=GREY)
    axes.set(title="19  rounding error of R", xlabel="t − r", ylabel="rms error", ylim=(0, None))


def main() -> None:
    figure = Figure(figsize=(15, 6.4), layout="constrained")
    axes = figure.subplots(2, 4).flatten()
    renoise_densities(axes[0], "published")
    renoise_densities(axes[1], "corrected")
    for draw, axis in zip((reward_weights, barron_force, time_weights, eight_bits, precision), axes[2:], strict=False):
        draw(axis)
    estimator_cosines(axes[7])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    figure.savefig(IMAGES / "published-switches.png", dpi=110, facecolor="white")


def estimator_cosines(axes: Axes) -> None:
    """Cosine of the estimates to the exact latent gradient, as benchmarks/reward_gradients.py measured it."""
    import json

    result = json.loads((Path(__file__).parents[1] / "benchmarks/results/reward_gradients.json").read_text())
    shown = {case["label"]: case["cosine"]["value"] for case in result["cases"]}
    chosen = [label for label in shown if any(key in label for key in ("published", "autograd", "vae"))]
    colours = [ORANGE if "baseline z" in label or label == "published" else BLUE for label in chosen]
    axes.barh(range(len(chosen)), [shown[label] for label in chosen], color=colours)
    axes.set_yticks(range(len(chosen)), chosen, fontsize=7)
    axes.set(title="2, 3  cosine to the exact gradient", xlabel="mean cosine")


if __name__ == "__main__":
    main()
