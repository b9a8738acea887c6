"""Pretrained families on two processes: the run of one process, from shards that each rank reads for itself.

One spawn trains all of them; the tests compare with runs in this process.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.tensor import DTensor

from tests.backends.families import tiny
from tests.backends.families.conftest import SWITCHES
from tests.data.folders.tiny import write_pairs
from tests.fsdp.measures import held, kept, peak_of_reading, whole
from tests.rewards.tiny import hf_clip
from twinrl import assembly, checkpoints, schema
from twinrl.backends.families import FAMILIES, family_class
from twinrl.commands import data
from twinrl.commands.plan import plan
from twinrl.commands.train import train
from twinrl.errors import InputError
from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.fsdp.sharded import Sharded
from twinrl.rewards import inception
from twinrl.runs import RunDirectory
from twinrl.tracking import names, runlog
from twinrl.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

WORLD, STEPS = 2, 3
CPU = torch.device("cpu")
TOKENS = {"qwen_image": 192, "z_image": 64}  # templates are long where the tokenizer's tokens are letters
LORA = "model.lora={rank: 2}"
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sd3": ("sd3", ("terms.reward={branches: [e2e]}", "reward={model: brightness, gradient: {eta: 5}}")),
    "sd3 frozen in parts": (
        "sd3",
        ("terms.reward={branches: [e2e]}", "reward={model: brightness, gradient: {eta: 5}}", "fsdp.frozen=sharded"),
    ),
    "sd3 lora": ("sd3", (LORA, "teacher={kind: frozen, guidance: ema}", "guidance={form: teacher, strength: 1}")),
    "sd3 lora bf16": ("sd3", (LORA, "model.dtype=bf16")),
    "qwen_image": ("qwen_image", ("model.gradient_checkpointing=true",)),
    "qwen_image lora": ("qwen_image", (LORA, "model.target_time=false")),
    "z_image": ("z_image", ("fsdp.checkpoint_activations=true",)),
    "sana": ("sana", ("fsdp.cpu_offload=true",)),
    "flux": ("flux", ("model.target_time=false",)),
    "flux lora": ("flux", (LORA,)),
    "stable_diffusion": ("stable_diffusion", ()),
}


@dataclass(frozen=True)
class Made:
    """Where the pipelines and their prepared images are."""

    base: Path

    def settings(self, name: str, runs: str, *more: str) -> schema.RunConfig:
        family, overrides = CASES[name]
        switches = [f"model.{key}={str(value).lower()}" for key, value in SWITCHES.get(family, {}).items()]
        return schema.load(
            "twinflow",
            [
                f"model={{family: {family}, path: {self.base / family}}}", *switches,
                f"data={{source: folder, root: {self.base / 'prepared' / family}, row_multiple: {WORLD}}}",
                f"train={{steps: {STEPS}, batch: 8}}", "optim.lr=1e-4", "checkpoint.every=50", "tracking.mlflow=false",
                "evaluation={every: 0, n: 20, nfe: [1]}", "stability.capsules.every=0",
                f"run.dir={self.base / 'runs' / runs / name.replace(' ', '-')}", "name=tiny", *overrides, *more,
            ],
        )  # fmt: skip


def short_prompts() -> None:
    for family in FAMILIES:
        family_class(family).TOKENS = TOKENS.get(family, 32)


def run(settings: schema.RunConfig, ranks: Ranks) -> Trainer:
    folder = RunDirectory(settings.directory)
    ranks.on_first(lambda: folder.start(settings, fresh=False))
    source = assembly.load_source(settings, CPU)
    trainer = Trainer(settings, folder, source, CPU, lambda network, step: {names.VAL_QUALITY: 0.0}, ranks=ranks)
    trainer.resume()
    trainer.train()
    return trainer


def work(rank: int, base: Path) -> None:
    torch.set_num_threads(1)
    short_prompts()
    meeting = f"file://{base}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=timedelta(seconds=300))
    found: dict[str, Any] = {}
    for name in CASES:
        settings = Made(base).settings(name, "sharded")
        trainer = run(settings, Sharded(settings.fsdp, CPU))
        student = list(trainer.objective.teacher.student.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in student)
        found[name] = sum(map(held, student)) / sum(map(whole, student))
        if settings.fsdp.frozen == "sharded":
            peaks = {
                name: peak(settings, trainer, ranks) for name, ranks in (("sharded", trainer.ranks), ("whole", ALONE))
            }
            frozen = of_frozen(settings, trainer)
    torch.save(frozen | {"peaks": peaks}, base / f"frozen-{rank}.pt")
    judged(rank, base)
    torch.save(found, base / f"found-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


JUDGED = ("replicated", "sharded")


def judged_by(base: Path, frozen: str) -> schema.RunConfig:
    """A run that follows a reward model and is judged by it and by FID; all networks are real, of random weights."""
    clip = f"{{kind: clipscore, checkpoint: {base / 'clip'}}}"
    more = [
        f"reward={{model: {clip}, gradient: {{eta: 50}}, held_out: {{same: {clip}}}}}", f"judges={{clip: {clip}}}",
        f"fsdp={{frozen: {frozen}, watchdog: null}}", f"evaluation.reference={base / 'others'}",
        "terms.reward={branches: [e2e]}", f"evaluation.inception={base / 'inception.pth'}",
        "train.steps=2", "evaluation={every: 2, n: 20, nfe: [1]}",
    ]  # fmt: skip
    return Made(base).settings("sd3", f"judged-{frozen}", *more)


def judged(rank: int, base: Path) -> None:
    """Train by the command of either way of keeping frozen models."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD)}  # as a launcher would
    for frozen in JUDGED:
        assert train(judged_by(base, frozen), False, Console(quiet=True)) == 0


def peak(settings: schema.RunConfig, trainer: Trainer, ranks: Ranks) -> int:
    """Most bytes of tensors while a student is made."""
    return peak_of_reading(lambda: assembly.student_of(settings, trainer.source, CPU, True, ranks))


def of_frozen(settings: schema.RunConfig, trainer: Trainer) -> dict[str, Any]:
    """What VAE and text encoders say once validation has been set up, and the bytes that are kept of each."""
    source: Any = trainer.source
    assembly.protocol_of(settings, source, "validation", CPU, trainer.ranks)
    pixels = source.decode(torch.linspace(-1, 1, math.prod(source.latent_shape)).view(1, *source.latent_shape))
    parts = source.family.pipeline.components.items()
    bytes_of = {name: kept(part) for name, part in parts if isinstance(part, torch.nn.Module)}
    return {"pixels": pixels, "condition": dict(source.condition(["a cat"])), "bytes": bytes_of}


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    before, threads = {name: family_class(name).TOKENS for name in FAMILIES}, torch.get_num_threads()
    short_prompts()
    torch.set_num_threads(1)
    yield
    for name, tokens in before.items():
        family_class(name).TOKENS = tokens
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    base = tmp_path_factory.mktemp("families")
    write_pairs(base / "images", [[(32, 32), (64, 32)][i % 2] for i in range(16)])
    for family in FAMILIES:
        tiny.build(family).save_pretrained(base / family)
        sizes = ["buckets.sizes=[[32,32],[64,32]]", "buckets.multiple=8", "validation=0.25"]
        where = str(base / family), base / "prepared" / family
        data.prepare_data(base / "images", *where, sizes, data.Machine("cpu"), Console(quiet=True))
    write_pairs(base / "others", [(40, 30)] * 4)
    torch.save(inception.architecture().state_dict(), base / "inception.pth")
    hf_clip().save_pretrained(base / "clip")
    return Made(base)


@pytest.fixture(scope="module")
def sharded(made: Made) -> list[dict[str, Any]]:
    """What each of two processes found."""
    torch.multiprocessing.spawn(work, (made.base,), nprocs=WORLD)
    return [torch.load(made.base / f"found-{rank}.pt") for rank in range(WORLD)]


def rows(settings: schema.RunConfig) -> list[dict[str, Any]]:
    return runlog.read(settings.directory / runlog.LOG_NAME)


def tensors(settings: schema.RunConfig) -> dict[str, torch.Tensor]:
    found = checkpoints.load(RunDirectory(settings.directory).newest_checkpoint())
    return {f"{part}/{name}": value for part, values in found.tensors.items() for name, value in values.items()}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(made: Made, sharded: Any, name: str) -> None:
    """In float32; what a parameter becomes is compared with how far it has come (Adam amplifies tiny gradients)."""
    alone, together = made.settings(name, "alone"), made.settings(name, "sharded")
    run(alone, ALONE)
    tolerance = 0.1 if "bf16" in name else 1e-4  # products of other row counts are rounded in other places
    for ours, theirs in zip(rows(together), rows(alone), strict=True):
        for metric in (names.LOSS_TOTAL, "grad/total/norm_raw"):
            assert ours[metric] == pytest.approx(theirs[metric], rel=tolerance), (ours["step"], metric)
    ours, theirs = tensors(together), tensors(alone)
    assert set(ours) == set(theirs)
    lr = alone.optim.lr
    for key, value in theirs.items():
        if not key.startswith("optimizer/"):
            far = (ours[key].float() - value.float()).abs()
            assert float(far.max()) <= 2.1 * lr * STEPS, key
            assert float(far.mean()) <= 0.1 * lr * STEPS + 1e-7, key


def test_every_process_holds_its_share(sharded: list[dict[str, Any]]) -> None:
    for rank in sharded:
        for name, share in rank.items():
            assert share == pytest.approx(1 / WORLD, rel=0.15), name


def test_no_process_ever_holds_the_whole_transformer(made: Made, sharded: Any) -> None:
    for found in (torch.load(made.base / f"frozen-{rank}.pt")["peaks"] for rank in range(WORLD)):
        assert found["whole"] > 50_000  # the measure sees a whole network
        assert found["sharded"] < 0.9 * found["whole"]  # half, buffers, and a constructor's own needs in so small a one


def test_frozen_models_in_parts_say_the_same_and_take_what_is_planned(made: Made, sharded: Any) -> None:
    settings = made.settings("sd3 frozen in parts", "sharded")
    trainer = run(made.settings("sd3", "whole"), ALONE)
    expected = of_frozen(settings, trainer)
    planned = {item.name: item.each(WORLD) for item in plan(settings, WORLD)}
    for found in (torch.load(made.base / f"frozen-{rank}.pt") for rank in range(WORLD)):
        assert torch.equal(found["pixels"], expected["pixels"])
        for name, value in expected["condition"].items():
            assert torch.equal(found["condition"][name], value), name
        for name, whole_bytes in expected["bytes"].items():
            assert found["bytes"][name] == pytest.approx(planned[name], rel=0.1), name  # parts begin at 64 bytes
            assert planned[name] == pytest.approx(whole_bytes / WORLD, rel=0.01)


def test_rewards_and_judges_in_parts_change_no_number(made: Made, sharded: Any) -> None:
    """But in their last bits: weights that are read from a file begin anywhere in memory, gathered ones do not."""
    whole, parts = (rows(judged_by(made.base, frozen)) for frozen in JUDGED)
    for ours, theirs in zip(parts, whole, strict=True):
        assert set(ours) == set(theirs)
        for name in theirs:
            if name.startswith(("loss/total", "reward/", "grad/reward/norm", "grad/total/norm", "val/")):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), (theirs["step"], name)
    assert parts[-1]["val/fid_1nfe"] > 0
    assert math.isfinite(parts[-1]["val/held_out_score/clip_1nfe"])
    assert parts[0]["grad/reward/norm_raw"] > 0


def test_rows_that_cannot_be_shared_are_refused(made: Made) -> None:
    from twinrl.fsdp.sharded import check_equal_shares

    class Three(Ranks):
        def check_shares(self, counts: Any) -> None:
            check_equal_shares(counts, 3)

    settings = made.settings("sd3", "uneven")
    with pytest.raises(InputError, match=r"cannot be shared by 3 processes equally.*data\.row_multiple"):
        run(settings, Three())


def test_weights_that_are_not_in_safetensors_are_refused(made: Made, tmp_path: Path) -> None:
    class Elsewhere(family_class("sd3")):  # type: ignore[misc]
        def __init__(self) -> None:
            self.folder = tmp_path

    with pytest.raises(InputError, match="has no safetensors file"):
        Elsewhere().files()
