"""What ``twinrl.watch`` costs a training loop of one's own, above ``sum(losses).backward()``.

    python benchmarks/watch.py [--sizes small large] [--rounds 15]

A transformer predicts noise of (B, T, D) tokens; three losses come from its one forward pass. Each arm makes whole
steps of a loop over the same network with the same fused AdamW: forward, losses, gradient, optimizer.

*plain*: ``sum(losses).backward()``. *floor*: a backward pass for each loss through the retained graph, which is what
exact gradients of each cannot do without. *outputs*: ``watch.backward(…, outputs=[…])``, norms alone. *rules*: the
same with ZClip on every loss and a clip of the sum. *parameters*: ``watch.backward(…)``, norms alone. *parameters,
rules*: the same rules. In these nothing is measured that needs a gradient of its own. *defaults*: parameters with
telemetry as it comes.

The arms make a step in turn, round by round, in one process. A number is the median over rounds of the ratio of two
arms in the same round, with a 95 % bootstrap interval. Memory: the allocator's own account of one step (its peak above
what was held before), less the arm's reference, in gradients (bytes of all trainable parameters).
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import Estimate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import twinrl
from twinrl.training import assembly, schema

QUIET = {"shares_every": 0, "cosines_every": 0, "rms_every": 0, "update_every": 0}
RULES = {"each": {"zclip": {}}, "total": {"clip": {"max_norm": 1.0}}}
ARMS: dict[str, tuple[bool, dict[str, Any]]] = {  # outputs, options
    "outputs": (True, {"telemetry": QUIET}),
    "rules": (True, {"telemetry": QUIET, "rules": RULES}),
    "parameters": (False, {"telemetry": QUIET}),
    "parameters, rules": (False, {"telemetry": QUIET, "rules": RULES}),
    "defaults": (False, {}),
}
REFERENCE = {arm: "plain" if outputs else "floor" for arm, (outputs, _) in ARMS.items()}
AIMS = {"outputs": 1.05, "rules": 1.10, "parameters": 1.05}


@dataclass(frozen=True)
class Size:
    """A transformer, and the batch that it sees."""

    width: int
    layers: int
    batch: int
    tokens: int


SIZES = {"small": Size(192, 4, 32, 64), "large": Size(1024, 8, 4, 64), "tiny": Size(16, 1, 2, 4)}


@dataclass(frozen=True)
class Measured:
    """One size: parameters, milliseconds of a plain step, ratios over each arm's reference, extra gradients held."""

    size: str
    parameters: int
    plain: float
    floor: Estimate
    wall: dict[str, Estimate]
    cpu: dict[str, Estimate]
    extra: dict[str, float]
    rounds: int


class Network(nn.Module):
    """(B, T, D) tokens to as many."""

    def __init__(self, size: Size):
        super().__init__()
        layer = nn.TransformerEncoderLayer(size.width, 8, 4 * size.width, 0.0, "gelu", batch_first=True)
        self.body = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


def losses_of(y: Tensor, noise: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """Three losses of one forward pass."""
    return {
        "flow": (y - noise).square().mean(),
        "adversarial": nn.functional.softplus(-(y * direction).mean((1, 2))).mean(),
        "reward": -(y * direction).tanh().mean(),
    }


class Arm:
    """A loop over one network and optimizer, which the arms share; called for a step."""

    def __init__(self, name: str, network: Network, optimizer: torch.optim.Optimizer, data: Tensor, folder: Path):
        self.name, self.network, self.optimizer = name, network, optimizer
        self.x, self.noise, self.direction = data.unbind()
        self.watch = None
        if name in ARMS:
            _, options = ARMS[name]
            self.watch = twinrl.watch(self.network, self.optimizer, run=folder / name.replace(", ", "-"), **options)

    def __call__(self) -> None:
        y = self.network(self.x)
        losses = losses_of(y, self.noise, self.direction)
        if self.watch is not None:
            self.watch.backward(losses, outputs=[y] if ARMS[self.name][0] else None)
            self.optimizer.step()
            self.watch.step()
            return
        if self.name == "plain":
            torch.stack(list(losses.values())).sum().backward()
        else:
            for k, loss in enumerate(losses.values()):
                loss.backward(retain_graph=k < len(losses) - 1)
        self.optimizer.step()
        self.optimizer.zero_grad()


def peak_of(arm: Callable[[], None], device: torch.device) -> float:
    """Largest number of bytes above what was held before the step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        arm()
        return float(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        arm()
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return float(peak)


def measure(name: str, rounds: int, warmup: int, times: int, device: torch.device) -> Measured:
    """All arms of one size, in turn."""
    size = SIZES[name]
    torch.manual_seed(0)
    network = Network(size).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    data = torch.randn(3, size.batch, size.tokens, size.width, device=device)
    with tempfile.TemporaryDirectory() as folder:
        arms = {arm: Arm(arm, network, optimizer, data, Path(folder)) for arm in ("plain", "floor", *ARMS)}
        for _ in range(warmup):
            for arm in arms.values():
                arm()
        timings = [{n: measuring.clocked(lambda a=a: _repeated(a, times), device) for n, a in arms.items()}
                   for _ in range(rounds)]  # fmt: skip
        peaks = {n: peak_of(arm, device) for n, arm in arms.items()}
        for arm in arms.values():
            if arm.watch is not None:
                arm.watch.close()
    parameters = list(network.parameters())
    gradient = sum(p.numel() * p.element_size() for p in parameters)
    wall = [{n: seconds.wall for n, seconds in one.items()} for one in timings]
    cpu = [{n: seconds.cpu for n, seconds in one.items()} for one in timings]
    return Measured(
        name, sum(p.numel() for p in parameters), 1e3 * measuring.median([one["plain"] for one in wall]).value / times,
        measuring.median([one["floor"] / one["plain"] for one in wall]), _ratios(wall), _ratios(cpu),
        {arm: (peaks[arm] - peaks[reference]) / gradient for arm, reference in REFERENCE.items()}, rounds,
    )  # fmt: skip


def _repeated(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()


def _ratios(rounds: list[dict[str, float]]) -> dict[str, Estimate]:
    return {arm: measuring.median([one[arm] / one[r] for one in rounds]) for arm, r in REFERENCE.items()}


def table(lines: list[Measured], result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    where = result["machine"]
    columns = ["transformer", "arm", "over", "aim", "ratio, CPU time", "ratio, wall", "gradients held beside"]
    rows = [
        [f"{m.size}, {m.parameters / 1e6:.1f} M", arm, REFERENCE[arm], AIMS.get(arm, ""), m.cpu[arm], m.wall[arm],
         f"{m.extra[arm]:.2f}"]
        for m in lines for arm in ARMS
    ]  # fmt: skip
    plain = "; ".join(f"{m.size}: {m.plain:.1f} ms, the floor {m.floor} times that" for m in lines)
    head = (
        f"# What watching a loop costs\n\n{where['device']}, {where['threads']} thread(s), torch {where['torch']}, "
        f"load average {where['load_average']}; medians over {lines[0].rounds} rounds, 95 % bootstrap intervals. "
        f"A plain step takes: {plain}.\n\n"
        "*plain*: `sum(losses).backward()`; *floor*: a backward pass for each of the three losses. *Gradients held*: "
        "peak memory of a step above its reference's, over the bytes of all trained parameters.\n\n"
    )
    sizes = " ".join(m.size for m in lines)
    return f"{head}{measuring.markdown(columns, rows)}\nMade by `python benchmarks/watch.py --sizes {sizes}`.\n"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["small", "large"], choices=SIZES, help="transformers to measure")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=2, help="untimed rounds before")
    parser.add_argument("--times", type=int, default=1, help="steps of an arm in a round")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=measuring.RESULTS / "watch", help="files to write, no suffix")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    device = assembly.device_of(schema.load("tutorial", [f"machine.device={given.device}"]))
    lines = [measure(name, given.rounds, given.warmup, given.times, device) for name in given.sizes]
    result = {"machine": measuring.machine(device), "sizes": [asdict(line) for line in lines]}
    text = table(lines, result)
    measuring.write(given.out, result, text)
    print(text)


if __name__ == "__main__":
    main()
