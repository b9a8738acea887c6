"""What each estimator of a reward's latent gradient costs, and how much of the exact gradient it finds.

    python benchmarks/reward_gradients.py [--images 64] [--repeats 3] [--directions 1 4 16 64]

On the digits lab: latents of validation digits with some noise (imperfect samples, as a student makes them), the
lab's autoencoder, and its preference reward ``lab_hps``. Each case runs in a process of its own, forked before
anything was computed:

- *CPU time*: of the process, per image, median over the repeats after a first run;
- *peak memory*: high-water mark of the resident set during the first run, above what was resident before it;
- *evaluations*: images that the reward scored, per image;
- *cosine*: to the exact gradient (back-propagation through reward and decoder), median over images with a 95 %
  bootstrap interval;
- *gain*: rise of R(D(z)) by a step of fixed length along the estimate, as a share of the rise along the exact
  gradient, means over images.
"""

import argparse
import ctypes
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import Estimate
from torch import Tensor

from twinrl import config
from twinrl.evaluation.figures import COLOURS, save
from twinrl.flow import draws
from twinrl.flow.source import Source
from twinrl.flow.transport import like
from twinrl.rewards import REWARDS, Reward, build_reward
from twinrl.rewards.latent import KeyedRows, LatentReward, LatentRewardConfig
from twinrl.run import names
from twinrl.training import assembly, schema

SWEPT = ("random_direction", "antithetic", "orthogonal", "spsa")
NOISE = 0.3  # standard deviation of the noise on the latents, whose own is 1
STEP = 0.5  # length in latent space of the step that decides the gain


@dataclass(frozen=True)
class Case:
    """An estimator with its settings.

    Attributes:
        label: in table and figure.
        settings: of ``LatentReward``.
    """

    label: str
    settings: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.settings["estimator"]["kind"])

    @property
    def directions(self) -> int | None:
        found = self.settings["estimator"].get("directions")
        return None if found is None else int(found)


def cases(directions: Sequence[int]) -> list[Case]:
    """Exact ones, the published one, and every direction estimator with every number of directions."""
    published = {"kind": "random_direction", "directions": 4, "epsilon": 0.01, "quantise": True}
    swept = [
        Case(f"{kind}, K = {count}", {"estimator": {"kind": kind, "directions": count}})
        for kind in SWEPT
        for count in directions
    ]
    return [
        Case("vae_backprop", {"estimator": {"kind": "vae_backprop"}}),
        Case("autograd", {"estimator": {"kind": "autograd"}}),
        Case("autograd, baseline z", {"estimator": {"kind": "autograd"}, "baseline": "latent"}),
        Case("published: K = 4, 8 bit, baseline z", {"estimator": published, "baseline": "latent"}),
        Case("published, baseline E(D(z))", {"estimator": published}),
        *swept,
    ]


@dataclass(frozen=True)
class Measured:
    """One case's line."""

    label: str
    kind: str
    directions: int | None
    evaluations: float
    cpu_ms: float
    peak_mb: float
    cosine: Estimate
    gain: float


# --- what is measured -----------------------------------------------------------------------------------


class Counted:
    """A reward that counts the images it has scored."""

    def __init__(self, reward: Reward):
        self.reward, self.differentiable, self.images = reward, reward.differentiable, 0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.images += len(images)
        return self.reward(images, prompts)


@dataclass(frozen=True)
class Lab:
    """Latents, prompts, autoencoder and reward: what every case is measured on."""

    source: Source
    reward: Reward
    z: Tensor
    prompts: list[str]

    @property
    def rows(self) -> KeyedRows:
        return KeyedRows(0, 0, tuple(range(len(self.z))))

    def scores(self, z: Tensor) -> Tensor:
        """(B,) rewards of latents."""
        with torch.no_grad():
            return self.reward(self.source.decode(z), self.prompts)

    def rise(self, g: Tensor) -> float:
        """Mean change of the reward by a step of length ``STEP`` along ``g`` (B, C, h, w)."""
        step = STEP * g / like(g.flatten(1).norm(dim=1), g)
        return float((self.scores(self.z + step) - self.scores(self.z)).mean())


def load(images: int) -> Lab:
    """The digits lab with ``images`` latents; nothing is computed that would start threads."""
    settings = schema.load("tutorial", ["machine.device=cpu"])
    source = assembly.load_source(settings, torch.device("cpu"))
    labels = source.validation.labels[:images]
    clean = source.latents("validation")[:images]
    z = clean + NOISE * draws.normal(tuple(clean.shape), 0, "imperfection")
    reward = build_reward(REWARDS["lab_hps"].Config(), source)
    return Lab(source, reward, z, source.prompts(labels, 0, 0))


def measure(lab: Lab, case: Case, repeats: int) -> Measured:
    """One case; memory first, while nothing is warm."""
    chosen = LatentReward(config.validate(LatentRewardConfig, case.settings))
    counted = Counted(lab.reward)
    with PeakMemory() as memory:
        found = chosen.gradient(lab.z, lab.prompts, lab.source, counted, lab.rows)
    evaluations = counted.images / len(lab.z)
    times = [
        measuring.clocked(lambda: chosen.gradient(lab.z, lab.prompts, lab.source, lab.reward, lab.rows)).cpu
        for _ in range(repeats)
    ]
    cosines = chosen.compare(found, lab.z, lab.prompts, lab.source, lab.reward)[names.REWARD_GRAD_COSINE]
    exact = LatentReward(config.validate(LatentRewardConfig, {"estimator": "vae_backprop"}))
    best = lab.rise(exact.gradient(lab.z, lab.prompts, lab.source, lab.reward, lab.rows).g)
    return Measured(
        case.label,
        case.kind,
        case.directions,
        evaluations,
        1000 * measuring.median(times).value / len(lab.z),
        memory.megabytes,
        measuring.median(cosines.tolist()),
        lab.rise(found.g) / best,
    )


class PeakMemory:
    """High-water mark of the process's resident set inside the block, above its level at entry (Linux only)."""

    megabytes: float

    def __enter__(self) -> "PeakMemory":
        ctypes.CDLL(None).malloc_trim(0)  # what loading has freed must not be there to be used again
        Path("/proc/self/clear_refs").write_text("5")  # the mark falls to the present level: proc(5)
        self._before = self._status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.megabytes = (self._status("VmHWM") - self._before) / 1024

    @staticmethod
    def _status(key: str) -> int:
        """Kilobytes."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))


def in_own_processes(lab: Lab, chosen: list[Case], repeats: int) -> Iterator[Measured]:
    """Each case in a fork of this process, one after the other."""
    with multiprocessing.get_context("fork").Pool(1, _enter, (lab, repeats), maxtasksperchild=1) as pool:
        yield from pool.imap(_measure, chosen)


_shared: dict[str, Any] = {}


def _enter(lab: Lab, repeats: int) -> None:
    torch.set_num_threads(1)
    _shared.update(lab=lab, repeats=repeats)


def _measure(case: Case) -> Measured:
    return measure(_shared["lab"], case, _shared["repeats"])


# --- output ---------------------------------------------------------------------------------------------


def table(lines: list[Measured], result: dict[str, Any]) -> str:
    """The result as Markdown."""
    where = result["machine"]
    columns = ("estimator", "evaluations", "CPU (ms/image)", "peak memory (MB)", "cosine to the exact gradient", "gain")
    rows = [
        (m.label, f"{m.evaluations:g}", f"{m.cpu_ms:.2f}", f"{m.peak_mb:.0f}", m.cosine, f"{m.gain:.0%}") for m in lines
    ]
    head = (
        f"# Gradients of a reward in latent space\n\nReward `lab_hps` on {result['images']} noisy latents of digits "
        f"(4×8×8 latents, 3×32×32 pixels), {where['threads']} thread, {where['device']}, torch {where['torch']}, load "
        f"average {where['load_average']}. Memory is for all {result['images']} images at once. Cosine: median over "
        f"images, 95 % bootstrap interval. Gain: rise of the reward by a step of length {STEP:g} along the estimate, "
        "against the rise along the exact gradient. ε = 0.01 in pixels, 0.05 in latents (`spsa`), η = 0.05.\n\n"
    )
    tail = f"\nMade by `python benchmarks/reward_gradients.py` in {result['seconds']:.0f} s.\n"
    return head + measuring.markdown(columns, rows) + "\n![](reward_gradients.png)\n" + tail


def figure(lines: list[Measured]) -> Any:
    """Cosine against time, and the peak memory of each kind."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10.4, 4.2), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=(1.5, 1))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.92", linewidth=0.8)
        axis.set_axisbelow(True)
    _cosines(left, lines)
    _memory(right, lines)
    return drawn


def _colour(line: Measured) -> str:
    if line.label.startswith("published"):
        return COLOURS[6]
    return COLOURS[("vae_backprop", "autograd", *SWEPT).index(line.kind)]


def _cosines(axis: Any, lines: list[Measured]) -> None:
    singles = [m for m in lines if m.kind not in SWEPT or m.label.startswith("published")]
    for m, marker in zip(singles, "*DdXP", strict=True):
        label = f"{m.label} (exact)" if m.kind == "vae_backprop" else m.label
        axis.plot(m.cpu_ms, m.cosine.value, marker, color=_colour(m), markersize=9, label=label, zorder=3)
    for kind in SWEPT:
        swept = [m for m in lines if m.kind == kind and m not in singles]
        times, cosines = [m.cpu_ms for m in swept], [m.cosine.value for m in swept]
        counts = ", ".join(str(m.directions) for m in swept)
        axis.plot(times, cosines, "o-", color=_colour(swept[0]), markersize=5, label=f"{kind}, K = {counts}")
        for m in swept:
            axis.plot([m.cpu_ms] * 2, [m.cosine.low, m.cosine.high], color=_colour(m), linewidth=1, alpha=0.6)
    axis.set(xscale="log", xlabel="CPU time (ms per image)", ylabel="cosine to the exact latent gradient")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_title("What the time buys", loc="left", fontsize=10)
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.legend(fontsize=8, frameon=False, loc="upper right")


def _memory(axis: Any, lines: list[Measured]) -> None:
    most = max(m.directions for m in lines if m.directions)
    shown = [m for m in lines if m.directions in (None, most) and "baseline" not in m.label][::-1]
    axis.barh([m.label for m in shown], [m.peak_mb for m in shown], color=[_colour(m) for m in shown], height=0.6)
    for row, m in enumerate(shown):
        axis.annotate(f"{m.peak_mb:.0f}", (m.peak_mb, row), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_xlabel("peak memory above the loaded models (MB)")
    axis.set_title("What it takes", loc="left", fontsize=10)
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(visible=False, axis="y")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="latents measured")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each case")
    parser.add_argument("--directions", type=int, nargs="+", default=(1, 4, 16, 64), help="numbers K of directions")
    parser.add_argument(
        "--out", type=Path, default=measuring.RESULTS / "reward_gradients", help="files to write, no suffix"
    )
    given = parser.parse_args(arguments)
    if not sys.platform.startswith("linux"):
        parser.error("peak memory is read from /proc, which only Linux has")
    torch.set_num_threads(1)
    started = time.perf_counter()
    lines = list(in_own_processes(load(given.images), cases(given.directions), given.repeats))
    result = {
        "images": given.images,
        "repeats": given.repeats,
        "machine": measuring.machine(torch.device("cpu")),
        "seconds": time.perf_counter() - started,
        "cases": [asdict(line) for line in lines],
    }
    text = table(lines, result)
    measuring.write(given.out, result, text)
    save(figure(lines), given.out.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
