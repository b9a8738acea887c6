"""How much a study costs beyond its trials: wall time over the trials' own compute divided by the cores.

    python benchmarks/sweep.py                        16 lab trials on two cores
    python benchmarks/sweep.py --trials 4 --steps 100 a quick look

A trial's own compute is what ``twinrl train`` takes for it when it runs alone: start, steps, validations and final
table, measured once before the study (and once more, the mean counts). The ratio is 1 for a scheduler that costs
nothing; Ray's start, the trials' queue and the two processes' share of the memory bus are what is above.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

SETTINGS = {"evaluation.every": 0, "checkpoint.every": 500}


def alone(folder: Path, steps: int) -> float:
    """Seconds of one trial by itself on one thread."""
    overrides = [f"{key}={value}" for key, value in (SETTINGS | {"train.steps": steps}).items()]
    command = [sys.executable, "-m", "twinrl", "train", "lab", *overrides, "machine={device: cpu, threads: 1}",
               "tracking.mlflow=false", f"run.dir={folder}"]  # fmt: skip
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - started


def study(folder: Path, trials: int, steps: int, cpus: int) -> float:
    """Wall seconds of a study of ``trials`` trials."""
    path = folder / "sweep.yaml"
    levels = {f"r{i}": {"optim.lr": 1e-3 * 1.1**i} for i in range(2)}
    content = {"base": "lab", "set": SETTINGS | {"train.steps": steps}, "factors": {"rate": levels}}
    path.write_text(yaml.safe_dump(content | {"seeds": trials // 2}))
    code = "from ablations.cli import app; app()"
    command = [sys.executable, "-c", code, "run", str(path), "--root", str(folder / "work"), "--no-mlflow",
               "--cpus", str(cpus)]  # fmt: skip
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=sys.stderr)
    return time.monotonic() - started


def measure(trials: int, steps: int, cpus: int) -> dict[str, float]:
    """The figures of one sweep."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = statistics.mean(alone(folder / str(repeat), steps) for repeat in range(2))
        wall = study(folder, trials, steps, cpus)
    ideal = own * trials / cpus
    return {"trials": trials, "steps": steps, "cores": cpus, "own_seconds": own, "wall_seconds": wall,
            "ideal_seconds": ideal, "ratio": wall / ideal}  # fmt: skip


def main() -> None:
    """Measure and print as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16, help="an even number")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()
    figures = json.dumps(measure(arguments.trials, arguments.steps, arguments.cpus), indent=1)
    print(figures)
    if arguments.out:
        arguments.out.write_text(figures + "\n")


if __name__ == "__main__":
    main()
