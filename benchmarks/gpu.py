"""What twinrl does on this machine's GPU, in one Markdown file for a report of what went wrong, or right.

    make gpu                                    # python benchmarks/gpu.py --device cuda
    python benchmarks/gpu.py --device cpu       # the same parts in small, where there is no GPU
    python benchmarks/gpu.py --only tests

Every part is a process of its own with a bound on its time. One that fails stops no other; the file has its last lines.
Sizes follow the memory that is free, so a GPU of a few GB is enough. Ctrl-C ends the part that runs and keeps the file.
Exit code 0 if all parts passed, 1 if one failed, 2 for wrong input, 130 after Ctrl-C.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from twinrl.run import environment

REPOSITORY = Path(__file__).parents[1]
OUT = REPOSITORY / "build" / "gpu"
TAIL = 60
"""Lines of a part's output that the file has."""
GRACE = 10
"""Seconds that a part has to end when it is asked to."""
PASSED = "passed"


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: in the file. command: what is run.
        limit: seconds after which it has failed.
        page: Markdown that it writes, which the file has, too.
    """

    name: str
    command: Sequence[str]
    limit: float
    page: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """How a part ended: ``passed``, or why not; its seconds; what it printed."""

    part: Part
    said: str
    seconds: float
    output: str

    @property
    def passed(self) -> bool:
        """Whether it did all."""
        return self.said == PASSED


def parts(device: str, folder: Path) -> list[Part]:
    """All parts, in order.

    Arguments:
        device: cuda, or cpu for the same in small.
        folder: of what they write.
    """
    python, small = sys.executable, device == "cpu"
    tests = [python, "-m", "pytest", "-rs", "--show-capture=no"]
    end_to_end = "tests/families_end_to_end/test_one_device.py"
    training = [
        f"machine.device={device}", f"run.dir={folder / 'runs'}", f"train.steps={20 if small else 300}",
        "tracking.mlflow=false", "evaluation={every: 0, n: 50, nfe: [1, 2], teacher_steps: 4}",
    ]  # fmt: skip
    measured = folder / "large_model"
    large = [python, "benchmarks/large_model.py", "--fit", "--device", device, "--steps", "2" if small else "10"]
    last = [python, "benchmarks/simulated.py", f"{measured}.json", "--out", str(folder / "simulated.md")]
    return [
        Part("environment", [python, "benchmarks/gpu.py", "--environment"], 120),
        Part("tests", [*tests, "-m", "gpu", f"--ignore={end_to_end}"], 1200),
        Part("laboratory", [python, "-m", "twinrl", "train", "lab", "--fresh", *training], 1200),
        Part("family", [*tests, end_to_end, "-k", device], 600),
        Part("large model", [*large, "--out", str(measured)], 1800, page=measured.with_suffix(".md")),
        Part("simulated", last, 900, page=folder / "simulated.md"),
    ]


# --- running ------------------------------------------------------------------------------------------------


def run(part: Part) -> Outcome:
    """A part to its end, or to the end of its time.

    Raises:
        Stopped: Ctrl-C; the part has ended.
    """
    began, said = time.monotonic(), ""
    variables = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        part.command, cwd=REPOSITORY, env=variables, text=True, errors="replace", stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=part.limit)
            said = PASSED if process.returncode == 0 else f"failed, exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            output, said = _ended(process), f"failed: not finished after {part.limit:g} s"
        except KeyboardInterrupt:
            output = _ended(process)
            raise Stopped(Outcome(part, "stopped", time.monotonic() - began, output)) from None
    return Outcome(part, said, time.monotonic() - began, output)


class Stopped(Exception):  # noqa: N818
    """Ctrl-C; its argument is the outcome of the part that ran."""


def _ended(process: "subprocess.Popen[str]") -> str:
    """End a part with the processes that it has started, and take what it has printed."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            return process.communicate(timeout=GRACE)[0]
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    return process.communicate()[0]


# --- the file -----------------------------------------------------------------------------------------------


def page(device: str, chosen: Sequence[Part], outcomes: Sequence[Outcome]) -> str:
    """The file's text, with what is known by now."""
    told = {outcome.part.name: outcome for outcome in outcomes}
    lines = [
        "# twinrl on a GPU" if device != "cpu" else "# twinrl, the GPU's report in small on a CPU", "",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, `python benchmarks/gpu.py --device {device}`", "",
        "| part | outcome | seconds |", "|---|---|--:|",
    ]  # fmt: skip
    for part in chosen:
        outcome = told.get(part.name)
        lines.append(f"| {part.name} | {outcome.said if outcome else '–'} | {outcome.seconds if outcome else 0:.0f} |")
    for outcome in outcomes:
        lines += ["", f"## {outcome.part.name}: {outcome.said}", ""]
        if outcome.passed and outcome.part.page is not None and outcome.part.page.is_file():
            lines += [outcome.part.page.read_text().replace("\n# ", "\n### ").replace("# ", "### ", 1).strip()]
        else:
            lines += [f"`{' '.join(outcome.part.command)}`", "", "```text", *outcome.output.splitlines()[-TAIL:], "```"]
    return "\n".join(lines).replace(str(Path.home()), "~") + "\n"


def describe() -> None:
    """Print what the machine has: twinrl's own report, the GPUs as torch and the driver see them."""
    from rich.console import Console

    from twinrl.commands.doctor import doctor

    doctor(False, Console(soft_wrap=True, markup=False, emoji=False))
    state = environment.git_state(REPOSITORY) or {}
    print(f"revision: {state.get('revision')}{' and changes' if state.get('dirty') else ''}")
    print(f"CUDA of torch: {torch.version.cuda}; NCCL: {torch.distributed.is_nccl_available()}")
    for index in range(torch.cuda.device_count()):
        found, (free, _) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        print(
            f"cuda:{index}: {found.name}, capability {found.major}.{found.minor}, {found.total_memory / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} free, bf16 {torch.cuda.is_bf16_supported()}"
        )
    if (tool := shutil.which("nvidia-smi")) is not None:
        subprocess.run([tool], check=False)


def report(device: str, chosen: Sequence[Part], path: Path) -> int:
    """Run the parts and write the file after each; the exit code."""
    outcomes: list[Outcome] = []
    for number, part in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {part.name}, at most {part.limit / 60:g} min … ", end="", flush=True)
        try:
            outcomes.append(run(part))
        except Stopped as stopped:
            outcomes.append(stopped.args[0])
        last = outcomes[-1]
        print(f"{last.said}, {last.seconds:.0f} s", flush=True)
        path.write_text(page(device, chosen, outcomes))
        if last.said == "stopped":
            break
    print(f"{path} is to be attached to a report")
    if outcomes[-1].said == "stopped":
        return 130
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: the same parts in small")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts by name; they need those before them")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of report.md and of what the parts write")
    parser.add_argument("--environment", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.environment:
        describe()
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device; fix: --device cpu tries the parts in small")
    folder = given.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    everything = parts(given.device, folder)
    chosen = [part for part in everything if not given.only or part.name in given.only]
    if not chosen or (given.only and set(given.only) - {part.name for part in everything}):
        parser.error(f"--only knows {', '.join(repr(part.name) for part in everything)}")
    return report(given.device, chosen, folder / "report.md")


if __name__ == "__main__":
    sys.exit(main())
