"""A family sharded over one device, by NCCL on a GPU and gloo on a CPU: train, resume, export, a stock pipeline."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.tensor import DTensor

from tests.backends.families.made import Made, made, short_prompts
from tests.fsdp.measures import messages
from tests.logs import rows
from tests.rounding import bound
from twinrl.commands.export import export
from twinrl.fsdp import mesh
from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.fsdp.sharded import Sharded
from twinrl.run import names
from twinrl.training import assembly, schema
from twinrl.training.runs import RunDirectory
from twinrl.training.trainer import Trainer

pytestmark = pytest.mark.slow

STEPS = 3


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[torch.device]:
    """The device, with a process group of one for it."""
    found = mesh.device_named(request.param, "device")
    where = f"file://{tmp_path}/meeting"
    dist.init_process_group(mesh.backend_of(found), init_method=where, rank=0, world_size=1)
    with short_prompts():
        yield found
    dist.destroy_process_group()


def settings_of(family: Made, folder: Path, device: torch.device, *more: str) -> schema.RunConfig:
    """With so large an ε a step of Adam is one along the gradients: it does not amplify those near 0."""
    return schema.load(
        "twinflow",
        [
            *family.overrides, f"train={{steps: {STEPS}, batch: 8}}", "optim={lr: 0.1, eps: 1}", "checkpoint.every=2",
            "tracking.mlflow=false", "terms.reward={branches: [e2e]}", "reward={model: brightness, gradient: {eta: 5}}",
            f"run.dir={folder}", f"machine.device={device}", "evaluation.every=0", "name=tiny", *more,
        ],
    )  # fmt: skip


def trainer_of(settings: schema.RunConfig, device: torch.device, ranks: Ranks) -> Trainer:
    run = RunDirectory(settings.directory)
    if not run.exists:
        run.start(settings, fresh=False)
    source = assembly.load_source(settings, device)
    trainer = Trainer(settings, run, source, device, lambda network, step: {names.VAL_QUALITY: 0.0}, ranks=ranks)
    trainer.resume()
    return trainer


def test_train_resume_export_sample(device: torch.device, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    family = made(tmp_path, "sd3")
    alone = trainer_of(settings_of(family, tmp_path / "alone", device), device, ALONE)
    alone.train()
    settings = settings_of(family, tmp_path / "sharded", device)
    sharded = Sharded(settings.fsdp, device)
    first = trainer_of(settings, device, sharded)
    assert all(isinstance(parameter, DTensor) for parameter in first.engine.parameters)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "FSDP2-wrapped module")
        first.asked_to_stop = lambda: first.step == 2
        first.train()
    second = trainer_of(settings, device, sharded)
    assert second.step == 2
    assert messages(second).total() > 0  # losses and numbers: one rank gathers and reduces no parameters
    second = trainer_of(settings, device, sharded)
    assert second.train().status == "finished"
    for ours, theirs in zip(rows(second.run), rows(alone.run), strict=True):
        for metric in (names.LOSS_TOTAL, names.GRAD_TOTAL_RAW, names.REWARD_MEAN):  # as of two processes
            assert ours[metric] == pytest.approx(theirs[metric], rel=bound(4000), abs=bound(4000)), metric
    export(second.run.path, tmp_path / "student", False, None, None, None, Console(quiet=True))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student").to(device)
    pipeline.set_progress_bar_config(disable=True)
    told = {"height": 32, "width": 64, "output_type": "pt", "max_sequence_length": 32}
    images = pipeline(["a red cat"], num_inference_steps=2, guidance_scale=0, **told).images
    assert images.shape == (1, 3, 32, 64)
    assert images.isfinite().all()
