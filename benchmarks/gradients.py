"""What taking the gradient apart costs: time of a full training step and memory, against clipping the sum alone.

    python benchmarks/gradients.py [--rounds 12] [--cases twinflow tutorial lab]

Arms, each with a trainer of its own on the same data: *global*: ``gradients.space=none``, one clip of the sum;
*parameter*: every term's exact gradient clipped; *output*: every term's gradient at the predictions clipped. In these
three nothing periodic is measured. *shares*: parameter with what telemetry does by default at every step (shares,
RMS); *all*: with what it does at every tenth step (cosines and update ratio as well). The arms make a step in turn,
round by round, in one process; a number is the median over rounds of the ratio of two arms in the same round, with a
95 % bootstrap interval over rounds. Telemetry at its defaults costs nine steps of *shares* and one of *all* in ten.

Memory: the allocator's own account (torch.profiler) of one step in each arm: its peak above what was held before the
step, and how far that lies above the peak of *global*, in gradients (bytes of all trainable parameters).

Cases: the presets ``twinflow`` and ``tutorial`` on MNIST's UNet, and ``lab`` on the embedded lab's perceptron.
"""

import argparse
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import Estimate, Seconds
from step_time import full_step, trainer_of
from torch.profiler import ProfilerActivity, profile

from twinrl.training import assembly, schema
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig
from twinrl.training.trainer import Trainer

CASES = ("twinflow", "tutorial", "lab")
QUIET = "gradients.telemetry={shares_every: 0, cosines_every: 0, rms_every: 0, update_every: 0}"
CLIP = "gradients.each.clip.max_norm=1"
ARMS: dict[str, tuple[str, ...]] = {
    "global": ("gradients.space=none", "gradients.total.clip.max_norm=1", QUIET),
    "parameter": ("gradients.space=parameter", CLIP, QUIET),
    "output": ("gradients.space=output", CLIP, QUIET),
    "shares": (CLIP, "gradients.telemetry={shares_every: 1, cosines_every: 0, rms_every: 1, update_every: 0}"),
    "all": (CLIP, "gradients.telemetry={shares_every: 1, cosines_every: 1, rms_every: 1, update_every: 1}"),
}
AIMS = {"parameter / global": 1.15, "output / global": 1.03, "telemetry / none": 1.03}


@dataclass(frozen=True)
class Measured:
    """One case: seconds of a global step, ratios in CPU time and wall time, memory above global in gradients."""

    case: str
    step: Seconds
    cpu: dict[str, Estimate]
    wall: dict[str, Estimate]
    peak: dict[str, float]  # MB above what was held before the step
    extra: dict[str, float]  # gradients
    gradient: float  # MB
    rounds: int


# --- what is measured -----------------------------------------------------------------------------------


def settings_of(case: str, arm: str, width: int, batch: int) -> RunConfig:
    """The preset with the arm's gradients, from random weights; the UNet for all but the lab."""
    unet = f"model.network={{kind: unet, width: {width}}}", f"train.batch={batch}", "data.source=mnist"
    return schema.load(case, [*(unet if case != "lab" else ()), "train.init=random", "teacher.decay=0.99", *ARMS[arm]])


def trainers_of(case: str, width: int, batch: int, folder: Path, device: torch.device) -> dict[str, Trainer]:
    """A trainer for each arm."""
    settings = {arm: settings_of(case, arm, width, batch) for arm in ARMS}
    if case != "lab":
        return {arm: trainer_of(chosen, folder / arm, device) for arm, chosen in settings.items()}
    source = assembly.load_source(settings["global"], device)
    trainers = {}
    for arm, chosen in settings.items():
        run = RunDirectory(folder / arm)
        run.start(chosen, fresh=True)
        trainers[arm] = Trainer(chosen, run, source, device, lambda network, step: {})
    return trainers


def peak_of(trainer: Trainer) -> float:
    """Largest number of bytes above what was held before the step, by the CPU allocator's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        full_step(trainer)
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def measure(case: str, width: int, batch: int, rounds: int, warmup: int, device: torch.device) -> Measured:
    """All arms of one case, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = trainers_of(case, width, batch, Path(folder), device)
        for _ in range(warmup):
            for trainer in trainers.values():
                full_step(trainer)
        timings = [
            {arm: measuring.clocked(lambda t=trainer: full_step(t), device) for arm, trainer in trainers.items()}
            for _ in range(rounds)
        ]
        gradient = sum(p.numel() * p.element_size() for p in trainers["global"].engine.parameters)
        peaks = {arm: peak_of(trainer) for arm, trainer in trainers.items()}
        for trainer in trainers.values():
            trainer.log.close()
            trainer.events.close()
    return summarised(case, timings, peaks, gradient)


def summarised(
    case: str, timings: list[dict[str, Seconds]], peaks: dict[str, float], gradient: int
) -> Measured:  # fmt: skip
    """Medians over rounds."""
    wall = ratios([{arm: time.wall for arm, time in one.items()} for one in timings])
    cpu = ratios([{arm: time.cpu for arm, time in one.items()} for one in timings])
    step = Seconds(
        *(measuring.median([getattr(t["global"], clock) for t in timings]).value for clock in ("wall", "cpu"))
    )
    extra = {arm: (peak - peaks["global"]) / gradient for arm, peak in peaks.items() if arm != "global"}
    megabytes = {arm: peak / 1e6 for arm, peak in peaks.items()}
    return Measured(case, step, cpu, wall, megabytes, extra, gradient / 1e6, len(timings))


def ratios(rounds: list[dict[str, float]]) -> dict[str, Estimate]:
    """The three comparisons; telemetry weighs its arms as the default periods do."""
    return {
        "parameter / global": measuring.median([one["parameter"] / one["global"] for one in rounds]),
        "output / global": measuring.median([one["output"] / one["global"] for one in rounds]),
        "telemetry / none": measuring.median(
            [(0.9 * one["shares"] + 0.1 * one["all"]) / one["parameter"] for one in rounds]
        ),
    }


# --- output ---------------------------------------------------------------------------------------------


def table(lines: list[Measured], result: dict[str, Any]) -> str:
    """The result as Markdown."""
    where = result["machine"]
    times = [
        (m.case, f"{m.step.wall * 1000:.1f}", *(f"{m.cpu[name]}; {m.wall[name]}" for name in AIMS)) for m in lines
    ]  # fmt: skip
    columns = ("case", "global step (ms)", *(f"{name} (aim {aim:.2f})" for name, aim in AIMS.items()))
    arms = [arm for arm in ARMS if arm != "global"]
    memory = [
        (m.case, f"{m.gradient:.2f}", f"{m.peak['global']:.1f}", *(f"{m.extra[arm]:+.2f}" for arm in arms))
        for m in lines
    ]
    return (
        f"# Cost of taking the gradient apart\n\nUNet of width {result['width']}, batch {result['batch']} "
        f"(twinflow, tutorial) and the lab's perceptron (lab); {where['threads']} thread(s), {where['device']}, torch "
        f"{where['torch']}, load average {where['load_average']}, {result['data']}. Ratios: CPU time; wall time. "
        f"Medians over {lines[0].rounds} rounds, 95 % bootstrap intervals.\n\n"
        + measuring.markdown(columns, times)
        + "\nPeak memory of a step above that of *global*, in gradients:\n\n"
        + measuring.markdown(("case", "gradient (MB)", "peak of global (MB)", *arms), memory)
        + f"\nMade by `python benchmarks/gradients.py --rounds {lines[0].rounds}`.\n"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES, help="presets to measure")
    parser.add_argument("--width", type=int, default=16, help="channels of the UNet at full resolution")
    parser.add_argument("--batch", type=int, default=128, help="rows of a step")
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of each arm (ten times as many on the lab)")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps of each arm before")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=measuring.RESULTS / "gradients", help="files to write, no suffix")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    device = torch.device("cpu")
    lines = []
    for case in given.cases:
        rounds = given.rounds * (10 if case == "lab" else 1)
        lines.append(measure(case, given.width, given.batch, rounds, given.warmup, device))
    result = {
        "width": given.width,
        "batch": given.batch,
        "data": "MNIST digits" if measuring.mnist_root() else "random pixels",
        "machine": measuring.machine(device),
        "aims": AIMS,
        "cases": [asdict(line) for line in lines],
    }
    text = table(lines, result)
    measuring.write(given.out, result, text)
    print(text)


if __name__ == "__main__":
    main()
