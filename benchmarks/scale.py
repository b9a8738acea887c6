"""What several processes cost: time, memory, and every message of a training step, counted.

    python benchmarks/scale.py [--processes 1 2 4] [--steps 5]     # on this machine, with gloo
    python benchmarks/scale.py --paper                             # Qwen-Image on 8 and on 64 H200, calculated

A DiT of 4 blocks trains on random pixels, once with one clip of the summed gradient (`gradients.space=none`) and once
with every term's gradient taken apart and clipped for itself. Messages are counted where torch hands them to the
process group. The *payload* of a message is the tensor that every rank has in the end (gather), puts in
(reduce-scatter) or both (all-reduce); a ring sends (N−1)/N of it from every rank, twice that for an all-reduce.
Bytes held are those of tensors.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import measuring
import numpy as np
import paper
import torch
import torch.distributed as dist
from measuring import Pixels
from torch import Tensor
from torch.distributed.tensor import DTensor

from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.fsdp.sharded import Sharded
from twinrl.machine.simulated.messages import KINDS, Messages
from twinrl.training import schema
from twinrl.training.runs import RunDirectory
from twinrl.training.trainer import Trainer

CLIPPING = {
    "global": ("gradients={space: none, each: {}, total: {clip: {max_norm: 1}}}",),
    "per term": ("gradients.each.clip.max_norm=1", "gradients.telemetry={shares_every: 0, cosines_every: 0}"),
}
NETWORK = "model.network={kind: dit, width: 64, depth: 4, heads: 4, patch: 4, condition_width: 64}"
COMMON = (
    NETWORK, "train.batch=32", "train.init=random", "tracking.mlflow=false", "evaluation.every=0",
    "stability.capsules.every=0", "data.source=mnist", "machine.device=cpu",
)  # fmt: skip
HELD = ("student", "gradients", "optimizer", "average (EMA)")


@dataclass(frozen=True)
class Found:
    """Of one process.

    Attributes:
        seconds: of every step.
        count, payload: messages of one step by kind, and their bytes.
        held: bytes of tensors by what they are.
    """

    seconds: list[float]
    count: dict[str, int]
    payload: dict[str, int]
    held: dict[str, int]


def settings_of(clipping: str, folder: Path) -> schema.RunConfig:
    """The benchmark's run."""
    return schema.load("twinflow", [*COMMON, *CLIPPING[clipping], f"run.dir={folder}"])


def measure(settings: schema.RunConfig, ranks: Ranks, steps: int) -> Found:
    """Train for a few steps; the messages are those of the one after them."""
    run = RunDirectory(settings.directory)
    ranks.on_first(lambda: run.start(settings, fresh=True))
    device = torch.device("cpu")
    trainer = Trainer(settings, run, Pixels(None), device, lambda network, step: {}, ranks=ranks)
    trainer.train_step()
    seconds = [measuring.clocked(trainer.train_step).wall for _ in range(steps)]
    messages = Messages()
    with messages:
        trainer.train_step()
    held = _held(trainer)
    trainer.log.close(), trainer.events.close()
    return Found(seconds, messages.count, messages.payload, held)


def _held(trainer: Trainer) -> dict[str, int]:
    """Bytes of tensors in this process."""
    teacher, state = trainer.objective.teacher, trainer.optimizer.state.values()
    assert teacher.ema is not None
    groups: Mapping[str, Sequence[Tensor | None]] = {
        "student": [*teacher.student.parameters(), *teacher.student.buffers()],
        "gradients": [p.grad for p in trainer.engine.parameters],
        "optimizer": [value for entry in state for value in entry.values()],
        "average (EMA)": [*teacher.ema.parameters(), *teacher.ema.buffers()],
    }
    return {name: sum(_bytes(t) for t in group if t is not None) for name, group in groups.items()}


def _bytes(tensor: Tensor) -> int:
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.numel() * own.element_size()


def work(rank: int, world: int, folder: Path, steps: int) -> None:
    """One process of ``world``: all ways of clipping; what it found goes to a file."""
    torch.set_num_threads(1)
    with _group(rank, world, folder):
        found = {}
        for clipping in CLIPPING:
            settings = settings_of(clipping, folder / f"{world}-{clipping.replace(' ', '-')}")
            ranks = Sharded(settings.fsdp, torch.device("cpu")) if world > 1 else ALONE
            found[clipping] = asdict(measure(settings, ranks, steps))
    (folder / f"found-{world}-{rank}.json").write_text(json.dumps(found))


@contextmanager
def _group(rank: int, world: int, folder: Path) -> Iterator[None]:
    if world == 1:
        yield
        return
    meeting = f"file://{folder}/meeting-{world}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(minutes=10))
    yield
    dist.barrier()
    dist.destroy_process_group()


def measured(worlds: Sequence[int], steps: int) -> dict[int, list[dict[str, Found]]]:
    """Processes → what each of them found, by clipping."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for world in worlds:
            torch.multiprocessing.spawn(work, (world, folder, steps), nprocs=world)
        return {world: [_read(folder / f"found-{world}-{rank}.json") for rank in range(world)] for world in worlds}


def _read(path: Path) -> dict[str, Found]:
    return {name: Found(**one) for name, one in json.loads(path.read_text()).items()}


def tables(found: Mapping[int, list[dict[str, Found]]]) -> str:
    """Both tables in Markdown."""
    lines = []
    for world, ranks in found.items():
        for clipping, one in ranks[0].items():
            total = sum(one.payload.values())
            kinds = [
                f"{one.count.get(k, 0)} ({one.payload.get(k, 0) / 1024:,.1f})" for k in dict.fromkeys(KINDS.values())
            ]
            step = f"{np.median(one.seconds):.3f}"
            lines.append([f"{world}, {clipping}", step, sum(one.count.values()), f"{total / 1024:,.0f}", *kinds])
    kinds = [f"{kind} (KiB)" for kind in dict.fromkeys(KINDS.values())]
    messages = measuring.markdown(["processes, clipping", "step (s)", "messages", "KiB in all", *kinds], lines)
    rows = [
        [f"{world}, {name}", *(f"{rank['global'].held[name] / 1024:.1f}" for rank in (ranks[0], ranks[-1]))]
        for world, ranks in found.items() for name in HELD
    ]  # fmt: skip
    return messages + "\n" + measuring.markdown(["processes, what", "first (KiB)", "last (KiB)"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--out", type=Path, default=measuring.RESULTS / "scale")
    parser.add_argument("--paper", action="store_true", help="print the calculation for Qwen-Image on 8 and 64 H200")
    given = parser.parse_args(arguments)
    if given.paper:
        print(paper.report())
        return
    machine = measuring.machine(torch.device("cpu"))
    found = measured(given.processes, given.steps)
    text = (
        "# One step on several processes\n\nDiT of 4 blocks, width 64, on 28×28 pixels, 32 rows in all, gloo, a thread "
        f"each; {machine['device']}, torch {machine['torch']}, load average {machine['load_average']}. More processes "
        "than free cores, so seconds say nothing about scaling; counts and bytes are exact. What a payload is: see the "
        f"script.\n\n{tables(found)}\nMade by `python benchmarks/scale.py`.\n"
    )
    plain = {
        world: [{name: asdict(one) for name, one in rank.items()} for rank in ranks] for world, ranks in found.items()
    }
    measuring.write(given.out, {"machine": machine, "found": plain}, text)
    print(text)


if __name__ == "__main__":
    main()
