"""What the simulation says: of a step that ``large_model.py`` has measured, and of all families at published sizes.

    python benchmarks/simulated.py build/gpu/large_model.json     # side by side with what was measured
    python benchmarks/simulated.py --table [--only sd35 flux]     # results/simulated.{json,md}; hours in all

Both take the run without a device (``twinrl doctor --simulate``). Measured on a CPU there is no allocator to compare
with, and the time is another machine's: that table is then a trial. Of the other one every row is a run of a preset;
rows are kept as they come, and ``--only`` makes those again whose name has one of its words.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import measuring
import published
from random_model import SIZES, describe, overrides_of
from rich.console import Console

from twinrl.commands.simulate import Simulator, show
from twinrl.config.errors import InputError
from twinrl.machine.simulated.work import GPUS
from twinrl.training import schema
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


# --- all families -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A line of the table.

    Attributes:
        preset: of the run. processes: GPUs. overrides: of the preset.
        note: what they say, for people.
    """

    preset: str
    processes: int
    overrides: tuple[str, ...] = ()
    note: str = ""

    @property
    def name(self) -> str:
        """It."""
        return f"{self.preset}{f', {self.note}' if self.note else ''}, {self.processes}"


ADAPTED, WHOLE = ("model.lora={rank: 64, alpha: 64}", "model.dtype=bf16"), ("model.lora=null",)
PRESETS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("sd35", (), "all"), ("sd35-lora", (), ""), ("qwen-image", (), "all"), ("qwen-image-lora", (), ""),
    ("published-qwen2512", (), "all, reward"), ("flux", WHOLE, "all"), ("flux", (), "LoRA"), ("z-image", WHOLE, "all"),
    ("z-image", (), "LoRA"), ("sana", (), "all"), ("sana", ADAPTED, "LoRA"), ("sd15", WHOLE, "all"),
    ("sd15", (), "LoRA"),
)  # fmt: skip
AVERAGED = ("teacher={kind: ema, decay: 0.99, allow_live: false}",)
RUNS = (
    *(Run(preset, n, overrides, note) for preset, overrides, note in PRESETS for n in (1, 8)),
    *(Run("qwen-image", n, AVERAGED, "all, average") for n in (8, 64)),
    Run("qwen-image", 64, (*AVERAGED, "fsdp.replicate=8"), "all, average, 8 copies"),
)
"""Batches are the presets', or four rows a GPU where these are more."""


def report_of(run: Run) -> Report:
    """The simulation of a line, in a process of its own."""
    batch = schema.load(run.preset).train.batch
    with tempfile.TemporaryDirectory() as place, Simulator() as simulator:
        folder = published.describe(str(schema.load(run.preset).model.family), Path(place))
        overrides = [f"model.path={folder}", f"train.batch={max(batch, 4 * run.processes)}", *run.overrides]
        return simulator.report(run.preset, overrides, run.processes)


def lines(found: Mapping[str, Report]) -> str:
    """The table of what is there, in Markdown."""
    columns = ("run, GPUs", "rows of a GPU", "peak, GB", "where", "most of it", "waits", "messages", "their GB", "s")
    return measuring.markdown(
        columns,
        [_line(run, found[run.name]) for run in RUNS if run.name in found],
    )


def _line(run: Run, report: Report) -> tuple[object, ...]:
    peak = report.peak
    phase = next(name for name, one in report.peaks.items() if one is peak)
    most = sorted(peak.owners.items(), key=lambda item: -item[1])[:3]
    return (
        run.name, " in ".join(map(str, dict.fromkeys(report.rows))), f"{peak.bytes / 1e9:.1f}", phase,
        ", ".join(f"{owner} {size / 1e9:.1f}" for owner, size in most), report.waited,
        sum(report.messages.values()) or "–",
        f"{sum(report.payload.values()) / 1e9:.0f}" if report.payload else "–", f"{report.seconds:.0f}",
    )  # fmt: skip


def make(words: Sequence[str], out: Path) -> str:
    """Simulate what is missing, or what ``words`` ask for, and write the files after each; the table."""
    stored = out.with_suffix(".json")
    found = {name: Report.of(one) for name, one in json.loads(stored.read_text()).items()} if stored.is_file() else {}
    for run in RUNS:
        if any(word in run.name for word in words) if words else run.name not in found:
            found[run.name] = report_of(run)
            measuring.write(out, {name: asdict(one) for name, one in found.items()}, lines(found))
            print(lines({run.name: found[run.name]}).splitlines()[-1], flush=True)
    return lines(found)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, nargs="?", help="what large_model.py has written, .json")
    parser.add_argument("--table", action="store_true", help="simulate all families")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="of --table: rows by parts of their name")
    parser.add_argument(
        "--out", type=Path, help="a file to write to; default: printed only, of --table results/simulated"
    )
    given = parser.parse_args(arguments)
    try:
        if given.table:
            print(make(given.only, given.out or measuring.RESULTS / "simulated"))
            return
        if given.measured is None or not given.measured.is_file():
            raise SystemExit(f"{given.measured} is not there; fix: large_model.py --out writes it, or --table")
        measured = json.loads(given.measured.read_text())
        text = table(simulated(measured), measured)
    except InputError as error:
        raise SystemExit(str(error)) from error
    if given.out is not None:
        given.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
