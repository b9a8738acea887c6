"""Whether it pays to train seeds packed into one process, by network and batch.

    python benchmarks/packed.py [--seeds 8] [--steps 2] [--pairs 8] [--device cpu]

*Packed*: ``--steps`` full training steps (data, draws, queries, network passes, losses, per-term gradients, EMA,
optimizer, log row) of S trainers whose network calls are batched (:mod:`twinrl.packed`). *Separate*: the same steps of
S ordinary trainers, one after the other on the same threads. Both run in turn in one process; the number is the
median over pairs of separate / packed with a 95 % bootstrap interval over pairs: above 1, packing pays. On a machine
with several cores separate seeds can also run side by side: packing has to beat that by as many cores as it leaves
unused.
"""

import argparse
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import Estimate, Seconds

from twinrl import assembly, schema
from twinrl.data.source import Data
from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.packed import Member, Networks
from twinrl.runs import RunDirectory
from twinrl.schema import RunConfig
from twinrl.trainer import Trainer

CASES = {
    "MLP 32×1, batch 16": ("{kind: mlp, width: 32, depth: 1, condition_width: 32}", 16),
    "MLP 128×2, batch 16": ("{kind: mlp, width: 128, depth: 2, condition_width: 64}", 16),
    "lab MLP 384×4, batch 16": ("{kind: mlp}", 16),
    "lab MLP 384×4, batch 64": ("{kind: mlp}", 64),
}


@dataclass(frozen=True)
class Measured:
    """One case's line: milliseconds of CPU time of a step of one seed, and how many times faster packed is."""

    case: str
    separate: float
    packed: float
    wall_ratio: Estimate
    cpu_ratio: Estimate


def settings_of(network: str, batch: int, device: str, folder: Path, seed: int) -> RunConfig:
    """The lab's recipe on a network with random weights."""
    return schema.load(
        "lab",
        [f"model.network={network}", f"train.batch={batch}", "train.init=random", f"seed={seed}", f"run.dir={folder}",
         f"machine.device={device}"],
    )  # fmt: skip


def trainer_of(settings: RunConfig, source: Data, device: torch.device, ranks: Ranks) -> Trainer:
    """A real trainer in a new run directory."""
    run = RunDirectory(settings.directory)
    run.start(settings, fresh=True)
    return Trainer(settings, run, source, device, lambda network, step: {}, ranks=ranks)


def advance(trainer: Trainer, steps: int) -> None:
    """Steps as the loop makes them, log rows included."""
    for _ in range(steps):
        row, *_ = trainer.train_step()
        trainer.log.append(row)


def measure(case: str, seeds: int, steps: int, pairs: int, device: torch.device) -> Measured:
    """Packed and separate steps of one case, in turn."""
    network, batch = CASES[case]
    networks = Networks(seeds)
    with tempfile.TemporaryDirectory() as folder:
        made = [settings_of(network, batch, str(device), Path(folder, "separate"), seed) for seed in range(seeds)]
        source = assembly.load_source(made[0], device)
        separate = [trainer_of(settings, source, device, ALONE) for settings in made]
        made = [settings_of(network, batch, str(device), Path(folder, "packed"), seed) for seed in range(seeds)]
        packed = [trainer_of(settings, source, device, Member(networks, i)) for i, settings in enumerate(made)]

        def one_by_one() -> None:
            for trainer in separate:
                advance(trainer, steps)

        def together() -> None:
            ended = networks.rendezvous.run([lambda t=trainer: advance(t, steps) for trainer in packed])
            errors = [one.error for one in ended if one.error is not None]
            if errors:
                raise errors[0]

        timings = measuring.interleaved(one_by_one, together, pairs, 1, device)
        for trainer in separate + packed:
            trainer.log.close()
            trainer.events.close()
    return summarised(case, seeds * steps, timings)


def summarised(case: str, steps: int, timings: list[tuple[Seconds, Seconds]]) -> Measured:
    """Medians and ratios of a case's timings, each of ``steps`` steps in all."""
    return Measured(
        case,
        *(1000 * measuring.median([pair[which].cpu for pair in timings]).value / steps for which in (0, 1)),
        measuring.median([separate.wall / packed.wall for separate, packed in timings]),
        measuring.median([separate.cpu / packed.cpu for separate, packed in timings]),
    )


def table(lines: list[Measured], result: dict[str, Any]) -> str:
    """The result as Markdown."""
    columns = ("network", "separate (ms CPU)", "packed (ms CPU)", "times faster, wall", "times faster, CPU time")
    rows = [(m.case, f"{m.separate:.1f}", f"{m.packed:.1f}", m.wall_ratio, m.cpu_ratio) for m in lines]
    where = result["machine"]
    head = (
        f"# Seeds packed into one process\n\nOne step of one seed of the lab's recipe, {result['seeds']} seeds, "
        f"{where['threads']} thread(s), {where['device']}, torch {where['torch']}, load average "
        f"{where['load_average']}; medians over {result['pairs']} pairs, 95 % bootstrap intervals. Above 1, packing "
        "pays.\n\n"
    )
    options = " ".join(f"--{name} {result[name]}" for name in ("seeds", "steps", "pairs"))
    command = f"\nMade by `python benchmarks/packed.py {options}`.\n"
    return head + measuring.markdown(columns, rows) + command


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="networks and batches")
    parser.add_argument("--seeds", type=int, default=8, help="trainers in each way")
    parser.add_argument("--steps", type=int, default=2, help="steps of each seed in one timing")
    parser.add_argument("--pairs", type=int, default=8, help="timings of each way")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=measuring.RESULTS / "packed", help="files to write, no suffix")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    device = assembly.device_of(schema.load("lab", [f"machine.device={given.device}"]))
    lines = []
    for case in given.cases:
        lines.append(measure(case, given.seeds, given.steps, given.pairs, device))
        print(lines[-1], flush=True)
    result = {
        "seeds": given.seeds,
        "steps": given.steps,
        "pairs": given.pairs,
        "machine": measuring.machine(device),
        "cases": [asdict(line) for line in lines],
    }
    text = table(lines, result)
    measuring.write(given.out, result, text)
    print(text)


if __name__ == "__main__":
    main()
