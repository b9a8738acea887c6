"""Pretrained families on two processes: the run of one process, from shards that each rank reads for itself.

One spawn trains all of them; the tests compare with runs in this process.
"""

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
from tests.fsdp.measures import held, whole
from twinrl import assembly, checkpoints, schema
from twinrl.backends.families import FAMILIES, family_class
from twinrl.commands import data
from twinrl.errors import InputError
from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.fsdp.sharded import Sharded
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

    def settings(self, name: str, runs: str) -> schema.RunConfig:
        family, overrides = CASES[name]
        switches = [f"model.{key}={str(value).lower()}" for key, value in SWITCHES.get(family, {}).items()]
        return schema.load(
            "twinflow",
            [
                f"model={{family: {family}, path: {self.base / family}}}", *switches,
                f"data={{source: folder, root: {self.base / 'prepared' / family}, row_multiple: {WORLD}}}",
                f"train={{steps: {STEPS}, batch: 8}}", "optim.lr=1e-4", "checkpoint.every=50", "tracking.mlflow=false",
                "evaluation={every: 0, n: 20, nfe: [1]}", "stability.capsules.every=0",
                f"run.dir={self.base / 'runs' / runs}", "name=tiny", *overrides,
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
    torch.save(found, base / f"found-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


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
