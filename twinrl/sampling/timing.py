"""What a sample costs, as users quote it: latency of one image, throughput of a batch of ten."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twinrl.flow import draws
from twinrl.flow.source import Data
from twinrl.sampling.sampler import sample
from twinrl.sampling.settings import SamplerConfig, euler, few_step, nfe

LATENCY_BATCH, THROUGHPUT_BATCH = 1, 10
BATCHES = (LATENCY_BATCH, THROUGHPUT_BATCH)
DECODE = "decode (codec)"


@dataclass(frozen=True)
class CallTiming:
    """Seconds of one call: median over rounds, and the 95th percentile."""

    median: float
    p95: float


@dataclass(frozen=True)
class TimingLine:
    """One way to sample (or the decoder): network evaluations per image, seconds at batch 1 and at batch 10."""

    name: str
    nfe: int
    latency: CallTiming
    batch: CallTiming

    @property
    def throughput(self) -> float:
        """Images per second at batch 10."""
        return THROUGHPUT_BATCH / self.batch.median


def measure(
    network: nn.Module,
    source: Data,
    prompts: Sequence[str],
    evaluations: Sequence[int],
    teacher_steps: int,
    rounds: int,
) -> list[TimingLine]:
    """Time sampling at every NFE, a many-step teacher of the same architecture, and the codec's decoder.

    Arguments:
        network: student in eval mode; its weights do not matter for the time, so it stands for the teacher too.
        source: gives conditions and the codec, on the network's device.
        prompts: what is asked for, in turn.
        evaluations: NFE of the few-step samplers.
        teacher_steps: Euler steps of the teacher, without guidance (which would double them).
        rounds: timed calls of each, one of each in turn, after an untimed one.
    """
    samplers = {f"{n} NFE": few_step(n) for n in evaluations} | {"teacher, Euler": euler(teacher_steps)}
    device = next(network.parameters()).device
    calls: dict[tuple[str, int], Callable[[], Tensor]] = {}
    for batch in BATCHES:
        for name, sampler in samplers.items():
            calls[name, batch] = _sampling(network, source, prompts, sampler, batch, device)
        calls[DECODE, batch] = _decoding(source, batch, device)
    times = {key: _timing(seconds) for key, seconds in _in_turn(calls, rounds, device).items()}
    costs = {name: nfe(sampler) for name, sampler in samplers.items()} | {DECODE: 0}
    return [TimingLine(name, costs[name], *(times[name, batch] for batch in BATCHES)) for name in costs]


def _sampling(
    network: nn.Module, source: Data, prompts: Sequence[str], sampler: SamplerConfig, batch: int, device: torch.device
) -> Callable[[], Tensor]:
    noise = draws.normal((batch, *source.latent_shape), 0, "bench").to(device)
    condition = source.condition([prompts[i % len(prompts)] for i in range(batch)])
    return lambda: sample(network, noise, condition, sampler)


def _decoding(source: Data, batch: int, device: torch.device) -> Callable[[], Tensor]:
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


def _timing(seconds: list[float]) -> CallTiming:
    median, p95 = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95]).double()).tolist()
    return CallTiming(median, p95)


def as_dict(lines: Sequence[TimingLine]) -> dict[str, Any]:
    """Plain values: seconds at batch 1 and 10, images per second."""
    return {line.name: asdict(line) | {"throughput": line.throughput} for line in lines}
