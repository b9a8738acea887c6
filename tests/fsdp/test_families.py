"""Pretrained families on two processes: the run of one process, from shards that each rank reads for itself.

One spawn trains some of them, and in a campaign another one the rest; the tests compare with runs in this process.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.tensor import DTensor

from tests.backends.families.made import made, short_prompts
from tests.data.tiny import write_pairs
from tests.fsdp.measures import held, kept, peak_of_reading, whole
from tests.fsdp.spawned import spawned
from tests.logs import rows, tensors
from tests.rewards.tiny import hf_clip
from tests.rounding import assert_rounded, bound
from twinrl.backends.families import family_class
from twinrl.commands.train import train
from twinrl.config.errors import InputError
from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.fsdp.sharded import Sharded
from twinrl.rewards import inception
from twinrl.run import names
from twinrl.training import assembly, schema
from twinrl.training.runs import RunDirectory
from twinrl.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(3000)]

WORLD, STEPS = 2, 2
CPU = torch.device("cpu")
LORA = "model.lora={rank: 2}"
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sd3": ("sd3", ("terms.reward={branches: [e2e]}", "reward={model: brightness, gradient: {eta: 5}}")),
    "sd3 frozen in parts": (
        "sd3",
        (
            "terms.reward={branches: [e2e]}",
            "fsdp.frozen=sharded",
            "reward={model: {kind: clipscore, checkpoint: BASE/clip}, gradient: {eta: 5}}",
        ),
    ),
    "sd3 lora": ("sd3", (LORA, "teacher={kind: frozen, guidance: ema}", "guidance={form: teacher, strength: 1}")),
    "sd3 bf16": ("sd3", ("model.dtype=bf16",)),
    "sd3 lora bf16": ("sd3", (LORA, "model.dtype=bf16")),
    "qwen_image": ("qwen_image", ("model.gradient_checkpointing=true",)),
    "qwen_image lora": ("qwen_image", (LORA, "model.target_time=false")),
    "z_image": ("z_image", ("fsdp.checkpoint_activations=true",)),
    "sana": ("sana", ("fsdp.cpu_offload=true",)),
    "flux": ("flux", ("model.target_time=false",)),
    "flux lora": ("flux", (LORA,)),
    "flux2": ("flux2", ()),
    "flux2_klein lora": ("flux2_klein", (LORA,)),
    "stable_diffusion": ("stable_diffusion", ()),
}


QUICK = ("sd3 frozen in parts", "flux lora", "stable_diffusion")
"""Proved by `make test`: joint text and image, packed latents, a U-Net; the rest take a campaign."""
FROZEN = "sd3 frozen in parts"
SPAWNS = {"few": QUICK, "others": tuple(name for name in CASES if name not in QUICK)}


def settings_of(base: Path, name: str, runs: str, *more: str) -> schema.RunConfig:
    """Of a case, with its pipeline and images made on first use.

    With so large an ε a step of Adam is one along the gradients: it does not amplify those near 0, where rounding
    decides.
    """
    family, overrides = CASES[name]
    return schema.load(
        "twinflow",
        [
            *made(base, family).overrides, f"data.row_multiple={WORLD}", f"train={{steps: {STEPS}, batch: 8}}",
            "optim={lr: 0.1, eps: 1}", "checkpoint.every=50", "tracking.mlflow=false",
            "evaluation={every: 0, n: 20, nfe: [1]}", "stability.capsules.every=0",
            f"run.dir={base / 'runs' / runs / name.replace(' ', '-')}", "name=tiny",
            *(override.replace("BASE", str(base)) for override in overrides), *more,
        ],
    )  # fmt: skip


def run(settings: schema.RunConfig, ranks: Ranks) -> Trainer:
    folder = RunDirectory(settings.directory)
    ranks.on_first(lambda: folder.start(settings, fresh=False))
    source = assembly.load_source(settings, CPU)
    trainer = Trainer(settings, folder, source, CPU, lambda network, step: {names.VAL_QUALITY: 0.0}, ranks=ranks)
    trainer.resume()
    trainer.train()
    return trainer


def work(base: Path, spawn: str) -> dict[str, Any]:
    with short_prompts():
        return _work(base, spawn)


def _work(base: Path, spawn: str) -> dict[str, Any]:
    found: dict[str, Any] = {"shares": {}}
    for name in SPAWNS[spawn]:
        settings = settings_of(base, name, "sharded")
        trainer = run(settings, Sharded(settings.fsdp, CPU))
        student = list(trainer.objective.teacher.student.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in student)
        found["shares"][name] = sum(map(held, student)) / sum(map(whole, student))
        if name == FROZEN:
            ways = {"sharded": trainer.ranks, "whole": ALONE}
            found["peaks"] = {way: peak(settings, trainer, ranks) for way, ranks in ways.items()}
            found["frozen"] = of_frozen(settings, trainer.source, trainer.ranks)
    if spawn == "others":
        judged(dist.get_rank(), base)
    return found


JUDGED = ("replicated", "sharded")


def judged_by(base: Path, frozen: str) -> schema.RunConfig:
    """A run that follows a reward model and is judged by it and by FID; all networks are real, of random weights."""
    clip = f"{{kind: clipscore, checkpoint: {base / 'clip'}}}"
    more = [
        f"reward={{model: {clip}, gradient: {{eta: 50}}, held_out: {{same: {clip}}}}}", f"judges={{clip: {clip}}}",
        f"fsdp={{frozen: {frozen}, watchdog: null}}", f"evaluation.reference={base / 'others'}",
        "terms.reward={branches: [e2e]}", f"evaluation.inception={base / 'inception.pth'}",
        "evaluation={every: 2, n: 20, nfe: [1]}",
    ]  # fmt: skip
    return settings_of(base, "sd3", f"judged-{frozen}", *more)


def judged(rank: int, base: Path) -> None:
    """Train by the command of either way of keeping frozen models."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD)}  # as a launcher would
    for frozen in JUDGED:
        assert train(judged_by(base, frozen), False, Console(quiet=True)) == 0


def peak(settings: schema.RunConfig, trainer: Trainer, ranks: Ranks) -> int:
    """Most bytes of tensors while a student is made."""
    return peak_of_reading(lambda: assembly.provider_of(settings, trainer.source, CPU, ranks).student())


def of_frozen(settings: schema.RunConfig, source: Any, ranks: Ranks) -> dict[str, Any]:
    """What VAE and text encoders say once validation has been set up, and the bytes that are kept of each."""
    assembly.provider_of(settings, source, CPU, ranks).protocol("validation")
    pixels = source.decode(torch.linspace(-1, 1, math.prod(source.latent_shape)).view(1, *source.latent_shape))
    parts = source.family.pipeline.components.items()
    bytes_of = {name: kept(part) for name, part in parts if isinstance(part, torch.nn.Module)}
    return {"pixels": pixels, "condition": dict(source.condition(["a cat"])), "bytes": bytes_of}


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with short_prompts():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def sharded(base: Path) -> Callable[[str], list[dict[str, Any]]]:
    """What each of two processes found, by the name of the spawn."""
    hf_clip().save_pretrained(base / "clip")

    @functools.cache
    def found(spawn: str) -> list[dict[str, Any]]:
        for name in (*SPAWNS[spawn], "sd3"):
            made(base, CASES[name][0])  # before two processes would at once
        if spawn == "others":
            write_pairs(base / "others", [(40, 30)] * 4)
            torch.save(inception.architecture().state_dict(), base / "inception.pth")
        folder = base / f"spawned-{spawn}"
        folder.mkdir()
        return spawned(work, WORLD, folder, base, spawn)

    return found


def away(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Root of the sum of squares of the difference."""
    return float((ours.double() - theirs.double()).norm())


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.campaign]) for n in CASES])
def test_two_processes_equal_one(base: Path, sharded: Any, name: str) -> None:
    """Losses, gradients, and how far each tensor has come, but for rounding: a batch in two parts is added up so.

    4000 roundings: the widths of the layers, added up, forward and backward, over two steps. A tensor's gradient
    may be what is left of larger numbers, which are taken as 1 % of all gradients. Stable Diffusion's prediction is
    divided by α, which multiplies errors by 15.
    """
    sharded("few" if name in QUICK else "others")
    alone, together = settings_of(base, name, "alone"), settings_of(base, name, "sharded")
    trainer = run(alone, ALONE)
    rounding = bound(4000, scale=15 if name == "stable_diffusion" else 1)
    if "bf16" in name:
        rounding = bound(32, dtype=torch.bfloat16)
    for ours, theirs in zip(rows(together.directory), rows(alone.directory), strict=True):
        for metric in (names.LOSS_TOTAL, "grad/total/norm_raw"):
            assert ours[metric] == pytest.approx(theirs[metric], rel=rounding), (ours["step"], metric)
    start = assembly.provider_of(alone, trainer.source, CPU).student().state_dict()
    ours, theirs = tensors(together.directory), tensors(alone.directory)
    assert set(ours) == set(theirs)
    came = {key: away(theirs[key], start[key.removeprefix("student/")]) for key in theirs if key.startswith("student/")}
    all_of_it = math.hypot(*came.values())
    assert all_of_it > 1e-3
    for key, far in came.items():
        kept = bound(2 * STEPS, float(theirs[key].norm()))  # of a weight, whatever it is moved by
        assert away(ours[key], theirs[key]) <= rounding * (far + 0.01 * all_of_it) + kept, key
    for key in (key for key in theirs if key.startswith("ema/")):
        assert away(ours[key], theirs[key]) <= rounding * all_of_it + bound(2 * STEPS, float(theirs[key].norm())), key


@pytest.mark.parametrize("spawn", ["few", pytest.param("others", marks=pytest.mark.campaign)])
def test_every_process_holds_its_share(sharded: Any, spawn: str) -> None:
    for rank in sharded(spawn):
        for name, share in rank["shares"].items():
            assert share == pytest.approx(1 / WORLD, rel=0.15), name


def test_no_process_ever_holds_the_whole_transformer(sharded: Any) -> None:
    for peaks in (found["peaks"] for found in sharded("few")):
        assert peaks["whole"] > 50_000  # the measure sees a whole network
        assert peaks["sharded"] < 0.9 * peaks["whole"]  # half, buffers, and a constructor's own needs in so small a one


def test_frozen_models_in_parts_say_the_same_and_take_their_part(base: Path, sharded: Any) -> None:
    """But for rounding: weights that are read from a file begin anywhere in memory, gathered ones do not."""
    found = sharded("few")
    settings = settings_of(base, FROZEN, "sharded")
    expected = of_frozen(settings, assembly.load_source(settings, CPU), ALONE)
    for frozen in (rank["frozen"] for rank in found):
        assert_rounded(frozen["pixels"], expected["pixels"], 1000, msg="pixels")
        for name, value in expected["condition"].items():
            assert_rounded(frozen["condition"][name], value, 500, msg=name)
        for name, whole_bytes in expected["bytes"].items():
            assert frozen["bytes"][name] == pytest.approx(whole_bytes / WORLD, rel=0.1), name  # parts begin at 64 bytes


@pytest.mark.campaign
def test_rewards_and_judges_in_parts_change_no_number(base: Path, sharded: Any) -> None:
    """But for rounding, as above; distances of few images in 2048 dimensions have fewer digits."""
    sharded("others")
    whole, parts = (rows(judged_by(base, frozen).directory) for frozen in JUDGED)
    for ours, theirs in zip(parts, whole, strict=True):
        assert set(ours) == set(theirs)
        for name in theirs:
            if name.startswith(("loss/total", "reward/", "grad/reward/norm", "grad/total/norm", "val/")):
                near = 1e-2 if "fid" in name or "kid" in name else bound(2000)
                assert ours[name] == pytest.approx(theirs[name], rel=near, abs=bound(100)), (theirs["step"], name)
    assert math.isfinite(parts[-1]["val/held_out_score/clip_1nfe"])
    assert parts[0]["grad/reward/norm_raw"] > 0
    assert parts[-1]["val/fid_1nfe"] > 0


def test_rows_that_cannot_be_shared_are_refused(base: Path) -> None:
    from twinrl.fsdp.sharded import check_equal_shares

    class Three(Ranks):
        def check_shares(self, counts: Any) -> None:
            check_equal_shares(counts, 3)

    settings = settings_of(base, "sd3", "uneven")
    with pytest.raises(InputError, match=r"cannot be shared by 3 processes equally.*data\.row_multiple"):
        run(settings, Three())


def test_weights_that_are_not_in_safetensors_are_refused(tmp_path: Path) -> None:
    class Elsewhere(family_class("sd3")):  # type: ignore[misc]
        def __init__(self) -> None:
            self.folder = tmp_path

    with pytest.raises(InputError, match="has no safetensors file"):
        Elsewhere().files()
