"""How good one-step samples are after a given training time: ``tutorial`` against ``twinflow`` on MNIST's digits.

    python benchmarks/time_to_quality.py --out runs/time_to_quality [--seeds 2] [--horizons 150 300 600]
        [--width 8] [--batch 64] [--lrs 2e-4 6e-4 2e-3] [--init teacher]

Both formulations get the same network, batch, data, start (the pretrained flow model, or random weights) and tuning
budget: every learning rate
of the list once, for the time of the middle horizon, judged on the validation split under a seed of its own. The
best one then trains to the longest horizon with every seed and is judged on the test split. The rate is constant,
so the shorter horizons are the beginnings of the same runs. Horizons are steps of ``tutorial``; ``twinflow`` gets
the steps that take the same time, by the cost of a step measured once in turn. Training time is the sum over
steps, without evaluation. Started again with the same arguments, the script goes on where it was stopped:
finished runs are skipped, unfinished ones resume, and more seeds may be asked for.
"""

import argparse
import json
import math
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import measuring
import numpy as np
import torch

from twinrl.config.errors import InputError
from twinrl.evaluation import LabelProtocol
from twinrl.evaluation.protocol import HeldOut
from twinrl.flow.source import Source
from twinrl.run import names, runlog
from twinrl.sampling import few_step
from twinrl.training import assembly, schema
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig
from twinrl.training.trainer import StepOutcome, Trainer

REFERENCE, CONTENDER = "tutorial", "twinflow"
FORMULATIONS = (REFERENCE, CONTENDER)
CPU_SECONDS = "perf/step_cpu_seconds"
CLOCKS = {"wall": names.STEP_SECONDS, "cpu": CPU_SECONDS}
DISTANCE = names.val("fd", 1)
TUNING_SEED = 1000
AIM = 1 / 3
CALIBRATION_PAIRS = 5

Clock = Literal["wall", "cpu"]


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        width, batch: of the UNet and of a step.
        lrs: learning rates tried by each formulation.
        horizons: steps of ``tutorial``, ascending; tuning runs are as long as the middle one.
        points: evaluations up to the last horizon.
        init: start of every run, ``teacher`` or ``random``.
        cost_ratio: time of a ``tutorial`` step over that of a ``twinflow`` step.
        n: samples judged.
    """

    width: int
    batch: int
    lrs: tuple[float, ...]
    horizons: tuple[int, ...]
    points: int
    n: int
    init: str
    cost_ratio: float

    @property
    def tuning_horizon(self) -> int:
        """The middle horizon (the longer of two)."""
        return self.horizons[len(self.horizons) // 2]

    def steps(self, formulation: str, horizon: int) -> int:
        """Steps of a formulation that take the time of ``horizon`` steps of ``tutorial``."""
        return horizon if formulation == REFERENCE else round(horizon * self.cost_ratio)

    def settings(self, formulation: str, lr: float, seed: int, horizon: int, folder: Path) -> RunConfig:
        """The configuration of one run, evaluated at equal intervals of time."""
        last = self.steps(formulation, self.horizons[-1])
        return schema.load(
            formulation,
            [
                f"model.network={{kind: unet, width: {self.width}}}", "data.source=mnist", f"train.init={self.init}",
                f"train.batch={self.batch}", f"train.steps={self.steps(formulation, horizon)}", f"optim.lr={lr!r}",
                f"evaluation.every={max(1, last // self.points)}", f"evaluation.n={self.n}", "evaluation.nfe=[1]",
                "evaluation.velocity_rows=20", f"checkpoint.every={max(1, last // 5)}", "checkpoint.keep=1",
                f"seed={seed}", f"run.dir={folder}", "tracking.mlflow=false", "machine.device=cpu",
            ],
        )  # fmt: skip


# --- training -------------------------------------------------------------------------------------------


class TimedTrainer(Trainer):
    """A trainer that also logs the CPU time of every step, which other processes hardly change."""

    def train_step(self) -> StepOutcome:
        started = time.process_time()
        made = super().train_step()
        return made._replace(row=made.row | {CPU_SECONDS: time.process_time() - started})


def trained(settings: RunConfig, source: Source, protocol: LabelProtocol) -> RunDirectory:
    """The finished run of ``settings``: there already, resumed, or trained now."""
    run = RunDirectory(settings.directory)
    if run.result is not None:
        return run
    if not run.exists:
        run.start(settings, fresh=False)
    device = torch.device("cpu")
    trainer = TimedTrainer(
        settings, run, source, device, lambda network, step: protocol.evaluate(network, [few_step(1)])
    )
    trainer.resume()
    print(f"{run.path.name}: from step {trainer.step} to {settings.train.steps}", flush=True)
    outcome = trainer.train()
    run.finish({"status": outcome.status, "step": outcome.step, "message": outcome.message})
    return run


@dataclass(frozen=True)
class Curve:
    """Distance over training time: steps, seconds of training up to them by either clock, Fréchet distances."""

    steps: list[int]
    wall: list[float]
    cpu: list[float]
    distance: list[float]

    @classmethod
    def of(cls, run: RunDirectory) -> "Curve":
        """The evaluations in a run's log."""
        rows = runlog.read(run.log)
        wall, cpu = (np.cumsum([row[name] for row in rows]).tolist() for name in CLOCKS.values())
        judged = [i for i, row in enumerate(rows) if DISTANCE in row]
        return cls(
            [rows[i]["step"] for i in judged],
            [wall[i] for i in judged],
            [cpu[i] for i in judged],
            [rows[i][DISTANCE] for i in judged],
        )

    def seconds(self, clock: Clock) -> list[float]:
        """Training time at the evaluations."""
        return self.wall if clock == "wall" else self.cpu

    def at(self, step: int, clock: Clock) -> tuple[float, float]:
        """(seconds, distance) at the last evaluation up to ``step``."""
        i = max(i for i, s in enumerate(self.steps) if s <= step or i == 0)
        return self.seconds(clock)[i], self.distance[i]

    def reaches(self, target: float, clock: Clock) -> float:
        """Seconds until the distance is at most ``target`` at two evaluations in a row; infinite if never."""
        good = [distance <= target for distance in self.distance]
        for i, seconds in enumerate(self.seconds(clock)):
            if all(good[i : i + 2]):
                return seconds
        return math.inf


# --- the study ------------------------------------------------------------------------------------------


class Study:
    """Tuning, then the runs that are compared.

    Arguments:
        plan: what is compared. folder: where the runs go.
        source: the digits with their judge.
    """

    def __init__(self, plan: Plan, folder: Path, source: Source):
        self.plan, self.folder, self.source = plan, folder, source
        self.protocols: dict[str, LabelProtocol] = {}

    def protocol(self, split: HeldOut) -> LabelProtocol:
        """The fixed protocol on a split, made once."""
        if split not in self.protocols:
            settings = self.plan.settings(REFERENCE, self.plan.lrs[0], 0, self.plan.horizons[0], self.folder)
            self.protocols[split] = LabelProtocol(self.source, settings.evaluation, split)
        return self.protocols[split]

    def tune(self) -> dict[str, dict[float, float]]:
        """Formulation → learning rate → distance on the validation split at the end of the middle horizon."""
        plan = self.plan
        found: dict[str, dict[float, float]] = {name: {} for name in FORMULATIONS}
        for lr in plan.lrs:
            for name in FORMULATIONS:
                settings = plan.settings(name, lr, TUNING_SEED, plan.tuning_horizon, self.folder / "tuning")
                found[name][lr] = Curve.of(trained(settings, self.source, self.protocol("validation"))).distance[-1]
        return found

    def compare(self, best: dict[str, float], seeds: int) -> dict[str, list[Curve]]:
        """Formulation → the curve of every seed on the test split, to the longest horizon."""
        curves: dict[str, list[Curve]] = {name: [] for name in FORMULATIONS}
        for seed in range(seeds):
            for name in FORMULATIONS:
                settings = self.plan.settings(name, best[name], seed, self.plan.horizons[-1], self.folder / "runs")
                curves[name].append(Curve.of(trained(settings, self.source, self.protocol("test"))))
        return curves


def best_rates(tuning: dict[str, dict[float, float]]) -> dict[str, float]:
    """Formulation → the learning rate with the least distance; a rate that diverged loses."""

    def distance(item: tuple[float, float]) -> float:
        return item[1] if math.isfinite(item[1]) else math.inf

    return {name: min(found.items(), key=distance)[0] for name, found in tuning.items()}


@dataclass(frozen=True)
class Line:
    """One horizon: the reference's time and distance, and when the contender gets there (per seed; medians)."""

    horizon: int
    reference_seconds: float
    reference_distance: float
    contender_distance: float
    contender_seconds: float
    ratio: float
    ratios: list[float]


def line(plan: Plan, curves: dict[str, list[Curve]], horizon: int, clock: Clock) -> Line:
    """The comparison at one horizon; the target is the reference's mean distance over seeds."""
    ends = [curve.at(horizon, clock) for curve in curves[REFERENCE]]
    seconds, target = (float(np.mean(values)) for values in zip(*ends, strict=True))
    same = [curve.at(plan.steps(CONTENDER, horizon), clock)[1] for curve in curves[CONTENDER]]
    reached = [curve.reaches(target, clock) for curve in curves[CONTENDER]]
    ratios = [r / seconds for r in reached]
    return Line(
        horizon, seconds, target, float(np.mean(same)), float(np.median(reached)), float(np.median(ratios)), ratios
    )


# --- cost -----------------------------------------------------------------------------------------------


def cost_ratio(width: int, batch: int) -> float:
    """CPU time of a ``tutorial`` step over that of a ``twinflow`` step, both measured in turn."""
    from step_time import full_step, settings_of, trainer_of

    with tempfile.TemporaryDirectory() as folder:
        first, second = (
            trainer_of(settings_of(name, width, batch), Path(folder) / name, torch.device("cpu"))
            for name in FORMULATIONS
        )
        pairs = measuring.interleaved(
            lambda: full_step(first), lambda: full_step(second), CALIBRATION_PAIRS, 2, torch.device("cpu")
        )
    return measuring.median([a.cpu / b.cpu for a, b in pairs]).value


def plan_of(given: argparse.Namespace) -> Plan:
    """The plan of the arguments: read back from ``plan.json`` where the study was begun, else calibrated now.

    Raises:
        InputError: the study was begun with other arguments.
    """
    wanted = {
        "width": given.width,
        "batch": given.batch,
        "lrs": tuple(given.lrs),
        "horizons": tuple(sorted(given.horizons)),
        "points": given.points,
        "n": given.n,
        "init": given.init,
    }
    path = given.out / "plan.json"
    if not path.is_file():
        plan = Plan(**wanted, cost_ratio=round(cost_ratio(given.width, given.batch), 3))
        given.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(plan), indent=1) + "\n")
        return plan
    begun = json.loads(path.read_text())
    begun |= {name: tuple(begun[name]) for name in ("lrs", "horizons")}
    different = [name for name, value in wanted.items() if begun[name] != value]
    if different:
        raise InputError(
            f"{given.out} holds a study with another plan",
            got=", ".join(f"{name}={wanted[name]}" for name in different),
            expected=", ".join(f"{name}={begun[name]}" for name in different),
            fix="pass the same values, or another --out",
        )
    return Plan(**begun)


# --- output ---------------------------------------------------------------------------------------------


def table(result: dict[str, Any], lines: list[Line]) -> str:
    """The result as Markdown."""
    plan, where = result["plan"], result["machine"]
    seconds = "s" if result["clock"] == "wall" else "s of CPU"
    tuning = measuring.markdown(
        ("learning rate", *FORMULATIONS),
        [(f"{lr:g}", *(f"{result['tuning'][name][lr]:.2f}" for name in FORMULATIONS)) for lr in plan["lrs"]],
    )
    edges = [f"{name} at {lr:g}" for name, lr in result["best"].items() if lr in (min(plan["lrs"]), max(plan["lrs"]))]
    columns = (
        f"{REFERENCE} steps", f"its time ({seconds})", "its distance", f"{CONTENDER}'s at that time",
        f"{CONTENDER} reaches it at ({seconds})", "ratio of times", "per seed",
    )  # fmt: skip
    rows = [
        (
            x.horizon, f"{x.reference_seconds:.0f}", f"{x.reference_distance:.2f}", f"{x.contender_distance:.2f}",
            f"{x.contender_seconds:.0f}", f"{x.ratio:.2f}", " ".join(f"{r:.2f}" for r in x.ratios),
        )
        for x in lines
    ]  # fmt: skip
    return (
        f"# Time to quality\n\nFréchet distance of {plan['n']} samples at 1 NFE in judge features (test split, floor "
        f"{result['floor']:.2f}) against training time: {result['data']}, UNet of width {plan['width']}, batch "
        f"{plan['batch']}, start: {plan['init']}, {result['seeds']} seed(s); {where['device']}, "
        f"{where['threads']} thread(s), torch {where['torch']}. A step of {REFERENCE} costs "
        f"{plan['cost_ratio']:.2f} steps of {CONTENDER}. A distance "
        "counts as reached when two evaluations in a row have it. Aim: ratio ≤ 1/3.\n\n"
        f"{measuring.markdown(columns, rows)}\n"
        f"Tuning ({result['tuning_horizon']} steps of {REFERENCE} or their time, seed {TUNING_SEED}, validation "
        f"split); best: {', '.join(f'{name} {lr:g}' for name, lr in result['best'].items())}"
        f"{'; at the edge of the list: ' + ', '.join(edges) if edges else ''}.\n\n{tuning}"
    )


def draw(curves: dict[str, list[Curve]], lines: list[Line], floor: float, clock: Clock, path: Path) -> None:
    """The whole curves: every seed thin, the mean thick, the horizons and the real-against-real floor."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
    for name, colour in zip(FORMULATIONS, ("tab:orange", "tab:blue"), strict=True):
        for curve in curves[name]:
            axes.plot(curve.seconds(clock), curve.distance, color=colour, alpha=0.35, linewidth=1)
        seconds = np.mean([curve.seconds(clock) for curve in curves[name]], axis=0)
        axes.plot(seconds, np.mean([c.distance for c in curves[name]], axis=0), color=colour, marker=".", label=name)
    for x in lines:
        axes.axvline(x.reference_seconds, color="grey", linewidth=0.7, linestyle=":")
        if math.isfinite(x.contender_seconds):
            axes.plot(
                [x.contender_seconds, x.reference_seconds], [x.reference_distance] * 2, color="black", linewidth=0.8
            )
    axes.axhline(floor, color="green", linewidth=0.8, linestyle="--", label="real against real")
    axes.set(xlabel=f"training time ({'wall' if clock == 'wall' else 'CPU'} seconds)", yscale="log")
    axes.set(ylabel="Fréchet distance at 1 NFE", title="Lines: when twinflow has the tutorial's distance")
    axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def report(study: Study, tuning: dict[str, dict[float, float]], curves: dict[str, list[Curve]], given: Any) -> None:
    """Write table, numbers and figure of either clock, and print the chosen one."""
    floor = study.protocol("test").floor["fd"]
    for clock in ("wall", "cpu"):
        lines = [line(study.plan, curves, horizon, clock) for horizon in study.plan.horizons]
        result = {
            "plan": asdict(study.plan),
            "tuning_horizon": study.plan.tuning_horizon,
            "clock": clock,
            "seeds": len(curves[REFERENCE]),
            "data": f"{len(study.source.train):,} training digits of MNIST",
            "machine": measuring.machine(torch.device("cpu")),
            "floor": floor,
            "tuning": tuning,
            "best": best_rates(tuning),
            "lines": [asdict(x) for x in lines],
            "curves": {name: [asdict(curve) for curve in found] for name, found in curves.items()},
        }
        path = given.out / f"time_to_quality_{clock}"
        text = table(result, lines)
        measuring.write(path, result, text)
        draw(curves, lines, floor, clock, path.with_suffix(".png"))
        if clock == given.clock:
            print(text)


def arguments_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/time_to_quality"), help="folder of the study")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each formulation that are compared")
    parser.add_argument("--horizons", type=int, nargs="+", default=[150, 300, 600], help="steps of tutorial")
    parser.add_argument("--lrs", type=float, nargs="+", default=[2e-4, 6e-4, 2e-3], help="tried by both")
    parser.add_argument("--width", type=int, default=8, help="channels of the UNet at full resolution")
    parser.add_argument("--batch", type=int, default=64, help="rows of a step")
    parser.add_argument("--init", choices=("teacher", "random"), default="teacher", help="start of every run")
    parser.add_argument("--points", type=int, default=30, help="evaluations up to the last horizon")
    parser.add_argument("--n", type=int, default=500, help="samples judged")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="which table is printed; both are written"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, source: Source | None = None) -> None:
    """The command line; ``source`` stands in for the digits in tests."""
    given = arguments_of(arguments)
    torch.set_num_threads(given.threads)
    plan = plan_of(given)
    study = Study(plan, given.out, source or _digits())
    tuning = study.tune()
    report(study, tuning, study.compare(best_rates(tuning), given.seeds), given)


def _digits() -> Source:
    settings = schema.load(REFERENCE, ["data.source=mnist", f"data.root={measuring.mnist_root() or 'null'}"])
    return assembly.load_source(settings, torch.device("cpu"))


if __name__ == "__main__":
    main()
