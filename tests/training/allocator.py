"""Bytes that torch's allocator gives out in a step of the real trainer, on a CPU."""

import gc
from itertools import accumulate

import torch

from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.machine.sharding import local
from twinrl.training import assembly, schema
from twinrl.training.runs import RunDirectory
from twinrl.training.simulated import DescribedModels
from twinrl.training.trainer import Trainer

CPU = torch.device("cpu")


def allocated(settings: schema.RunConfig) -> int:
    """The most bytes that are given out at once, beyond those that are at the start of a step."""
    return most(_trainer(settings, assembly.load_source(settings, CPU)))


def allocated_of_family(settings: schema.RunConfig, ranks: Ranks = ALONE) -> int:
    """The same of a pipeline that is described alone; its weights are small random numbers."""
    trainer = _trainer(settings, DescribedModels.load(settings, CPU), ranks=ranks, provided=DescribedModels)
    teacher = trainer.objective.teacher
    for network in filter(None, (teacher.student, teacher.ema)):
        for parameter in network.parameters():
            local(parameter).data.normal_(std=0.02)
    return most(trainer)


def _trainer(settings: schema.RunConfig, source: object, **more: object) -> Trainer:
    run = RunDirectory(settings.directory)
    more.get("ranks", ALONE).on_first(lambda: run.start(settings, fresh=True))  # type: ignore[attr-defined]
    return Trainer(settings, run, source, CPU, lambda network, step: {}, **more)  # type: ignore[arg-type]


def most(trainer: Trainer) -> int:
    """Of its second step; the first one makes the optimizer's state."""
    trainer.train_step()
    gc.collect()  # what earlier tests have left would be counted where it is freed
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.train_step()
    trainer.log.close()
    trainer.events.close()
    made = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(made, key=lambda event: event.start_ns())))
