"""The plan's bytes are those of the tensors that the trainer then holds."""

import gc
import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backends.families import tiny
from tests.backends.families.made import SIZES, made, short_prompts
from tests.fake_source import register, small
from twinrl.backends.families import FAMILIES
from twinrl.commands.memory_plan import REWARD_PARAMETERS, Item, _rewards, at_the_peak, plan, size_of
from twinrl.config.errors import InputError
from twinrl.data.prepare import CACHE_FORMAT, MANIFEST
from twinrl.run import fit
from twinrl.training import assembly, schema
from twinrl.training.runs import RunDirectory
from twinrl.training.trainer import Trainer


def held(settings: schema.RunConfig) -> dict[str, int]:
    """Bytes of the real trainer's tensors after a step."""
    device = torch.device("cpu")
    source = assembly.load_source(settings, device)
    run = RunDirectory(settings.directory)
    run.start(settings, fresh=False)
    trainer = Trainer(settings, run, source, device, lambda network, step: {"val/quality": 0.0})
    trainer.train_step()
    trainer.log.close()
    trainer.events.close()
    teacher = trainer.objective.teacher
    student = [*teacher.student.parameters(), *teacher.student.buffers()]
    found = {
        "student": size_of(student),
        "gradients": size_of(p.grad for p in teacher.student.parameters() if p.grad is not None),
        "optimizer": size_of(fit.optimizer_tensors(trainer.optimizer).values()),
    }
    shared = {id(p) for p in student}
    for name, copied in (("average (EMA)", teacher.ema), ("frozen teacher", teacher.frozen)):
        if copied is not None and list(copied.parameters()):
            found[name] = size_of(t for t in (*copied.parameters(), *copied.buffers()) if id(t) not in shared)
    if teacher.remainder is not None:
        found["average (EMA)"] += size_of(teacher.remainder.parameters())
    if settings.model.family is not None:
        parts = source.family.pipeline.components.items()  # type: ignore[attr-defined]
        modules = {name: part for name, part in parts if isinstance(part, torch.nn.Module)}
        found |= {name: size_of([*part.parameters(), *part.buffers()]) for name, part in modules.items()}
    return found


def planned(settings: schema.RunConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What is exact: without the seconds of a step without values."""
    monkeypatch.setattr("twinrl.commands.memory_plan.of_a_step", lambda *_: [])
    return {item.name: item.bytes for item in plan(settings) if item.exact}


@pytest.mark.parametrize("teacher", ["{kind: ema}", "{kind: ema, guidance: frozen}", "{kind: live, allow_live: true}"])
@pytest.mark.parametrize("network", ["mlp", "dit", "unet"])
def test_own_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, teacher: str) -> None:
    register(monkeypatch)
    sizes = {
        "mlp": "{kind: mlp, width: 8}",
        "dit": "{kind: dit, patch: 2}",
        "unet": "{kind: unet, width: 8, multipliers: [1]}",
    }
    settings = small(tmp_path, f"model.network={sizes[network]}", f"teacher={teacher}")
    assert planned(settings, monkeypatch) == held(settings)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where tiny models are. On one thread: kernels' workspaces, which the plan does not count, grow with threads."""
    with short_prompts():
        yield tmp_path_factory.mktemp("families")


def of_family(
    base: Path, run: Path, family: str, sizes: Sequence[tuple[int, int]], more: Sequence[str]
) -> schema.RunConfig:
    """A configuration of a tiny model of a family with prepared images of these sizes."""
    given = [*made(base, family, sizes).overrides, "machine.device=cpu", "train.batch=4", f"run.dir={run}", *more]
    return schema.load("twinflow", given)


OFF = {(family, "reward, recomputed") for family in ("sd3", "z_image", "sana", "qwen_image")}
OFF |= {("qwen_image", "recomputed"), ("sd3", "recomputed")}
"""The plan is off by 15 to 48 % here; what a simulation says is compared in ``test_simulated.py``."""


def cases(quick: set[tuple[str, str]], settings: dict[str, list[str]]) -> Any:
    """All families with all settings; those that are not quickly proved take a campaign."""
    both = [(family, name) for family in FAMILIES for name in settings]
    marks = {case: [] if case in quick else [pytest.mark.campaign] for case in both}
    for case in OFF & set(both):
        marks[case].append(pytest.mark.xfail(strict=True, raises=AssertionError, reason="the plan is off here"))
    return pytest.mark.parametrize(("family", "name"), [pytest.param(*case, marks=marks[case]) for case in both])


HELD = {
    "full": [],
    "bf16": ["model.dtype=bf16"],
    "lora": ["model={lora: {rank: 2}, dtype: bf16}", "teacher={kind: ema, guidance: frozen}"],
}


@pytest.mark.slow
@cases({("z_image", "lora"), ("stable_diffusion", "full"), ("z_image", "bf16")}, HELD)
def test_families(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, name: str) -> None:
    settings = of_family(base, tmp_path, family, SIZES, HELD[name])
    expected, found = planned(settings, monkeypatch), held(settings)
    if family == "qwen_image":  # nothing uses the last block's text, so some of its parameters get no gradient
        for name_of in ("gradients", "optimizer"):
            assert 0.8 * expected[name_of] < found.pop(name_of) <= expected.pop(name_of)
    assert expected == found


def allocated(settings: schema.RunConfig) -> int:
    """The most bytes that torch's allocator has given out in a step of the real trainer, beyond those at its start."""
    device = torch.device("cpu")
    source = assembly.load_source(settings, device)
    run = RunDirectory(settings.directory)
    run.start(settings, fresh=False)
    trainer = Trainer(settings, run, source, device, lambda network, step: {"val/quality": 0.0})
    trainer.train_step()  # which makes the optimizer's state
    gc.collect()  # what earlier tests have left would be counted where it is freed
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.train_step()
    trainer.log.close()
    trainer.events.close()
    made = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(made, key=lambda event: event.start_ns())))


STEPS = {
    "full": [],
    "bf16": ["train.precision=bf16"],
    "recomputed": ["model.gradient_checkpointing=true", "train.micro_batch=2"],
    "lora": ["model={lora: {rank: 2}, dtype: bf16}"],
    "reward": [
        "terms.reward={branches: [e2e]}",
        "reward={model: brightness, gradient: {estimator: autograd}}",
        "gradients.terms.rectify.clip.max_norm=1",
    ],
}
STEPS["reward, recomputed"] = [*STEPS["reward"], "model.gradient_checkpointing=true"]  # the VAE's pass is most of it
PEAKS = {("flux", "reward, recomputed"), ("flux", "recomputed")}


@pytest.mark.slow
@cases(PEAKS, STEPS)
def test_a_steps_peak_is_near_the_allocators(base: Path, tmp_path: Path, family: str, name: str) -> None:
    """Within 15 %, of a step that holds many times its weights (and gradients, which are not there when it starts)."""
    settings = of_family(base, tmp_path, family, [(64, 64)], STEPS[name])
    items = plan(settings)
    before = sum(item.bytes for item in items if not item.host and not item.phases)
    assert at_the_peak(items) == pytest.approx(before + allocated(settings), rel=0.15)
    assert at_the_peak(items) > 1.3 * before


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mlp", "unet"])
def test_activations_grow_with_the_rows_of_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    register(monkeypatch)
    width = f"model.network={{kind: {network}, width: 32{', multipliers: [1]' if network == 'unet' else ''}}}"

    def activations(*more: str) -> int:
        return next(i.bytes for i in plan(small(tmp_path, width, *more)) if i.name == "activations")

    few, many = activations("train.batch=8"), activations("train.batch=32")
    assert 2 * few < many < 4.1 * few
    assert activations("train.batch=32", "train.micro_batch=8") == few


def test_parts_of_a_step_come_one_after_the_other() -> None:
    always, early, late = Item("a", 8), Item("b", 4, phases=("forward", "backward")), Item("c", 3, phases=("update",))
    assert at_the_peak([always, early, late, Item("d", 99, host=True)], 2) == 4 + 2
    assert early.where == "device, forward, backward"


def test_shares_of_processes() -> None:
    assert (Item("student", 10).each(4), Item("vae", 10, shared=False).each(4)) == (3, 10)


def test_a_visit_adds_what_is_not_on_the_device_yet() -> None:
    waiting, parted = Item("vae", 12, shared=False, host=True, visits=True), Item("vae", 12, visits=True)
    assert (waiting.visit(4), waiting.where) == (12, "host, visits the device")
    assert (parted.each(4), parted.visit(4), parted.where) == (3, 9, "device, gathered while used")
    assert (Item("student", 12).visit(4), Item("student", 12).where) == (0, "device")


def test_frozen_models_are_either_on_the_host_or_in_parts() -> None:
    with pytest.raises(InputError, match=r"fsdp\.frozen=sharded in parts on the device; fix: choose one"):
        schema.load("sd35", ["model.path=x", "machine.offload=true", "fsdp.frozen=sharded"])


def test_a_model_that_cannot_be_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="description of no/such cannot be fetched"):
        plan(schema.load("sd35", ["model.path=no/such"]))


def test_another_familys_pipeline_is_not_planned(tmp_path: Path) -> None:
    tiny.build("sd3").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is another family's; got StableDiffusion3Pipeline; expected FluxPipeline"):
        plan(schema.load("flux", [f"model.path={tmp_path}"]))


def test_latents_beyond_a_models_positions_are_refused(tmp_path: Path) -> None:
    tiny.build("sd3").save_pretrained(tmp_path / "pipeline")
    (tmp_path / "data").mkdir()
    bucket = {"name": "8192x8192", "width": 8192, "height": 8192, "latent_shape": [4, 1024, 1024]}
    manifest = {"encoder": "x", "content_hash": "x", "images": True, "lengths": {}, "buckets": [bucket]}
    (tmp_path / "data" / MANIFEST).write_text(json.dumps({"format": CACHE_FORMAT, **manifest}))
    given = [
        f"model={{family: sd3, path: {tmp_path / 'pipeline'}}}",
        f"data={{source: folder, root: {tmp_path / 'data'}}}",
    ]
    with pytest.raises(InputError, match="the model does not take latents of 4×1024×1024; got"):
        plan(schema.load("twinflow", given))


def test_equal_rewards_are_planned_once_and_offloading_moves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def rewards(*more: str) -> dict[str, tuple[int, bool, bool]]:
        given = [
            "model.path=x", "terms.reward={branches: [e2e]}", "reward={model: pickscore, held_out: {same: pickscore}}",
            "judges={clip: clipscore}", *more,
        ]  # fmt: skip
        return {item.name: (item.bytes, item.host, item.visits) for item in _rewards(schema.load("sd35", given))}

    pickscore, clip = (4 * int(REWARD_PARAMETERS[kind]) for kind in ("pickscore", "clipscore"))
    assert rewards() == {
        "reward (pickscore), about": (pickscore, False, False),
        "clip (clipscore), about": (clip, False, False),
    }
    assert rewards("machine.offload=true")["reward (pickscore), about"] == (pickscore, True, True)
    assert rewards("fsdp.frozen=sharded")["reward (pickscore), about"] == (pickscore, False, True)
    assert "inception, about" in rewards("evaluation.reference=images")
