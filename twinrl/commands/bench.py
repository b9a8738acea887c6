"""``twinrl bench``: what a sample costs, as users quote it: latency of one image, throughput of a batch of ten."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from twinrl import draws
from twinrl.commands.inspect import load
from twinrl.data.source import Source
from twinrl.errors import InputError
from twinrl.run import layout
from twinrl.sampling import SamplerConfig, euler, few_step, nfe, sample

LATENCY_BATCH, THROUGHPUT_BATCH = 1, 10
BATCHES = (LATENCY_BATCH, THROUGHPUT_BATCH)
DECODE = "decode (codec)"


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median over rounds, and the 95th percentile."""

    median: float
    p95: float


@dataclass(frozen=True)
class Line:
    """One way to sample (or the decoder): network evaluations per image, seconds at batch 1 and at batch 10."""

    name: str
    nfe: int
    latency: Timing
    batch: Timing

    @property
    def throughput(self) -> float:
        """Images per second at batch 10."""
        return THROUGHPUT_BATCH / self.batch.median


def measure(
    network: nn.Module, source: Source, evaluations: Sequence[int], teacher_steps: int, rounds: int
) -> list[Line]:
    """Time sampling at every NFE, a many-step teacher of the same architecture, and the codec's decoder.

    Arguments:
        network: student in eval mode; its weights do not matter for the time, so it stands for the teacher too.
        source: gives conditions and the codec, on the network's device.
        evaluations: NFE of the few-step samplers.
        teacher_steps: Euler steps of the teacher, without guidance (which would double them).
        rounds: timed calls of each, one of each in turn, after an untimed one.
    """
    samplers = {f"{n} NFE": few_step(n) for n in evaluations} | {"teacher, Euler": euler(teacher_steps)}
    device = next(network.parameters()).device
    calls: dict[tuple[str, int], Callable[[], Tensor]] = {}
    for batch in BATCHES:
        for name, sampler in samplers.items():
            calls[name, batch] = _sampling(network, source, sampler, batch, device)
        calls[DECODE, batch] = _decoding(source, batch, device)
    times = {key: _timing(seconds) for key, seconds in _in_turn(calls, rounds, device).items()}
    costs = {name: nfe(sampler) for name, sampler in samplers.items()} | {DECODE: 0}
    return [Line(name, costs[name], *(times[name, batch] for batch in BATCHES)) for name in costs]


def _sampling(
    network: nn.Module, source: Source, sampler: SamplerConfig, batch: int, device: torch.device
) -> Callable[[], Tensor]:
    noise = draws.normal((batch, *source.latent_shape), 0, "bench").to(device)
    prompts = source.prompts(torch.arange(batch) % len(source.classes), 0, 0)
    condition = source.condition(prompts)
    return lambda: sample(network, noise, condition, sampler)


def _decoding(source: Source, batch: int, device: torch.device) -> Callable[[], Tensor]:
    latents = draws.normal((batch, *source.latent_shape), 0, "bench").to(device)

    def decode() -> Tensor:
        with torch.no_grad():
            return source.decode(latents)

    return decode


def _in_turn(
    calls: dict[tuple[str, int], Callable[[], Tensor]], rounds: int, device: torch.device
) -> dict[tuple[str, int], list[float]]:
    """Seconds of every call in every round; the calls take turns, so a slow moment hits all of them."""
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for key, call in calls.items():
            _wait_for(device)
            started = time.perf_counter()
            call()
            _wait_for(device)
            seconds[key].append(time.perf_counter() - started)
    return seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timing(seconds: list[float]) -> Timing:
    median, p95 = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95]).double()).tolist()
    return Timing(median, p95)


# --- output ---------------------------------------------------------------------------------------------

COLUMNS = ("", "NFE", "latency, batch 1 (ms)", "p95 (ms)", "throughput, batch 10 (images/s)", "against the teacher")


def cells(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """The lines as text, one cell for each of ``COLUMNS``; the last is the throughput over the teacher's."""
    teacher = next(line for line in lines if line.name.startswith("teacher")).throughput
    return [
        (
            line.name,
            str(line.nfe or "–"),
            f"{1e3 * line.latency.median:.2f}",
            f"{1e3 * line.latency.p95:.2f}",
            f"{line.throughput:,.0f}" if line.throughput >= 10 else f"{line.throughput:.2f}",
            f"{line.throughput / teacher:.1f}×" if line.nfe else "–",
        )
        for line in lines
    ]


def as_dict(lines: Sequence[Line]) -> dict[str, Any]:
    """Plain values: seconds at batch 1 and 10, images per second."""
    return {line.name: asdict(line) | {"throughput": line.throughput} for line in lines}


def bench(path: Path, rounds: int, step: int | None, console: Console) -> int:
    """Time a run's judged network, print the table and write ``bench.json`` beside it."""
    settings, run, source, network = load(path, step)
    if settings.model.family is not None:
        raise InputError(f"{path} trains a family", expected="a run of the lab or MNIST, whose sampling can be timed")
    if settings.machine.threads:
        torch.set_num_threads(settings.machine.threads)
    config = settings.evaluation
    lines = measure(network, cast(Source, source), config.nfe, config.teacher_steps, rounds)
    device = next(network.parameters()).device
    console.print(rich_table(lines, f"{path.name} on {device}, {torch.get_num_threads()} CPU threads"))
    (run.path / layout.BENCH).write_text(json.dumps(as_dict(lines), indent=1) + "\n")
    return 0


def rich_table(lines: Sequence[Line], title: str) -> Table:
    """The table for the terminal."""
    table = Table(title=title, caption="Sampling without decoding; decoding is listed by itself. Medians over rounds.")
    for i, heading in enumerate(COLUMNS):
        table.add_column(heading, justify="right" if i else "left")
    for row in cells(lines):
        table.add_row(*row)
    return table
