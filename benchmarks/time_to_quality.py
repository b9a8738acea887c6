"""Which formulation reaches the tutorial's quality at one and two steps for the least compute?

    python benchmarks/time_to_quality.py                        # every row; stopped with Ctrl-C, it goes on
    python benchmarks/time_to_quality.py --rows tutorial lab    # some of the rows
    python benchmarks/time_to_quality.py --again lab            # one row from scratch: cost, tuning and runs
    python benchmarks/time_to_quality.py --also mine lab terms.rectify.weight=2    # a row of your own
    python benchmarks/time_to_quality.py --table                # table and picture of the stored trials; no training

A row is a preset with overrides. All rows have the same network, data, batch and start: the laboratory's pretrained
flow model. Compute is counted twice: CPU seconds of training steps, without evaluation, and floating-point operations.
torch counts these in one step, teachers and networks of terms included. First the cost of a step is measured for each
row. A run of it then gets as many steps as take the time of the tutorial's.

Every row tries every learning rate of the list once, for half of that time, under a seed of its own. The validation
split judges: the geometric mean of the Fréchet distances at 1 and 2 NFE. The best rate trains with every seed. The test
split judges that, at equal intervals of compute. The target of a seed is the tutorial's distance at the end of the same
seed. A run has reached it where two evaluations in a row have it, or the last one. What never does is counted, not
guessed. A number is an upper bound (≤) where a run has it at its first evaluation. share=0.25 among the words of a row
gives it a quarter of the time, and evaluations as many: a closer look.

Trials are stored in RESULTS.json as they end; runs are under --out. Table and picture need the stored trials alone.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time
from typing import Any, Literal

import measuring
import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.flop_counter import FlopCounterMode

from twinrl.config.errors import InputError
from twinrl.evaluation import LabelProtocol
from twinrl.evaluation.protocol import HeldOut
from twinrl.evaluation.table import mean_interval
from twinrl.flow.source import Source
from twinrl.run import names, runlog
from twinrl.training import assembly, schema
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig
from twinrl.training.trainer import StepOutcome, Trainer

REFERENCE = "tutorial"
ROWS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in (REFERENCE, "rcgm", "twinflow", "lab", "simpletuner", "meanflow", "dmd2", "fast")},
    "dmd-ttur": (
        "dmd2", "terms.dmd.updates=2", "terms.dmd.own_lr=2e-3", "lr_policy.kind=constant",
        "teacher={kind: frozen, guidance: ema, decay: 0.98}",
    ),
    **{f"{name}-quarter": (name, "share=0.25") for name in ("rcgm", "dmd2", "fast")},
}  # fmt: skip
"""Name → preset and overrides. ``share=…`` is of the tutorial's time: a closer look at rows that get there early."""
SHARE = "share="
NFE = (1, 2)
TUNING_SEED = 1000
CPU_SECONDS = "perf/step_cpu_seconds"
PAIRS = 10
"""Steps of either row in a calibration."""
CPU = torch.device("cpu")

Unit = Literal["seconds", "operations"]


@dataclass(frozen=True)
class Plan:
    """What all rows share.

    Attributes:
        batch: rows of a step.
        steps: of a run of the tutorial.
        points: evaluations of a run, at equal intervals.
        n: samples judged.
        lrs: learning rates that every row tries.
        common: overrides of every row: data, network, start.
    """

    batch: int
    steps: int
    points: int
    n: int
    lrs: tuple[float, ...]
    common: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A formulation and its cost.

    Attributes:
        recipe: preset, then overrides.
        seconds, operations: of a step.
        steps: of a run, a multiple of the plan's points.
    """

    recipe: tuple[str, ...]
    seconds: float
    operations: int
    steps: int


@dataclass(frozen=True)
class Trial:
    """One run: steps, CPU seconds of training and the distances at each of :data:`NFE`, an evaluation each."""

    row: str
    lr: float
    seed: int
    status: str
    steps: list[int]
    seconds: list[float]
    distances: list[list[float]]

    @classmethod
    def of(cls, row: str, lr: float, seed: int, run: RunDirectory) -> "Trial":
        """The evaluations in a run's log."""
        rows = runlog.read(run.log)
        spent = np.cumsum([each[CPU_SECONDS] for each in rows])
        judged = [i for i, each in enumerate(rows) if names.val("fd", NFE[0]) in each]
        steps, seconds = [rows[i]["step"] for i in judged], [round(float(spent[i]), 3) for i in judged]
        distances = [[round(rows[i][names.val("fd", e)], 4) for i in judged] for e in NFE]
        return cls(row, lr, seed, (run.result or {})["status"], steps, seconds, distances)

    @property
    def tuning(self) -> bool:
        """Whether it chose a learning rate."""
        return self.seed == TUNING_SEED

    @property
    def score(self) -> float:
        """Geometric mean of the last distances; infinite where one is not finite."""
        ends = [self.end(evaluations) for evaluations in NFE]
        return math.prod(ends) ** (1 / len(ends)) if all(map(math.isfinite, ends)) else math.inf

    def end(self, evaluations: int) -> float:
        """The last distance; infinite where the run diverged."""
        return self.distances[NFE.index(evaluations)][-1] if self.status == "finished" else math.inf

    def reaches(self, target: float, evaluations: int) -> int | None:
        """The evaluation from which on the distance is at most ``target`` twice in a row; None if there is none."""
        good = [distance <= target for distance in self.distances[NFE.index(evaluations)]]
        return next((i for i in range(len(good)) if all(good[i : i + 2])), None)

    def spent(self, at: int, unit: Unit, row: Row) -> float:
        """Compute up to evaluation number ``at``."""
        return self.seconds[at] if unit == "seconds" else float(self.steps[at] * row.operations)


# --- training -------------------------------------------------------------------------------------------


class TimedTrainer(Trainer):
    """A trainer that also logs the CPU time of every step, which other processes hardly change."""

    after: Callable[[], object] = staticmethod(lambda: None)

    def train_step(self) -> StepOutcome:
        started = process_time()
        made = super().train_step()
        spent = process_time() - started
        self.after()
        return made._replace(row=made.row | {CPU_SECONDS: spent})


def trained(settings: RunConfig, source: Source, protocol: LabelProtocol, after: Callable[[], object]) -> RunDirectory:
    """The finished run of ``settings``: there already, resumed, or trained now; ``after`` is called at every step."""
    run = RunDirectory(settings.directory)
    if run.result is not None:
        return run
    if not run.exists:
        run.start(settings, fresh=False)
    trainer = TimedTrainer(settings, run, source, CPU, lambda network, step: protocol.evaluate(network))
    trainer.resume()
    trainer.after = after
    print(f"{run.path.name}: from step {trainer.step} to {settings.train.steps}", flush=True)
    outcome = trainer.train()
    run.finish({"status": outcome.status, "step": outcome.step, "message": outcome.message})
    return run


def cost(reference: RunConfig, settings: RunConfig, source: Source) -> tuple[float, float, int]:
    """CPU seconds of a training step of the reference, that of ``settings`` over it (medians), and its operations.

    Both steps are measured in turn, since the machine's pace changes.
    """
    with tempfile.TemporaryDirectory() as folder:
        first, second = (
            step_of(each, source, Path(folder) / name) for each, name in ((reference, "reference"), (settings, "row"))
        )
        pairs = measuring.interleaved(first, second, PAIRS, 2, CPU)
        counter = FlopCounterMode(display=False)
        with counter:
            second()
    ratio = float(np.median([b.cpu / a.cpu for a, b in pairs]))
    return float(np.median([a.cpu for a, _ in pairs])), ratio, counter.get_total_flops()


def step_of(settings: RunConfig, source: Source, folder: Path) -> Callable[[], object]:
    """One step of the real trainer."""
    run = RunDirectory(folder)
    run.start(settings, fresh=True)
    return Trainer(settings, run, source, CPU, lambda network, step: {}).train_step


# --- the study ------------------------------------------------------------------------------------------


class Study:
    """Costs and trials, stored as they come.

    Arguments:
        plan: what the rows share.
        recipes: name → preset and overrides, the reference among them.
        results: file of the trials, no suffix. folder: where the runs go.
        source: data with their judge; None: what the plan names.

    Raises:
        InputError: the file holds trials of another plan.
    """

    def __init__(
        self, plan: Plan, recipes: dict[str, tuple[str, ...]], results: Path, folder: Path, source: Source | None = None
    ):
        self.plan, self.recipes, self.results, self.folder, self._source = plan, recipes, results, folder, source
        self.rows: dict[str, Row] = {}
        self.trials: list[Trial] = []
        self.floor: list[float] = []
        self.protocols: dict[str, LabelProtocol] = {}
        if results.with_suffix(".json").is_file():
            begun, self.rows, self.trials, self.floor = stored(results)
            refuse_others(begun, plan, results)

    def check(self, again: Sequence[str] = ()) -> None:
        """Raises InputError where a recipe is wrong, or another than that of the row's trials (unless ``again``)."""
        for name, recipe in self.recipes.items():
            self.settings(name, self.plan.lrs[0], 0, self.plan.points)
            share(recipe)
            if name in self.rows and name not in again and self.rows[name].recipe != recipe:
                raise InputError(
                    f"{self.results}.json has trials of row {name} with another recipe", got=" ".join(recipe),
                    expected=" ".join(self.rows[name].recipe), fix=f"--again {name}, or another name",
                )  # fmt: skip

    @property
    def source(self) -> Source:
        """The data, loaded when they are first needed."""
        if self._source is None:
            self._source = assembly.load_source(self.settings(REFERENCE, self.plan.lrs[0], 0, 1), CPU)
        return self._source

    def settings(self, name: str, lr: float, seed: int, steps: int) -> RunConfig:
        """The configuration of one run."""
        preset, *words = self.recipes[name]
        overrides = [word for word in words if not word.startswith(SHARE)]
        plan, every = self.plan, max(1, steps // self.plan.points)
        return schema.load(
            preset,
            [
                *overrides, *plan.common, f"name={name}", f"train.batch={plan.batch}", f"train.steps={steps}",
                f"optim.lr={lr!r}", f"seed={seed}", f"run.dir={self.folder / name}",
                f"evaluation={{every: {0 if seed == TUNING_SEED else every}, n: {plan.n}, nfe: {list(NFE)}, "
                "velocity_rows: 20, guided: null, objective: false}",
                f"checkpoint={{every: {every}, keep: 1}}", "tracking.mlflow=false", "machine.device=cpu",
            ],
        )  # fmt: skip

    def protocol(self, split: HeldOut) -> LabelProtocol:
        """The fixed protocol on a split, made once."""
        if split not in self.protocols:
            settings = self.settings(REFERENCE, self.plan.lrs[0], 0, self.plan.points)
            self.protocols[split] = LabelProtocol(self.source, settings.evaluation, split)
        return self.protocols[split]

    def forget(self, name: str) -> None:
        """Make a row anew: its cost, its trials and its runs are gone."""
        self.rows.pop(name, None)
        self.trials = [trial for trial in self.trials if trial.row != name]
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def calibrate(self) -> None:
        """Give every row its cost and steps, the reference first."""
        for name in sorted(self.recipes, key=lambda one: one != REFERENCE):
            if name in self.rows:
                continue
            reference, own = (self.settings(each, self.plan.lrs[0], 0, self.plan.points) for each in (REFERENCE, name))
            seconds, ratio, operations = cost(reference, own, self.source)
            if name == REFERENCE:
                ratio = 1.0
            else:
                seconds = ratio * self.rows[REFERENCE].seconds
            steps = self.plan.steps * share(self.recipes[name]) / ratio
            steps = self.plan.points * max(1, round(steps / self.plan.points))
            self.rows[name] = Row(self.recipes[name], round(seconds, 4), operations, steps)
            self.save()

    def tuned(self, name: str) -> dict[float, float]:
        """Learning rate → score, of the rates that a row has tried."""
        return {trial.lr: trial.score for trial in self.trials if trial.row == name and trial.tuning}

    def best(self, name: str) -> float:
        """The learning rate of the least score."""
        tried = self.tuned(name)
        return min(tried, key=lambda lr: tried[lr])

    def run(self, seeds: int) -> None:
        """Every trial that is not there yet: tuning first, then seed by seed."""
        self.calibrate()
        with Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeRemainingColumn()
        ) as bar:
            total = sum(row.steps * row.seconds for name, row in self.rows.items() if name in self.recipes)
            task = bar.add_task("trials", total=total * (len(self.plan.lrs) / 2 + seeds))
            for lr in self.plan.lrs:
                for name in self.recipes:
                    self.trial(name, lr, TUNING_SEED, bar, task)
            for seed in range(seeds):
                for name in self.recipes:
                    self.trial(name, self.best(name), seed, bar, task)

    def trial(self, name: str, lr: float, seed: int, bar: Progress, task: Any) -> None:
        """One trial, unless it is stored."""
        row, tuning = self.rows[name], seed == TUNING_SEED
        steps = row.steps // 2 if tuning else row.steps
        bar.update(task, description=f"{name}, lr {lr:g}, {'tuning' if tuning else f'seed {seed}'}")
        found = [one for one in self.trials if (one.row, one.lr, one.seed) == (name, lr, seed)]
        done = bar.tasks[0].completed + steps * row.seconds
        if not found:
            settings, protocol = self.settings(name, lr, seed, steps), self.protocol("validation" if tuning else "test")
            run = trained(settings, self.source, protocol, lambda: bar.advance(task, row.seconds))
            self.trials.append(Trial.of(name, lr, seed, run))
            self.floor = self.floor or [round(self.protocol("test").floor["fd"], 4)]
            self.save()
        bar.update(task, completed=done)

    def save(self) -> None:
        """Write what there is."""
        result = {
            "plan": asdict(self.plan),
            "machine": measuring.machine(CPU),
            "floor": self.floor,
            "rows": {name: asdict(row) for name, row in self.rows.items()},
            "trials": [asdict(trial) for trial in self.trials],
        }
        measuring.store(self.results, result)


def share(recipe: Sequence[str]) -> float:
    """The part of the tutorial's time that a run of a recipe takes. Raises InputError where it is no such part."""
    for word in recipe[1:]:
        if word.startswith(SHARE):
            try:
                if 0 < (found := float(word.removeprefix(SHARE))) <= 1:
                    return found
            except ValueError:
                pass
            raise InputError(
                "share is no part of the tutorial's time", got=word, expected="above 0, at most 1", fix=f"{SHARE}0.25"
            )
    return 1.0


def stored(results: Path) -> tuple[Plan, dict[str, Row], list[Trial], list[float]]:
    """Plan, rows, trials and floor of a file. Raises InputError where it is missing or no such file."""
    path = results.with_suffix(".json")
    try:
        found = json.loads(path.read_text())
        plan = Plan(**found["plan"] | {name: tuple(found["plan"][name]) for name in ("lrs", "common")})
        rows = {name: Row(**row | {"recipe": tuple(row["recipe"])}) for name, row in found["rows"].items()}
        trials = [
            Trial(**one | {"distances": [[float(runlog.decode(x)) for x in each] for each in one["distances"]]})  # type: ignore[arg-type]
            for one in found["trials"]
        ]
        return plan, rows, trials, list(found["floor"])
    except FileNotFoundError:
        raise InputError(f"{path} is missing", expected="stored trials", fix="train them, without --table") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} has no trials of this script", got=f"{error!r:.80}", fix="another --results, or move it away"
        ) from error


def refuse_others(begun: Plan, plan: Plan, results: Path) -> None:
    """Raises InputError where trials were made under another plan."""
    different = [name for name, value in asdict(plan).items() if asdict(begun)[name] != value]
    if different:
        raise InputError(
            f"{results}.json holds a study with another plan",
            got=", ".join(f"{name}={getattr(plan, name)}" for name in different),
            expected=", ".join(f"{name}={getattr(begun, name)}" for name in different),
            fix="pass the same values, or another --results and --out",
        )


# --- what is compared -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The stored trials with the reference's distances as targets."""

    rows: dict[str, Row]
    trials: Sequence[Trial]

    def final(self, name: str) -> list[Trial]:
        """The trials of a row that are compared, by seed."""
        return sorted((t for t in self.trials if t.row == name and not t.tuning), key=lambda trial: trial.seed)

    def ratios(self, name: str, evaluations: int, unit: Unit) -> list[float]:
        """Compute until the target over the reference's, a seed each; infinite where it is never reached."""
        references = {trial.seed: trial for trial in self.final(REFERENCE)}
        found = []
        for trial in self.final(name):
            if (other := references.get(trial.seed)) is None or other.status != "finished":
                continue
            target = other.end(evaluations)
            at, first = trial.reaches(target, evaluations), other.reaches(target, evaluations)
            spent = math.inf if at is None else trial.spent(at, unit, self.rows[name])
            assert first is not None
            found.append(spent / other.spent(first, unit, self.rows[REFERENCE]))
        return found

    def at_once(self, name: str, evaluations: int) -> bool:
        """Whether a run has its target at the first evaluation, so that its ratio is an upper bound."""
        ends = {trial.seed: trial.end(evaluations) for trial in self.final(REFERENCE)}
        return any(t.reaches(ends[t.seed], evaluations) == 0 for t in self.final(name) if t.seed in ends)

    def ratio(self, name: str, evaluations: int, unit: Unit) -> str:
        """:meth:`ratios` in a cell of the table."""
        shown = cell(self.ratios(name, evaluations, unit), "not reached")
        return f"≤ {shown}" if self.at_once(name, evaluations) and shown[0].isdigit() else shown

    def ends(self, name: str, evaluations: int) -> list[float]:
        """The distance at the end, a seed each."""
        return [trial.end(evaluations) for trial in self.final(name)]


def interval(values: Iterable[float]) -> str:
    """Geometric mean with Student's 95 % interval, which is of the logarithms."""
    found = mean_interval([math.log(value) for value in values])
    numbers = [found.value] if math.isnan(found.low) else [found.value, found.low, found.high]
    shown = [f"{math.exp(x):.2f}" for x in numbers]
    return shown[0] if len(shown) == 1 else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def cell(values: list[float], missed: str) -> str:
    """The interval of the values, or of how many ``missed`` is true: of those without a number."""
    without = sum(not math.isfinite(value) for value in values)
    if not values:
        return "–"
    return f"{missed} in {without} of {len(values)}" if without else interval(values)


def table(study: Study) -> str:
    """The study as Markdown."""
    compared, lrs = Comparison(study.rows, study.trials), study.plan.lrs
    shown = {name: row for name, row in study.rows.items() if compared.final(name)}
    units: tuple[tuple[str, Unit], ...] = (("CPU", "seconds"), ("operations", "operations"))
    ratios = [(name, *(compared.ratio(name, e, unit) for _, unit in units for e in NFE)) for name in shown]
    ends = [
        (
            name, f"{study.best(name):g}", f"{1000 * row.seconds:.0f}", f"{row.operations / 1e9:.1f}",
            *(cell(compared.ends(name, e), "diverged") for e in NFE),
        )
        for name, row in shown.items()
    ]  # fmt: skip
    tried = {name: study.tuned(name) for name in shown}
    tuning = [(name, *(f"{tried[name][lr]:.2f}" if lr in tried[name] else "–" for lr in lrs)) for name in shown]
    words = [f"- `{name}`: `{' '.join(row.recipe)}`" for name, row in shown.items() if row.recipe != (name,)]
    return "\n".join([
        head(study, compared.final(REFERENCE)),
        measuring.markdown(("row", *(f"{what}, {e} NFE" for what, _ in units for e in NFE)), ratios),
        "## At the end\n\nFréchet distances in the judge's features, geometric means.\n",
        measuring.markdown(("row", "rate", "CPU ms a step", "GFLOP a step", *(f"{e} NFE" for e in NFE)), ends),
        "## Tuning\n\nGeometric mean of the distances at 1 and 2 NFE after half the time, validation split, seed "
        f"{TUNING_SEED}.\n",
        measuring.markdown(("row", *(f"{lr:g}" for lr in lrs)), tuning),
        *(["Rows that are no preset:\n", *words, ""] if words else []),
    ])  # fmt: skip


def head(study: Study, own: list[Trial]) -> str:
    """What the numbers depend on, and what the first table is of."""
    plan, machine = study.plan, json.loads(study.results.with_suffix(".json").read_text())["machine"]
    return (
        f"# Time to quality\n\n{len(own)} seeds with Student's 95 % intervals; `{' '.join(plan.common)}`, batch "
        f"{plan.batch}, {plan.n} samples of the test split (floor {study.floor[0]:.2f}), {plan.points} evaluations a "
        f"run; {machine['device']}, {machine['threads']} thread(s), torch {machine['torch']}. Every run takes the CPU "
        f"time of {study.rows[REFERENCE].steps} steps of `{REFERENCE}`, {np.mean([t.seconds[-1] for t in own]):.0f} "
        "s, or the share that its row says.\n\n## Compute until the tutorial's distance, over the tutorial's\n\n"
        f"A seed's target is the distance at the end of `{REFERENCE}`, which has it itself after "
        f"{' and '.join(_shares(own, e) for e in NFE)} of its time, at 1 and 2 NFE. Geometric means over seeds; ≤ "
        "where a run has it at its first evaluation.\n"
    )


def _shares(trials: list[Trial], evaluations: int) -> str:
    """When the reference first has its own last distance, as a share of its run."""
    at = [trial.reaches(trial.end(evaluations), evaluations) for trial in trials]
    return f"{np.mean([(i or 0) + 1 for i in at]) / len(trials[0].steps):.0%}"


def draw(study: Study, path: Path) -> None:
    """Distance over CPU time at each NFE: every seed thin, the mean thick, the mean target dotted."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    compared = Comparison(study.rows, study.trials)
    figure, panels = pyplot.subplots(1, len(NFE), figsize=(10, 4.5), sharey=True, constrained_layout=True)
    for which, (axes, evaluations) in enumerate(zip(panels, NFE, strict=True)):
        for number, name in enumerate(study.rows):
            trials = compared.final(name)
            if not trials:
                continue
            style: dict[str, Any] = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
            for trial in trials:
                axes.plot(trial.seconds, trial.distances[which], **style, alpha=0.25, linewidth=0.8)
            points = min(len(trial.steps) for trial in trials)  # one that diverged has fewer
            mean = np.exp(np.mean([np.log(trial.distances[which][:points]) for trial in trials], axis=0))
            seconds = np.mean([trial.seconds[:points] for trial in trials], axis=0)
            axes.plot(seconds, mean, **style, linewidth=1.8, label=name)
        axes.axhline(np.mean(compared.ends(REFERENCE, evaluations)), color="black", linewidth=0.8, linestyle=":")
        axes.set(xlabel="CPU seconds of training", yscale="log", title=f"{evaluations} NFE")
    panels[0].set(ylabel="Fréchet distance")
    panels[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(study: Study) -> str:
    """Write table and picture beside the trials; the table.

    Raises:
        InputError: the reference has no trials yet.
    """
    if not any(trial.row == REFERENCE and not trial.tuning for trial in study.trials):
        raise InputError(f"{study.results}.json has no finished run of {REFERENCE}", fix="train first, without --table")
    text = table(study)
    study.results.with_suffix(".md").write_text(text)
    draw(study, study.results.with_suffix(".png"))
    return text


# --- command line ---------------------------------------------------------------------------------------


def arguments_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--table", action="store_true", help="make table and picture of the stored trials; train nothing"
    )
    parser.add_argument("--rows", nargs="+", metavar="NAME", help=f"some of {', '.join(ROWS)}, and of --also")
    parser.add_argument(
        "--also",
        nargs="+",
        action="append",
        default=[],
        metavar="WORD",
        help="a further row: NAME PRESET [KEY=VALUE …]",
    )
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME", help="rows to make from scratch")
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each row that are compared; more may be asked later"
    )
    parser.add_argument("--steps", type=int, default=240, help="of a run of tutorial; the others get its CPU time")
    parser.add_argument("--points", type=int, default=12, help="evaluations of a run")
    parser.add_argument(
        "--lrs", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], help="learning rates that every row tries"
    )
    parser.add_argument("--batch", type=int, default=128, help="rows of a step")
    parser.add_argument("--n", type=int, default=400, help="samples judged")
    parser.add_argument(
        "--common", nargs="+", default=["data.source=digits", "train.init=teacher"], metavar="KEY=VALUE",
        help="overrides of every row",
    )  # fmt: skip
    parser.add_argument(
        "--results", type=Path, default=measuring.RESULTS / "time_to_quality_lab", help="files of the result, no suffix"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/time_to_quality"), help="folder of the runs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser.parse_args(arguments)


def recipes_of(given: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """Name → recipe of the rows that are asked for. Raises InputError for names that nobody knows."""
    short = [words for words in given.also if len(words) < 2]
    if short:
        raise InputError(
            "--also needs a name and a preset", got=" ".join(short[0]), fix="--also NAME PRESET [KEY=VALUE …]"
        )
    known = ROWS | {name: tuple(recipe) for name, *recipe in given.also}
    wanted = list(dict.fromkeys([REFERENCE, *(given.rows or known), *given.again]))
    for name in wanted:
        if name not in known:
            raise InputError(f"row {name} is unknown", expected=", ".join(known), fix=f"--also {name} PRESET")
    return {name: known[name] for name in known if name in wanted}


def main(arguments: list[str] | None = None, source: Source | None = None) -> None:
    """The command line; ``source`` stands in for the digits in tests."""
    given = arguments_of(arguments)
    torch.set_num_threads(given.threads)
    try:
        if given.table:
            plan, rows, *_ = stored(given.results)
            print(report(Study(plan, {name: row.recipe for name, row in rows.items()}, given.results, given.out)))
            return
        plan = Plan(given.batch, given.steps, given.points, given.n, tuple(given.lrs), tuple(given.common))
        study = Study(plan, recipes_of(given), given.results, given.out, source)
        study.check(given.again)
        for name in given.again:
            study.forget(name)
        study.run(given.seeds)
        print(report(study))
    except InputError as error:
        print(f"time_to_quality.py: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
