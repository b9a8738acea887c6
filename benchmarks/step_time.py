"""How much a full training step costs above the network passes that its formulation cannot do without.

    python benchmarks/step_time.py [--presets lab recommended published twinflow tutorial] [--against COMMIT]

*Step*: the real Trainer's ``train_step`` and log row: data, draws, queries, passes, losses, backward, per-term rules,
norms, EMA, optimizer, everything that watches it, at the preset's own telemetry. *Floor*: the bare passes that the step
needs, at the same shapes on the same network, under the same autocast. *Joined floor*: the same with one forward and
backward of all B rows, as where no gradient is taken apart.

``tutorial`` and ``twinflow`` run on MNIST's UNet with ``gradients.space=none``; ``lab``, ``recommended`` (before its
reward is on) and ``published`` on the embedded lab's data and perceptron with every term's gradient apart, as the
presets say; ``lab-output`` is ``lab`` in output space.

Passes. ``tutorial``: 4 forwards with backward and 8 forwards of B rows. The others divide their B rows into e2e, mul,
any (together the base rows) and adv: one forward with backward of B rows, and forwards of the adv rows (their fresh
one-step samples), of the base rows (2 for guidance where there is some, N for the recursion) and of twice the e2e rows
(both branches of rectify). With every term apart there are three forwards instead of the one: of the e2e rows, of the
other base rows, of the adv rows. Base goes back through the first two, rectify through the first, the fake branch
through the third.

Step, floor and joined floor run in turn in one process. The number is the median over rounds of step / floor with a
95 % bootstrap interval. ``--against`` measures another commit in the same way, preset by preset, right after this one.
"""

import argparse
import json
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

PRESETS = ("tutorial", "twinflow")
LAB = {"lab": (), "recommended": (), "published": (), "lab-output": ("gradients.space=output",)}
LIMITS = {"tutorial": 1.10, "twinflow": 1.10, "lab": 1.35, "recommended": 1.45, "published": 1.8, "lab-output": 1.2}


@dataclass(frozen=True)
class Passes:
    """Network passes of one step.

    Attributes:
        with_backward: rows of each forward with gradient.
        forward: rows of each forward without.
        backward: the forwards, by position in ``with_backward``, through which each backward goes; each its own.
    """

    with_backward: tuple[int, ...]
    forward: tuple[int, ...]
    backward: tuple[tuple[int, ...], ...] = ()

    @property
    def backs(self) -> tuple[tuple[int, ...], ...]:
        """What :attr:`backward` says, or one for every forward."""
        return self.backward or tuple((i,) for i in range(len(self.with_backward)))

    def __str__(self) -> str:
        back = "+".join(str(sum(self.with_backward[i] for i in one)) for one in self.backs)
        return f"with gradient {_counted(self.with_backward)}, back through {back}; without {_counted(self.forward)}"


def _counted(rows: tuple[int, ...]) -> str:
    return " + ".join(f"{rows.count(n)}×{n}" for n in dict.fromkeys(rows)) or "none"


def tutorial_passes(settings: RunConfig) -> Passes:
    """Own, instant, fake and one-step point; 2 for guidance, N each for base and one-step, 2 for rectify."""
    batch, terms = settings.train.batch, settings.terms
    recursions = terms["base"].order + terms["one_step_consistency"].order
    return Passes((batch,) * 4, (batch,) * (2 + recursions + 2))


def twinflow_passes(settings: RunConfig) -> Passes:
    """The passes of a batch that is divided into e2e, mul, any and adv."""
    rows = allocate(settings.branches, settings.train.batch)
    base = rows["e2e"] + rows["mul"] + rows["any"]
    guidance = 2 if settings.guidance.strength else 0
    forward = (rows["adv"], *(base,) * (guidance + settings.terms["base"].order), 2 * rows["e2e"])
    if settings.gradients.space != "parameter":
        return Passes((settings.train.batch,), forward)
    return Passes((base - rows["e2e"], rows["e2e"], rows["adv"]), forward, ((0, 1), (1,), (2,)))


def passes_of(settings: RunConfig) -> Passes:
    """The passes that a step of these settings cannot do without."""
    return tutorial_passes(settings) if "one_step_consistency" in settings.terms else twinflow_passes(settings)


def joined(settings: RunConfig) -> Passes:
    """Those of the same formulation where no gradient is taken apart."""
    together = settings.gradients.model_copy(update={"space": "none"})
    return passes_of(settings.model_copy(update={"gradients": together}))


@dataclass(frozen=True)
class Measured:
    """One preset's line: medians over rounds, the ratios with intervals."""

    preset: str
    passes: str
    step: Seconds
    floor: Seconds
    wall_ratio: Estimate
    cpu_ratio: Estimate
    joined_ratio: Estimate  # CPU time
    pairs: int


# --- what is measured -----------------------------------------------------------------------------------


def settings_of(preset: str, width: int, batch: int, *overrides: str) -> RunConfig:
    """The preset on MNIST's UNet or, where it is of the lab, on its own network; from random weights."""
    if preset in LAB:
        return schema.load(preset.removesuffix("-output"), ["train.init=random", *LAB[preset], *overrides])
    network = f"model.network={{kind: unet, width: {width}}}"
    fixed = [network, f"train.batch={batch}", "train.init=random", "data.source=mnist", "gradients.space=none"]
    return schema.load(preset, [*fixed, *overrides])


def trainer_of(settings: RunConfig, folder: Path, device: torch.device) -> Trainer:
    """A real trainer in a new run directory, on real digits where there are any."""
    run = RunDirectory(folder)
    run.start(settings, fresh=True)
    on_mnist = settings.data.source == "mnist"
    pixels = Pixels(measuring.mnist_root()).to(str(device)) if on_mnist else assembly.load_source(settings, device)
    return Trainer(settings, run, pixels, device, lambda network, step: {})


def full_step(trainer: Trainer) -> None:
    """One step as the loop does it, log row included."""
    row, *_ = trainer.train_step()
    trainer.log.append(row)


class Floor:
    """The bare passes on the trainer's own networks, with inputs made beforehand."""

    def __init__(self, trainer: Trainer, passes: Passes):
        self.objective, self.passes = trainer.objective, passes
        self.inputs = {rows: self._inputs(trainer, rows) for rows in {*passes.with_backward, *passes.forward}}

    @staticmethod
    def _inputs(trainer: Trainer, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Condition]:
        x = torch.randn(rows, *trainer.source.latent_shape, device=trainer.device)
        t = torch.rand(rows, device=trainer.device)
        condition = trainer.source.condition(trainer.source.prompts(torch.arange(rows) % 10, 0, 0))
        return x, t, t / 2, condition

    def __call__(self) -> None:
        student, teacher = self.objective.teacher.student, self.objective.teacher.recursion
        waiting = list(self.passes.backs)
        outputs: dict[int, torch.Tensor] = {}
        while waiting:
            student.zero_grad()
            through = waiting.pop(0)
            for i in through:
                if i not in outputs:
                    outputs[i] = self.objective.call(student, *self.inputs[self.passes.with_backward[i]])
            total = torch.stack([outputs[i].square().mean() for i in through]).sum()
            later = {i for one in waiting for i in one}
            total.backward(retain_graph=bool(later.intersection(through)))
            outputs = {i: F for i, F in outputs.items() if i in later}
        with torch.no_grad():
            for rows in self.passes.forward:
                self.objective.call(teacher, *self.inputs[rows])


def measure(preset: str, width: int, batch: int, pairs: int, warmup: int, device: torch.device) -> Measured:
    """Step, floor and joined floor of one preset, in turn; ten at a time where they are short."""
    settings = settings_of(preset, width, batch)
    passes, times = passes_of(settings), 10 if preset in LAB else 1
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(settings, Path(folder) / "run", device)
        runs = (lambda: full_step(trainer), Floor(trainer, passes), Floor(trainer, joined(settings)))
        for _ in range(warmup):
            for run in runs:
                _repeated(run, times)
        timings = [tuple(measuring.clocked(lambda r=run: _repeated(r, times), device) for run in runs)  # type: ignore[misc]
                   for _ in range(pairs)]  # fmt: skip
        trainer.log.close()
        trainer.events.close()
    return summarised(preset, passes, [tuple(Seconds(t.wall / times, t.cpu / times) for t in one) for one in timings])  # type: ignore[misc]


def _repeated(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()


def summarised(preset: str, passes: Passes, timings: list[tuple[Seconds, Seconds, Seconds]]) -> Measured:
    """Medians and ratios of a preset's timings."""

    def middle(which: int) -> Seconds:
        walls, cpus = [one[which].wall for one in timings], [one[which].cpu for one in timings]
        return Seconds(measuring.median(walls).value, measuring.median(cpus).value)

    return Measured(
        preset,
        str(passes),
        middle(0),
        middle(1),
        measuring.median([step.wall / floor.wall for step, floor, _ in timings]),
        measuring.median([step.cpu / floor.cpu for step, floor, _ in timings]),
        measuring.median([step.cpu / together.cpu for step, _, together in timings]),
        len(timings),
    )


def of_tree(tree: Path, preset: str, given: argparse.Namespace) -> dict[str, Any]:
    """The preset's line, measured in a process of its own on another source tree."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "line"
        options = {"width": given.width, "batch": given.batch, "pairs": given.pairs, "warmup": given.warmup}
        options |= {"threads": given.threads, "device": given.device, "presets": preset, "out": out}
        measuring.run_in(
            tree, __file__, *(word for name, value in options.items() for word in (f"--{name}", str(value)))
        )
        return json.loads(out.with_suffix(".json").read_text())["presets"][0]  # type: ignore[no-any-return]


# --- output ---------------------------------------------------------------------------------------------


def table(lines: list[Measured], result: dict[str, Any]) -> str:
    """The result as Markdown."""
    columns = ["preset", "step (ms)", "floor (ms)", "ratio, CPU time", "limit", "over the joined floor", "ratio, wall"]
    rows = [
        [m.preset, f"{1e3 * m.step.cpu:.1f}", f"{1e3 * m.floor.cpu:.1f}", m.cpu_ratio, f"{LIMITS[m.preset]:.2f}",
         m.joined_ratio, m.wall_ratio]
        for m in lines
    ]  # fmt: skip
    if result["against"]:
        columns += [f"ratio at {result['against']}", "its step over this one's"]
        for row, m in zip(rows, lines, strict=True):
            old = result["before"][m.preset]["cpu_ratio"]["value"]
            row += [f"{old:.3f}", f"{old / m.cpu_ratio.value:.2f}"]
    where = result["machine"]
    head = (
        f"# Step time over its floor\n\ntutorial and twinflow: UNet of width {result['width']} on 28×28 pixels, batch "
        f"{result['batch']}, {result['data']}, no gradient apart; the others: the lab's perceptron, every gradient "
        f"apart, in lab-output at the predictions. {where['threads']} thread(s), {where['device']}, torch "
        f"{where['torch']}, load average {where['load_average']}; "
        f"medians over {lines[0].pairs} rounds, 95 % bootstrap intervals; CPU time unless it says wall.\n\n"
    )
    passes = "\n".join(f"- {m.preset}: {m.passes}" for m in lines)
    options = f"--width {result['width']} --batch {result['batch']} --presets {' '.join(m.preset for m in lines)}"
    against = f" --against {result['against']}" if result["against"] else ""
    made = f"\nMade by `python benchmarks/step_time.py {options}{against}`.\n"
    return f"{head}{measuring.markdown(columns, rows)}\nRows of the floor's passes:\n\n{passes}\n{made}"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=PRESETS, choices=LIMITS, help="formulations to measure")
    parser.add_argument("--width", type=int, default=32, help="channels of the UNet at full resolution")
    parser.add_argument("--batch", type=int, default=128, help="rows of a step on the UNet")
    parser.add_argument("--pairs", type=int, default=15, help="timed rounds of each preset")
    parser.add_argument("--warmup", type=int, default=2, help="untimed rounds before")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--against", help="another commit to measure as well")
    parser.add_argument("--out", type=Path, default=measuring.RESULTS / "step_time", help="files to write, no suffix")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    device = assembly.device_of(schema.load("tutorial", [f"machine.device={given.device}"]))
    lines, before = [], {}
    for preset in given.presets:
        lines.append(measure(preset, given.width, given.batch, given.pairs, given.warmup, device))
        if given.against:
            with measuring.worktree(given.against) as tree:
                before[preset] = of_tree(tree, preset, given)
    result = {
        "width": given.width,
        "batch": given.batch,
        "data": "10,000 MNIST digits" if measuring.mnist_root() else "random pixels",
        "machine": measuring.machine(device),
        "presets": [asdict(line) for line in lines],
        "against": given.against,
        "before": before,
    }
    text = table(lines, result)
    measuring.write(given.out, result, text)
    print(text)


if __name__ == "__main__":
    main()
