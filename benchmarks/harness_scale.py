"""How the cost of the harness grows with the work: plans, ledgers, reports and MLflow at 100, 1,000 and 10,000 trials.

    python benchmarks/harness_scale.py                       all of it; half an hour, 20 GB of disk
    python benchmarks/harness_scale.py --trials 100 1000     a quick look

Trials are simulated: run directories, ledger and studies in the files' real format, with logs that nobody trained.
Every figure is of a process of its own, with its imports: CPU seconds (user and system), and the peak of its memory.
The exponent is that of the last two sizes: 1 grows with the trials, 0 not at all.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ablations import plan as plans
from ablations import study as studies
from ablations.ledger import TrialRecord
from ablations.plan import Workspace
from ablations.publish import StudyView
from benchmarks import measuring
from benchmarks.compare_page import copy
from twinrl.run import layout, names
from twinrl.tracking import store
from twinrl.training.runs import dump

REPOSITORY = Path(__file__).resolve().parents[1]
TERMS = ("base", "adversarial", "rectify")
JUDGED = ("kid", "fd", "precision", "recall", "density", "coverage", "accuracy", "nonfinite_frac")
PROMPTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SEEDS, BODIES, EVALUATIONS = 10, 8, 20
LEDGER_ROWS, STEPS, PUBLISHED = (1_000, 10_000, 100_000), 200, 10
PARTS = ("ledger", "planning", "publish", "reports")


# --- simulated trials -----------------------------------------------------------------------------------


def body(number: int, steps: int) -> bytes:
    """The rows of a log but for its last two: random numbers where a laboratory run has its own."""
    rng, lines = np.random.default_rng(number), []
    series = [names.LOSS_TOTAL, *map(names.loss, TERMS), names.GRAD_TOTAL_RAW, names.GRAD_TOTAL_CLIPPED, names.LR]
    series += [names.grad(term, of) for term in TERMS for of in ("norm_raw", "norm_clipped", "clip_coef", "share")]
    series += [names.cosine(a, b) for a in TERMS for b in TERMS if a < b]
    series += [names.CLAMP_RCGM, names.CLAMP_DELTA_V, names.DELTA_V_RMS, names.RMS_MAX, names.UPDATE_RATIO]
    for step in range(1, steps - 1):
        values = dict(zip(series, rng.lognormal(0, 0.2, len(series)).tolist(), strict=True))
        row = {"iteration": step - 1, "step": step, **values, names.STEP_SECONDS: 0.02 + 0.001 * rng.random()}
        if step % max(1, steps // EVALUATIONS) == 0:
            row |= evaluation(rng, 0.2 + math.exp(-3 * step / steps))
        lines.append(json.dumps(row))
    return ("\n".join(lines) + "\n").encode() if lines else b""


def evaluation(rng: np.random.Generator, quality: float, share: float = 0.8) -> dict[str, float]:
    """What an evaluation logs; ``share`` is the judge's accuracy and the like."""
    judged = {names.val(name, 1): share + 0.02 * rng.random() for name in JUDGED}
    prompts = {names.accuracy(prompt, 1): 0.9 + 0.1 * rng.random() for prompt in PROMPTS}
    return {names.VAL_QUALITY: quality, names.VAL_VELOCITY_MSE: 1 + 0.1 * rng.random()} | judged | prompts


def ending(rng: np.random.Generator, steps: int, quality: float) -> bytes:
    """The last two rows of a log: the run's own evaluations, bad ones in one run of twenty."""
    quality, judged = (2.0, 0.1) if rng.random() < 0.05 else (quality + 0.01 * rng.standard_normal(), 0.8)
    rows = [{"iteration": step - 1, "step": step, names.LOSS_TOTAL: 1.0, names.GRAD_TOTAL_RAW: 1.0}
            | evaluation(rng, quality, judged) for step in (steps - 1, steps)]  # fmt: skip
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def grid(folder: Path, trials: int) -> Path:
    """The file of a study of two factors and :data:`SEEDS` seeds."""
    arms = max(1, trials // SEEDS)
    rows = max(k for k in range(1, math.isqrt(arms) + 1) if arms % k == 0)
    factors = {
        "rate": {f"r{k}": {"optim.lr": 1e-4 * (1 + k)} for k in range(arms // rows)},
        "weight": {f"w{k}": {"terms.rectify.weight": 0.5 + k} for k in range(rows)},
    }
    path = folder / f"grid-{trials}.yaml"
    path.write_text(yaml.safe_dump({"base": "lab", "factors": factors, "seeds": SEEDS}))
    return path


def make_runs(folder: Path, trials: int, steps: int) -> Path:
    """Run directories of a study: ten seeds an arm, and a factor of ten levels for each digit of the arm's number."""
    bodies = [body(number, steps) for number in range(min(BODIES, trials))]
    for number in range(trials):
        arm, seed = divmod(number, SEEDS)
        levels = [int(digit) for digit in f"{arm:03d}"]
        rng = np.random.default_rng([1, number])
        run = folder / layout.folder_name("lab", f"{arm:08x}", seed)
        run.mkdir(parents=True)
        settings = {"teacher": {"decay": levels[0]}, "optim": {"eps": levels[1]}, "guidance": {"strength": levels[2]}}
        config = {"name": "lab", "seed": seed, "train": {"steps": steps}, "data": {"source": "digits"},
                  "evaluation": {"n": 1000, "nfe": [1], "every": steps // EVALUATIONS}, **settings}  # fmt: skip
        (run / layout.CONFIG).write_text(yaml.safe_dump(config))
        (run / layout.LOG).write_bytes(bodies[number % len(bodies)] + ending(rng, steps, 0.2 + 0.02 * levels[2]))
        (run / layout.EVENTS).touch()
        (run / layout.RESULT).write_text(json.dumps({"status": "finished", "step": steps, "message": ""}))
    return folder


def write_ledger(path: Path, rows: int) -> None:
    """A ledger of finished trials."""
    metrics = evaluation(np.random.default_rng(0), 0.2)
    where = {"host": "machine", "revision": "a" * 40, "directory": "runs/ablations/ffffffff/lab-00000000-s0",
             "at": "2026-01-02T03:04:05Z"}  # fmt: skip
    done = TrialRecord("00000000", 0, "f" * 16, "finished", 2000, metrics=metrics, seconds=12.5, where=where)
    lines = (replace(done, config_hash=f"{k // SEEDS:08x}", seed=k % SEEDS).line() for k in range(rows))
    path.write_text("\n".join(lines) + "\n")


def filled(folder: Path, trials: int) -> StudyView:
    """The MLflow view of a study of which all trials but ten are published already."""
    plan = plans.make(studies.load(str(grid(folder, trials))), Workspace(folder / f"store-{trials}"))
    for trial in plan.trials[: 1 + PUBLISHED]:
        trial.run.path.mkdir(parents=True, exist_ok=True)
        (trial.run.path / layout.CONFIG).write_text(dump(trial.settings))
        trial.run.log.write_bytes(body(0, 5) + ending(np.random.default_rng(0), 5, 0.2))
        trial.run.finish({"status": "finished", "step": 5, "message": ""})
        plan.workspace.ledger.append(
            TrialRecord(trial.config_hash, trial.settings.seed, trial.fingerprint, "finished", 5)
        )
    view, first = StudyView(plan.reread()), plan.trials[0]
    run, database = view.trial(first), store.sqlite_path(view.uri)
    assert run is not None
    assert database is not None
    copy(database, run, [trial.title for trial in plan.trials[1 + PUBLISHED :]])
    return view


# --- clocks ---------------------------------------------------------------------------------------------


def cost(command: Sequence[str]) -> dict[str, float]:
    """CPU seconds and peak memory of a process that runs ``command``, and of its children."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=REPOSITORY, env=environment())
        _, status, used = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read().decode()[-2000:]}")
    return {"cpu_s": round(used.ru_utime + used.ru_stime, 2), "mb": round(used.ru_maxrss / 1024, 1)}


def environment() -> dict[str, str]:
    """One thread, this checkout's packages."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "COLUMNS": "120"}


def twinrl(*words: object) -> dict[str, float]:
    """The cost of a command."""
    return cost([sys.executable, "-m", "twinrl", *map(str, words)])


def inside(code: str, *arguments: object) -> dict[str, Any]:
    """What a program prints as JSON in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    found = subprocess.run(command, cwd=REPOSITORY, env=environment(), check=True, capture_output=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


STARTED = """
import sys
from pathlib import Path
from ablations import commands, runner
runner._tune = lambda *parts: None
runner.Runner._slots = lambda self, resources: 2
commands.run(sys.argv[1], None, Path(sys.argv[2]), None, None, None, False, None)
"""
"""``ablate run`` up to where Ray takes over."""

PUBLISH = """
import json, sys, time
from pathlib import Path
from benchmarks import harness_scale
view = harness_scale.filled(Path(sys.argv[1]), int(sys.argv[2]))
began, wall = time.process_time(), time.perf_counter()
for trial in view.plan.trials[1 : 1 + harness_scale.PUBLISHED]:
    view.trial(trial)
each = 1000 / harness_scale.PUBLISHED
print(json.dumps({"cpu_ms": each * (time.process_time() - began), "wall_ms": each * (time.perf_counter() - wall)}))
"""

LEDGER = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
from ablations.ledger import Ledger, append
path = Path(sys.argv[1])
began = time.process_time()
found = Ledger(path).read()
read, record = time.process_time() - began, next(iter(found.values()))
began = time.process_time()
for seed in range(1000, 1100):
    append(path, replace(record, seed=seed))
print(json.dumps({"read_s": read, "append_ms": 10 * (time.process_time() - began)}))
"""


# --- what is measured -----------------------------------------------------------------------------------


def planning(folder: Path, trials: int) -> dict[str, dict[str, float]]:
    """A plan, its state and the start of its run."""
    study, root = grid(folder, trials), folder / f"grid-{trials}"
    return {
        "plan": twinrl("ablate", "plan", study, "--root", root),
        "status": twinrl("ablate", "status", study, "--root", root),
        "run, up to the first trial": cost([sys.executable, "-c", STARTED, str(study), str(root)]),
    }


def reports(folder: Path, trials: int, steps: int) -> dict[str, dict[str, float]]:
    """``twinrl analyze`` of a folder of runs, and again with nothing new in the logs."""
    runs = make_runs(folder / f"runs-{trials}", trials, steps)
    found = {}
    for name in ("analyze, cold", "analyze, warm"):
        found[name] = twinrl("analyze", runs, "--no-mlflow")
        found[name]["page_mb"] = round((runs / "report" / "report.html").stat().st_size / 1e6, 2)
    shutil.rmtree(runs)
    return found


def ledgers(folder: Path, rows: int) -> dict[str, float]:
    """Reading a ledger, and adding a line to it."""
    path = folder / "ledger.jsonl"
    write_ledger(path, rows)
    return inside(LEDGER, path)


def measure(folder: Path, part: str, sizes: Sequence[int], steps: int) -> dict[str, Any]:
    """The figures of one part by size."""
    made: dict[str, Callable[[int], Any]] = {
        "ledger": lambda rows: ledgers(folder, rows),
        "planning": lambda trials: planning(folder, trials),
        "publish": lambda trials: inside(PUBLISH, folder, trials),
        "reports": lambda trials: reports(folder, trials, steps),
    }
    counts = LEDGER_ROWS if part == "ledger" else sizes
    return {str(count): told(made[part](count), f"{part}, {count}") for count in counts}


def told(found: Any, what: str) -> Any:
    """The figures, printed as they come."""
    print(what, json.dumps(found), flush=True)
    return found


# --- results --------------------------------------------------------------------------------------------


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Of growth between the last two sizes."""
    if len(sizes) < 2 or min(values[-2:]) <= 0:
        return math.nan
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def line(name: str, unit: str, sizes: Sequence[int], values: Sequence[float]) -> list[str]:
    """A row of the table."""
    grown = exponent(sizes, values)
    return [f"{name}, {unit}", *(f"{value:.3g}" for value in values), "–" if math.isnan(grown) else f"{grown:.2f}"]


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    sizes, books = found["trials"], [int(rows) for rows in found.get("ledger", {})]
    lines = []
    for part in (part for part in ("planning", "reports") if part in found):
        by_size = list(found[part].values())
        for name in by_size[0]:
            for key, unit in (("cpu_s", "CPU s"), ("mb", "MB"), ("page_mb", "MB of page")):
                if key in by_size[0][name]:
                    lines.append(line(name, unit, sizes, [size[name][key] for size in by_size]))
    if "publish" in found:
        publish = [size["cpu_ms"] for size in found["publish"].values()]
        lines.append(line("MLflow: one more trial", "CPU ms", sizes, publish))
    ledger = [line(name, unit, books, [rows[key] for rows in found.get("ledger", {}).values()])
              for name, key, unit in (("read", "read_s", "CPU s"), ("append", "append_ms", "CPU ms"))]  # fmt: skip
    head = f"{found['machine']['device']}; runs of {found['steps']} steps, ten seeds an arm.\n\n"
    trials = measuring.markdown(["of trials", *(f"{size:,}" for size in sizes), "exponent"], lines)
    rows = measuring.markdown(["ledger of rows", *(f"{rows:,}" for rows in books), "exponent"], ledger)
    return f"{head}{trials}\n{rows}"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="others stay as they were measured")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run that is reported")
    parser.add_argument("--folder", type=Path, help="for what is simulated; default: a temporary one")
    parser.add_argument("--out", type=Path, default=measuring.RESULTS / "harness_scale")
    options = parser.parse_args()
    found: dict[str, Any] = {"trials": options.trials, "steps": options.steps}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for part in options.parts:
            found[part] = measure(Path(folder), part, options.trials, options.steps)
    before = options.out.with_suffix(".json")
    older = json.loads(before.read_text()) if before.is_file() else {}
    found = older | found | {"machine": measuring.machine(torch.device("cpu"))}
    measuring.write(options.out, found, table(found))
    print(table(found))


if __name__ == "__main__":
    main()
