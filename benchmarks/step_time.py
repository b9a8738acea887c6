"""How much a full training step costs above the network passes that its formulation cannot do without.

    python benchmarks/step_time.py [--width 32] [--batch 128] [--pairs 15] [--presets tutorial twinflow]

*Step*: the real Trainer's ``train_step`` and log row: data, draws, queries, passes, losses, backward, gradient
norm, EMA, optimizer, everything that watches it. *Floor*: the bare passes that the formulation needs, at the same
shapes on the same network. ``tutorial``: 4 forwards with backward and 8 forwards of B rows. ``twinflow`` divides its B
rows into e2e, mul, any (together the base rows) and adv: one forward with backward of B rows, and forwards of the
adv rows (their fresh one-step samples), of the base rows (2 for guidance, N for the recursion) and of the e2e rows
(2 for rectify). Both run in turn (step, floor, step, floor, …) in one process; the number is the median over pairs of
step / floor with a 95 % bootstrap interval over pairs.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import Estimate, Pixels, Seconds

from twinrl.flow.branches import allocate
from twinrl.flow.conditions import Condition
from twinrl.training import assembly, schema
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig
from twinrl.training.trainer import Trainer

LIMIT = 1.10
PRESETS = ("tutorial", "twinflow")


@dataclass(frozen=True)
class Passes:
    """Network passes of one step: the rows of each forward with backward, and of each forward without gradient."""

    with_backward: tuple[int, ...]
    forward: tuple[int, ...]

    def __str__(self) -> str:
        return f"forward+backward {_counted(self.with_backward)}; forward {_counted(self.forward)}"


def _counted(rows: tuple[int, ...]) -> str:
    return " + ".join(f"{rows.count(n)}×{n}" for n in dict.fromkeys(rows)) or "none"


def tutorial_passes(settings: RunConfig) -> Passes:
    """Own, instant, fake and one-step point; 2 for guidance, N each for base and one-step, 2 for rectify."""
    batch, terms = settings.train.batch, settings.terms
    recursions = terms["base"].order + terms["one_step_consistency"].order
    return Passes((batch,) * 4, (batch,) * (2 + recursions + 2))


def twinflow_passes(settings: RunConfig) -> Passes:
    """One forward+backward of all rows; fake samples on adv, guidance and recursion on base, rectify on e2e rows."""
    rows = allocate(settings.branches, settings.train.batch)
    base = rows["e2e"] + rows["mul"] + rows["any"]
    teacher = (base,) * (2 + settings.terms["base"].order)
    return Passes((settings.train.batch,), (rows["adv"], *teacher, rows["e2e"], rows["e2e"]))


FLOORS: dict[str, Callable[[RunConfig], Passes]] = {"tutorial": tutorial_passes, "twinflow": twinflow_passes}


@dataclass(frozen=True)
class Measured:
    """One preset's line: medians over pairs, the ratios with intervals."""

    preset: str
    passes: str
    step: Seconds
    floor: Seconds
    wall_ratio: Estimate
    cpu_ratio: Estimate
    pairs: int


# --- what is measured -----------------------------------------------------------------------------------


def settings_of(preset: str, width: int, batch: int) -> RunConfig:
    """The preset on MNIST's UNet, from random weights."""
    network = f"model.network={{kind: unet, width: {width}}}"
    return schema.load(
        preset, [network, f"train.batch={batch}", "train.init=random", "data.source=mnist", "gradients.space=none"]
    )


def trainer_of(settings: RunConfig, folder: Path, device: torch.device) -> Trainer:
    """A real trainer in a new run directory, on real digits where there are any."""
    run = RunDirectory(folder)
    run.start(settings, fresh=True)
    source = Pixels(measuring.mnist_root()).to(str(device))
    return Trainer(settings, run, source, device, lambda network, step: {})


def full_step(trainer: Trainer) -> None:
    """One step as the loop does it, log row included."""
    row, *_ = trainer.train_step()
    trainer.log.append(row)


class Floor:
    """The bare passes on the trainer's own networks, with inputs made beforehand."""

    def __init__(self, trainer: Trainer, passes: Passes):
        teacher = trainer.objective.teacher
        self.student, self.teacher, self.passes = teacher.student, teacher.recursion, passes
        self.inputs = {rows: self._inputs(trainer, rows) for rows in {*passes.with_backward, *passes.forward}}

    @staticmethod
    def _inputs(trainer: Trainer, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Condition]:
        x = torch.randn(rows, *trainer.source.latent_shape, device=trainer.device)
        t = torch.rand(rows, device=trainer.device)
        condition = trainer.source.condition(trainer.source.prompts(torch.arange(rows) % 10, 0, 0))
        return x, t, t / 2, condition

    def __call__(self) -> None:
        self.student.zero_grad()
        for rows in self.passes.with_backward:
            self.student(*self.inputs[rows]).square().mean().backward()
        with torch.no_grad():
            for rows in self.passes.forward:
                self.teacher(*self.inputs[rows])


def measure(preset: str, width: int, batch: int, pairs: int, warmup: int, device: torch.device) -> Measured:
    """Step and floor of one preset, in turn."""
    settings = settings_of(preset, width, batch)
    passes = FLOORS[preset](settings)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(settings, Path(folder) / "run", device)
        floor = Floor(trainer, passes)
        timings = measuring.interleaved(lambda: full_step(trainer), floor, pairs, warmup, device)
        trainer.log.close()
        trainer.events.close()
    return summarised(preset, passes, timings)


def summarised(preset: str, passes: Passes, timings: list[tuple[Seconds, Seconds]]) -> Measured:
    """Medians and ratios of a preset's timings."""

    def middle(which: int) -> Seconds:
        walls, cpus = [pair[which].wall for pair in timings], [pair[which].cpu for pair in timings]
        return Seconds(measuring.median(walls).value, measuring.median(cpus).value)

    return Measured(
        preset,
        str(passes),
        middle(0),
        middle(1),
        measuring.median([step.wall / floor.wall for step, floor in timings]),
        measuring.median([step.cpu / floor.cpu for step, floor in timings]),
        len(timings),
    )


# --- output ---------------------------------------------------------------------------------------------


def table(lines: list[Measured], result: dict[str, Any]) -> str:
    """The result as Markdown."""
    columns = ("preset", "step (s)", "floor (s)", "ratio, wall", "ratio, CPU time", "passes of the floor")
    rows = [(m.preset, f"{m.step.wall:.3f}", f"{m.floor.wall:.3f}", m.wall_ratio, m.cpu_ratio, m.passes) for m in lines]
    where = result["machine"]
    head = (
        f"# Step time over its floor\n\nUNet of width {result['width']} on 28×28 pixels, batch {result['batch']}, "
        f"{where['threads']} thread(s), {where['device']}, torch {where['torch']}, load average "
        f"{where['load_average']}, {result['data']}; medians over {lines[0].pairs} pairs, 95 % bootstrap intervals. "
        f"Target: ratio ≤ {LIMIT:.2f}.\n\n"
    )
    command = f"\nMade by `python benchmarks/step_time.py --width {result['width']} --batch {result['batch']}`.\n"
    return head + measuring.markdown(columns, rows) + command


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=PRESETS, choices=PRESETS, help="formulations to measure")
    parser.add_argument("--width", type=int, default=32, help="channels of the UNet at full resolution")
    parser.add_argument("--batch", type=int, default=128, help="rows of a step")
    parser.add_argument("--pairs", type=int, default=15, help="timed steps and floors of each preset")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps and floors before")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=measuring.RESULTS / "step_time", help="files to write, no suffix")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    device = assembly.device_of(schema.load("tutorial", [f"machine.device={given.device}"]))
    lines = [measure(p, given.width, given.batch, given.pairs, given.warmup, device) for p in given.presets]
    result = {
        "width": given.width,
        "batch": given.batch,
        "data": "10,000 MNIST digits" if measuring.mnist_root() else "random pixels",
        "machine": measuring.machine(device),
        "presets": [asdict(line) for line in lines],
    }
    text = table(lines, result)
    measuring.write(given.out, result, text)
    print(text)


if __name__ == "__main__":
    main()
