"""The plan's bytes are those of the tensors that the trainer then holds."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.backends.families import tiny
from tests.data.folders.tiny import write_pairs
from tests.fake_source import register, small
from tests.families_end_to_end.test_from_folder_to_pipeline import switches
from twinrl import assembly, checkpoints, schema
from twinrl.backends.families import FAMILIES, family_class
from twinrl.commands import data
from twinrl.commands.plan import REWARD_PARAMETERS, Item, _rewards, plan, size_of
from twinrl.errors import InputError
from twinrl.runs import RunDirectory
from twinrl.trainer import Trainer


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
        "optimizer": size_of(checkpoints.optimizer_tensors(trainer.optimizer).values()),
    }
    shared = {id(p) for p in student}
    for name, copied in (("average (EMA)", teacher.ema), ("frozen teacher", teacher.frozen)):
        if copied is not None and list(copied.parameters()):
            found[name] = size_of(t for t in (*copied.parameters(), *copied.buffers()) if id(t) not in shared)
    if settings.model.family is not None:
        parts = source.family.pipeline.components.items()  # type: ignore[attr-defined]
        modules = {name: part for name, part in parts if isinstance(part, torch.nn.Module)}
        found |= {name: size_of([*part.parameters(), *part.buffers()]) for name, part in modules.items()}
    return found


def planned(settings: schema.RunConfig) -> dict[str, int]:
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
    assert planned(settings) == held(settings)


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
def test_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(family_class(family), "TOKENS", 192 if family == "qwen_image" else 64)
    pipeline, prepared = tmp_path / "pipeline", tmp_path / "prepared"
    tiny.build(family).save_pretrained(pipeline)
    write_pairs(tmp_path / "images", [(32, 32)] * 12)
    overrides, quiet = ["buckets.sizes=[[32,32]]", "buckets.multiple=8", "validation=0.3"], Console(quiet=True)
    data.prepare_data(tmp_path / "images", str(pipeline), prepared, overrides, data.Machine("cpu"), quiet)
    for name, more in {
        "full": [], "lora": ["model={lora: {rank: 2}, dtype: bf16}", "teacher={kind: ema, guidance: frozen}"],
    }.items():  # fmt: skip
        given = [
            f"model={{family: {family}, path: {pipeline}}}", *switches(family),
            f"data={{source: folder, root: {prepared}}}", "train.batch=4", f"run.dir={tmp_path / name}", *more,
        ]  # fmt: skip
        settings = schema.load("twinflow", given)
        expected, found = planned(settings), held(settings)
        if family == "qwen_image":  # nothing uses the last block's text, so some of its parameters get no gradient
            for name_of in ("gradients", "optimizer"):
                assert 0.8 * expected[name_of] < found.pop(name_of) <= expected.pop(name_of)
        assert expected == found


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
