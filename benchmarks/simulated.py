"""What the simulation says of a step that ``large_model.py`` has measured, side by side.

    python benchmarks/simulated.py build/gpu/large_model.json

The simulation takes the same run without a device (``twinrl doctor --simulate``), so it needs torch's CPU build.
Measured on a CPU there is no allocator to compare with, and the time is another machine's: the table is then a trial.
"""

import argparse
import json
import tempfile
from io import StringIO
from pathlib import Path
from typing import Any

import measuring
from random_model import SIZES, describe, overrides_of
from rich.console import Console

from twinrl.commands.simulate import Simulator, show
from twinrl.config.errors import InputError
from twinrl.machine.simulated.work import GPUS
from twinrl.training.simulated import Report

TRIAL = "H100"
"""Whose data sheet gives the time where the measured device is none of those that are known."""


def simulated(measured: dict[str, Any]) -> Report:
    """Of the run that was measured."""
    with tempfile.TemporaryDirectory() as place, Simulator() as simulator:
        describe(SIZES[measured["size"]][1], Path(place))
        rows = measured["batch"], measured["micro_batch"]
        return simulator.report("sd35", overrides_of(*rows, Path(place), "cuda"))


def table(report: Report, measured: dict[str, Any]) -> str:
    """Both as Markdown, and below all that the simulation says."""
    way, device = measured["ways"][0], measured["machine"]["device"]
    known = next((name for name in GPUS if name in device), None)
    gpu = known or TRIAL
    memory, waits, least = way["memory"], way["waits"], report.estimates[gpu].seconds
    rows = [
        ("peak of memory, GB", f"{report.peak.bytes / 1e9:.3g}", _of(memory, lambda n: f"{n / 1e9:.3g}"),
         _of(memory, lambda n: f"{report.peak.bytes / n - 1:+.1%}")),
        (f"seconds of a step, on an {gpu} at least", f"{least:.3g}", f"{way['seconds']:.3g}",
         f"× {way['seconds'] / least:.3g}" if known else "–"),
        ("waits of the host", report.waited, _of(waits, len), ""),
    ]  # fmt: skip
    shown = Console(file=StringIO(), width=160)
    show(report, gpu, shown)
    lines = [f"- `{line}`" for line in waits or ()]
    return (
        f"# Simulated and measured: {measured['model']}\n\nBatch {measured['batch']} in micro-batches of "
        f"{measured['micro_batch']}; measured on {device}.\n\n"
        + measuring.markdown(("", "simulated", "measured", "apart"), rows)
        + "".join(["\ntorch saw the host wait at\n\n", *(f"{line}\n" for line in lines)] if lines else [])
        + f"\n```text\n{shown.file.getvalue().strip()}\n```\n"  # type: ignore[attr-defined]
    )


def _of(value: Any, tell: Any) -> object:
    return "–" if value is None else tell(value)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="what large_model.py has written, .json")
    parser.add_argument("--out", type=Path, help="a file to write the table to; default: it is printed only")
    given = parser.parse_args(arguments)
    if not given.measured.is_file():
        raise SystemExit(f"{given.measured} is not there; fix: large_model.py --out writes it")
    measured = json.loads(given.measured.read_text())
    try:
        text = table(simulated(measured), measured)
    except InputError as error:
        raise SystemExit(str(error)) from error
    if given.out is not None:
        given.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
