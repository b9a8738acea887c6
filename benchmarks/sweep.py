"""How much a study costs beyond its trials: wall time over the trials' own compute divided by the cores.

    python benchmarks/sweep.py                        16 lab trials on two cores
    python benchmarks/sweep.py --trials 4 --steps 100 a quick look

A trial's own compute is what ``twinrl train`` takes for it, start, steps, validations and final table, with as many at
once as there are cores and no scheduler: two processes share the memory bus whoever starts them, and the time of one
alone is printed beside it. The ratio is 1 for a scheduler that costs nothing; Ray's start and the trials' queue are
what is above.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

SETTINGS = {"evaluation.every": 0, "checkpoint.every": 500}


def plain(folder: Path, steps: int, at_once: int) -> float:
    """Mean seconds of trials of one thread that start together, without a study."""
    overrides = [f"{key}={value}" for key, value in (SETTINGS | {"train.steps": steps}).items()]
    command = [sys.executable, "-m", "twinrl", "train", "lab", *overrides, "machine={device: cpu, threads: 1}",
               "tracking.mlflow=false"]  # fmt: skip

    def timed(number: int) -> float:
        started = time.monotonic()
        subprocess.run([*command, f"run.dir={folder / str(number)}"], check=True, capture_output=True)
        return time.monotonic() - started

    with ThreadPoolExecutor(at_once) as pool:
        return statistics.mean(pool.map(timed, range(at_once)))


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
        alone, own = plain(folder / "alone", steps, 1), plain(folder / "together", steps, cpus)
        wall = study(folder, trials, steps, cpus)
    ideal = own * trials / cpus
    return {"trials": trials, "steps": steps, "cores": cpus, "alone_seconds": alone, "own_seconds": own,
            "wall_seconds": wall, "ideal_seconds": ideal, "ratio": wall / ideal}  # fmt: skip


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
