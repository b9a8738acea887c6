"""Do TwinFlow's terms sharpen one-step samples? ``tutorial`` against ``rcgm`` on MNIST, at 1 NFE.

    python benchmarks/tutorial_against_rcgm.py --root <mnist> --seeds 3

Equal start (the same pretrained flow model), network, data, batch, learning rate (cosine) and steps; several seeds.
Judge accuracy and Laplacian variance of samples for the labels of the test split; intervals are Student's 95 % over
seeds. Finished runs are kept, so the script goes on where it was stopped. Writes
``benchmarks/results/tutorial_against_rcgm.md`` and a sample grid for each preset.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from twinrl.evaluation.table import IntervalEstimate, mean_interval
from twinrl.sampling import few_step
from twinrl.training.opened import open_run
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import load as configure

RESULTS = Path(__file__).parent / "results"
PRESETS = ("tutorial", "rcgm")


def run_of(preset: str, arguments: list[str]) -> RunDirectory:
    """The finished run, trained now if need be."""
    run = RunDirectory(configure(preset, arguments).directory)
    if run.result is None:
        command = ["resume", str(run.path)] if run.exists else ["train", preset, *arguments]
        subprocess.run([sys.executable, "-m", "twinrl", *command], check=True)
    return run


def laplacian_variance(pixels: Tensor) -> Tensor:
    """(B, C, H, W) pixels in [−1, 1] → (B,) variance of the 4-neighbour Laplacian over all inner pixels and channels.

    *When to use*: to compare samples with real images of the same kind; noise raises it too, so read it beside the
    judge's accuracy (Pech-Pacheco et al., ICPR 2000).
    """
    kernel = torch.tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=pixels.dtype, device=pixels.device)
    laplacian = conv2d(pixels.flatten(0, 1)[:, None], kernel[None, None])
    return laplacian.unflatten(0, pixels.shape[:2]).flatten(1).var(1)


def measure(run: RunDirectory) -> dict[str, float]:
    """Judge accuracy and Laplacian variance of one-step samples on the test split's labels, and of real digits."""
    opened = open_run(run.path)
    protocol = opened.provider.protocol("test")
    pixels = protocol.samples(opened.network, few_step(1)).clamp(-1, 1)
    judged = protocol.judge(pixels)
    return {
        "accuracy": judged.correct.mean().item(),
        "Laplacian variance": laplacian_variance(pixels).mean().item(),
        "of real digits": laplacian_variance(opened.provider.source.test.pixels).mean().item(),
        **{q: v for q, v in protocol.summary(judged).items() if q in ("fd", "recall")},
    }


def table(measured: dict[str, list[dict[str, float]]], command: str) -> str:
    """The Markdown page."""
    rows: dict[str, dict[str, IntervalEstimate]] = {
        preset: {q: mean_interval([m[q] for m in values]) for q in values[0]} for preset, values in measured.items()
    }
    quantities = list(next(iter(rows.values())))
    lines = ["# tutorial against rcgm on MNIST, 1 NFE", "",
             f"{len(next(iter(measured.values())))} seeds, mean [95 % t interval over seeds].", "",
             "| preset | " + " | ".join(quantities) + " |", "|---|" + "--:|" * len(quantities)]  # fmt: skip
    for preset, row in rows.items():
        cells = (f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in row.values())
        lines.append(f"| {preset} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Made by `{command}`.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="MNIST folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--init", default="teacher", help="start of both: teacher (pretrained flow matching) or random")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    given = parser.parse_args()
    shared = [
        "data.source=mnist", f"data.root={given.root.resolve()}", f"model.network={{kind: unet, width: {given.width}}}",
        f"train.steps={given.steps}", f"train.batch={given.batch}", f"optim.lr={given.lr}", "evaluation.every=0",
        f"train.init={given.init}", "lr_policy.kind=cosine", "evaluation.nfe=[1]", "tracking.mlflow=false",
        f"run.dir={given.runs}", "machine.threads=1",
    ]  # fmt: skip
    torch.set_num_threads(1)
    measured: dict[str, list[dict[str, float]]] = {preset: [] for preset in PRESETS}
    RESULTS.mkdir(exist_ok=True)
    for seed in range(given.seeds):
        for preset in PRESETS:
            run = run_of(preset, [*shared, f"seed={seed}"])
            measured[preset].append(measure(run))
            if seed == 0:
                shutil.copy(run.samples / "final-1nfe.png", RESULTS / f"mnist-{preset}-1nfe.png")
    command = (
        f"python benchmarks/tutorial_against_rcgm.py --root <mnist> --seeds {given.seeds} --steps {given.steps} "
        f"--batch {given.batch} --width {given.width} --lr {given.lr:g} --init {given.init}"
    )
    page = table(measured, command)
    (RESULTS / "tutorial_against_rcgm.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
