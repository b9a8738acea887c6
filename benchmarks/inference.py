"""What a sample costs: latency at batch 1 and throughput at batch 10, per NFE, beside a 50-step teacher.

    python benchmarks/inference.py [RUN_OR_PRESET [KEY.PATH=VALUE …]] [--rounds 30]

Times a run's network, or a fresh network of a preset (weights do not change the time; the teacher is the same
architecture sampled with 50 Euler steps, without guidance). Every kind of call takes its turn in every round.
Decoding by the codec is listed by itself and is not part of the other lines. For a run, ``twinrl bench RUN``
does the same.
"""

import argparse
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import Pixels
from torch import nn

from twinrl.commands import bench
from twinrl.sampling import timing
from twinrl.training import assembly, schema
from twinrl.training.opened import open_run
from twinrl.training.provider import Provider

MNIST = ("model.network={kind: unet, width: 32}", "data.source=mnist", "train.init=random")


def target(name: str, overrides: list[str]) -> tuple[Provider[Any], nn.Module]:
    """Provider and network (eval mode) of a run directory, or of a preset with overrides."""
    if Path(name).is_dir():
        opened = open_run(Path(name))
        return opened.provider, opened.network
    settings = schema.load(name, overrides)
    device = assembly.device_of(settings)
    on_mnist = settings.data.source == "mnist"
    source = Pixels(measuring.mnist_root()).to(str(device)) if on_mnist else assembly.load_source(settings, device)
    provider = assembly.provider_of(settings, source, device)
    return provider, provider.network().to(device).eval()


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", default="tutorial", help="run directory, preset or YAML file")
    parser.add_argument("overrides", nargs="*", help="for a preset; default: the UNet of width 32 on MNIST")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each kind")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=measuring.RESULTS / "inference", help="files to write, no suffix")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    provider, network = target(given.target, given.overrides or list(MNIST))
    settings, source = provider.settings, provider.source
    config, prompts = settings.evaluation, provider.example_prompts(0)
    lines = timing.measure(network, source, prompts, config.nfe, config.teacher_steps, given.rounds)
    device = next(network.parameters()).device
    where = measuring.machine(device)
    parameters = sum(p.numel() for p in network.parameters())
    result = {
        "target": given.target,
        "network": settings.model.network.model_dump(),
        "parameters": parameters,
        "machine": where,
        "rounds": given.rounds,
        "lines": timing.as_dict(lines),
    }
    head = (
        f"# Inference\n\n{given.target}, {settings.model.network.kind} with {parameters / 1e6:.2f} M parameters on "
        f"{'×'.join(map(str, source.latent_shape))} latents ({source.name}); {where['device']}, {where['threads']} "
        f"thread(s), torch {where['torch']}, load average {where['load_average']}; medians over {given.rounds} "
        "rounds. Sampling without decoding; decoding by itself in the last line.\n\n"
    )
    text = head + measuring.markdown(bench.COLUMNS, bench.cells(lines))
    measuring.write(given.out, result, text)
    print(text)


if __name__ == "__main__":
    main()
