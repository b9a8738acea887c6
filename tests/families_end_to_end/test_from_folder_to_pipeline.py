"""The whole way for every family: pipeline on disk → prepared images → training with a reward → kill and resume →
export → a stock diffusers pipeline whose samples are our sampler's.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.backends.families import tiny
from tests.backends.families.conftest import CALL, SWITCHES, length
from tests.data.folders.tiny import write_pairs
from tests.rewards.tiny import hf_clip
from twinrl import assembly, checkpoints, schema
from twinrl.backends.families import FAMILIES, family_class
from twinrl.backends.families.family import FrozenTeacher
from twinrl.commands import data, inspect
from twinrl.commands.export import export
from twinrl.commands.train import resume, train
from twinrl.errors import InputError
from twinrl.rewards import inception
from twinrl.runs import RunDirectory
from twinrl.sampling import few_step, keyed_noise, sample
from twinrl.trainer import Trainer

pytestmark = pytest.mark.slow

TOKENS = {"qwen_image": 192, "z_image": 64}  # templates are long where the tokenizer's tokens are letters
SIZES = [(32, 32), (64, 32)]
PROMPTS = ["a red cat", "b"]
MAX_NORM = 1e-3


def switches(name: str) -> list[str]:
    """What a diffusion model's run says so."""
    return [f"model.{key}={str(value).lower()}" for key, value in SWITCHES.get(name, {}).items()]


@dataclass(frozen=True)
class Made:
    """A family's pipeline and the images prepared for it."""

    name: str
    pipeline: Path
    prepared: Path

    def settings(self, runs: Path, *overrides: str) -> schema.RunConfig:
        return schema.load(
            "twinflow",
            [
                f"model={{family: {self.name}, path: {self.pipeline}}}", *switches(self.name),
                f"data={{source: folder, root: {self.prepared}}}",
                "train={steps: 20, batch: 8}", "optim.lr=1e-3", "terms.reward={branches: [e2e]}",
                "reward={model: brightness, gradient: {eta: 50}, held_out: {edges: sharpness}}",
                f"gradients.terms.reward.clip.max_norm={MAX_NORM}", "checkpoint.every=5", "tracking.mlflow=false",
                "evaluation={every: 10, n: 20, nfe: [1, 2], grid_samples: 2, batch: 4, velocity_rows: 4}",
                f"run.dir={runs}", "name=tiny", *overrides,
            ],
        )  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in FAMILIES:
        monkeypatch.setattr(family_class(name), "TOKENS", TOKENS.get(name, 32))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path: Path, quiet: Console) -> Made:
    """The family that the test names, saved to disk, with images of two shapes prepared for it."""
    name = request.param
    tiny.build(name).save_pretrained(tmp_path / "pipeline")
    write_pairs(tmp_path / "images", [SIZES[i % 2] for i in range(24)])
    overrides = ["buckets.sizes=[[32,32],[64,32]]", "buckets.multiple=8", "validation=0.3"]
    model, prepared = str(tmp_path / "pipeline"), tmp_path / "prepared"
    data.prepare_data(tmp_path / "images", model, prepared, overrides, data.Machine("cpu"), quiet)
    return Made(name, tmp_path / "pipeline", prepared)


class Killed(Exception):  # noqa: N818
    """Stands for SIGKILL."""


class KillAt:
    """An observer that dies after a step."""

    def __init__(self, step: int):
        self.step = step

    def after_step(self, row: Any) -> None:
        if row["step"] == self.step:
            raise Killed

    def after_checkpoint(self, offset: int) -> None: ...

    def after_event(self, event: object) -> None: ...


def kill(settings: schema.RunConfig, step: int) -> RunDirectory:
    """A run that is dead after ``step``, its checkpoint some steps before."""
    run, device = RunDirectory(settings.directory), torch.device("cpu")
    run.start(settings, fresh=False)
    source = assembly.load_source(settings, device)
    trainer = Trainer(settings, run, source, device, lambda network, step: {"val/quality": 0.0})
    trainer.observers.append(KillAt(step))
    trainer.resume()
    with pytest.raises(Killed):
        trainer.train()
    return run


def rows(run: RunDirectory) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in run.log.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in found]


def judged(run: RunDirectory) -> dict[str, torch.Tensor]:
    return dict(checkpoints.load(run.newest_checkpoint()).judged)


families = pytest.mark.parametrize("made", list(FAMILIES), indirect=True)


@families
def test_train_with_reward_kill_resume_export_sample(made: Made, tmp_path: Path, quiet: Console) -> None:
    settings = made.settings(tmp_path / "straight", "model.lora={rank: 2}")
    assert train(settings, False, quiet) == 0
    run = RunDirectory(settings.directory)

    logged = rows(run)
    assert len(logged) == 20
    assert all(math.isfinite(row["loss/total"]) and math.isfinite(row["reward/mean"]) for row in logged)
    assert all(row["grad/reward/norm_clipped"] <= MAX_NORM * 1.001 for row in logged)
    assert max(row["grad/reward/norm_raw"] for row in logged) > MAX_NORM  # so the clip has something to do
    for name in ("val/quality", "val/velocity_mse", "val/score/brightness_1nfe", "val/held_out_score/edges_2nfe"):
        assert math.isfinite(logged[9][name])
    assert all("lora_" in name or "twin" in name or "_2." in name for name in judged(run))  # the base is not stored

    killed = kill(made.settings(tmp_path / "killed", "model.lora={rank: 2}"), 7)
    assert resume(killed.path, quiet) == 0
    before, after = judged(run), judged(killed)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert rows(killed) == logged

    export(run.path, tmp_path / "student", False, None, None, None, quiet)
    assert_samples_alike(made, run, tmp_path / "student")


@families
def test_full_training_exports_its_average(made: Made, tmp_path: Path, quiet: Console) -> None:
    more = ["train.steps=4", "checkpoint.every=4", "evaluation.nfe=[1]", "model.gradient_checkpointing=true"]
    settings = made.settings(tmp_path / "runs", *more)
    assert train(settings, False, quiet) == 0
    run = RunDirectory(settings.directory)
    parts = checkpoints.load(run.newest_checkpoint()).tensors
    assert any(not torch.equal(parts["ema"][name], parts["student"][name]) for name in parts["ema"])
    export(run.path, tmp_path / "student", False, None, None, None, quiet)
    assert_samples_alike(made, run, tmp_path / "student")


def assert_samples_alike(made: Made, run: RunDirectory, folder: Path) -> None:
    """A stock pipeline from ``folder`` draws what the run's own student does."""
    from diffusers import DiffusionPipeline

    _, _, source, network = inspect.load(run.path)
    family, shape = source.family, source.family.latent_shape(32, 64)  # type: ignore[attr-defined]
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for steps in (1, 2):
        z = torch.randn(2, *shape, generator=torch.Generator().manual_seed(steps))
        size = {"height": 32, "width": 64, "output_type": "latent"} | length(family)
        told = size | CALL[made.name] | {"num_inference_steps": steps, "guidance_scale": 0}
        theirs = pipeline(list(PROMPTS), latents=family.to_pipeline(z), **told)[0]  # Z-Image writes into its list
        packed = family.to_pipeline(z).shape
        noise = lambda step, packed=packed: family.from_pipeline(keyed_noise(packed, 0, step), shape)  # noqa: E731
        with torch.no_grad():
            ours = sample(network, z, source.condition(PROMPTS), few_step(steps), noise=noise)
        atol = 2e-4 if made.name == "z_image" else 2e-5  # it is told 1000·(1 − t), which float32 holds to 4 digits
        torch.testing.assert_close(family.from_pipeline(theirs, shape), ours, atol=atol, rtol=0)


sd3 = pytest.mark.parametrize("made", ["sd3"], indirect=True)


@sd3
def test_lora_keeps_one_copy_of_the_base(made: Made, tmp_path: Path) -> None:
    """The average shares what is frozen; the frozen teacher is the model under the adapters."""
    more = ["model={lora: {rank: 2}, dtype: bf16}", "teacher={kind: frozen, guidance: ema}"]
    settings, device = made.settings(tmp_path, *more), torch.device("cpu")
    source = assembly.load_source(settings, device)
    run = RunDirectory(settings.directory)
    run.start(settings, fresh=False)
    trainer = Trainer(settings, run, source, device, lambda network, step: {"val/quality": 0.0})
    teacher = trainer.objective.teacher
    assert isinstance(teacher.frozen, FrozenTeacher)
    student, average = (dict(n.named_parameters()) for n in (teacher.student, teacher.ema))
    trained = {name for name, p in student.items() if p.requires_grad}
    assert {name for name in student if student[name] is not average[name]} == trained
    assert {student[name].dtype for name in trained} == {torch.float32}
    assert {student[name].dtype for name in student.keys() - trained} == {torch.bfloat16}
    frozen = {name: p.detach().clone() for name, p in student.items() if name not in trained}
    for _ in range(3):
        trainer.train_step()
    assert all(torch.equal(student[name], value) for name, value in frozen.items())
    assert any(not torch.equal(student[name], average[name]) for name in trained)
    trainer.log.close()
    trainer.events.close()


@sd3
def test_prompts_alone(made: Made, tmp_path: Path, quiet: Console) -> None:
    """Image-free: a prompt list with a frozen teacher; quality is the held-out reward."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"prompt number {n}" for n in "abcdefghijklmnopqrst"))
    to = tmp_path / "prompts"
    overrides = ["buckets.sizes=[[32,32]]", "buckets.multiple=8", "validation=0.3"]
    data.prepare_data(prompts, str(made.pipeline), to, overrides, data.Machine("cpu"), quiet)
    more = [
        "model.lora={rank: 2}", f"data={{source: prompts, root: {to}}}", "teacher.kind=frozen",
        "guidance={form: teacher, strength: 4}", "train.steps=3", "evaluation.nfe=[1]",
    ]  # fmt: skip
    settings = made.settings(tmp_path / "runs", *more)
    assert train(settings, False, quiet) == 0
    last = rows(RunDirectory(settings.directory))[-1]
    assert last["val/quality"] == -last["val/held_out_score/edges_1nfe"]
    assert "val/velocity_mse" not in last
    with pytest.raises(InputError, match=r"prompts without images.*data\.source=prompts"):
        assembly.load_source(made.settings(tmp_path, f"data.root={to}"), torch.device("cpu"))


@sd3
def test_sampling_a_run_and_wrong_input(made: Made, tmp_path: Path, quiet: Console) -> None:
    settings = made.settings(tmp_path / "runs", "train.steps=1", "evaluation.nfe=[1]")
    assert train(settings, False, quiet) == 0
    picture = tmp_path / "s.png"
    assert inspect.sample(settings.directory, ["a cat"], 2, 3, 0, picture, None, quiet) == 0
    assert inspect.sample(settings.directory, [], 1, 2, 0, picture, None, quiet) == 0
    assert picture.stat().st_size > 500
    with pytest.raises(InputError, match="no adapters"):
        export(settings.directory, tmp_path / "out", True, None, None, None, quiet)
    with pytest.raises(InputError, match="needs a token in \\$HF_TOKEN"):
        export(settings.directory, tmp_path / "out", False, None, "owner/name", None, quiet)
    other = made.settings(tmp_path, "model.frozen_dtype=bf16")
    with pytest.raises(
        InputError, match=r"prepared with another encoder.*model\.frozen_dtype=float32, or .*--dtype bf16"
    ):
        assembly.load_source(other, torch.device("cpu"))


@sd3
def test_an_export_needs_the_model_and_not_the_data(made: Made, tmp_path: Path, quiet: Console) -> None:
    """Of an unfinished run too, after its data are gone; but not on top of another model."""
    run = kill(made.settings(tmp_path / "killed", "model.lora={rank: 2}"), 7)
    shutil.rmtree(made.prepared)
    export(run.path, tmp_path / "student", False, None, None, None, quiet)
    assert "step 5 of 20" in (tmp_path / "student" / "README.md").read_text()
    with pytest.raises(InputError, match="student is in use"):
        export(run.path, tmp_path / "student", True, None, None, None, quiet)
    weights = made.pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.manual_seed(1)
    other = {name: torch.randn_like(value) for name, value in load_file(weights).items()}
    save_file(other, weights)
    with pytest.raises(InputError, match="pipeline is not the model that the run started from"):
        export(run.path, tmp_path / "again", True, None, None, None, quiet)


@sd3
def test_fid_and_clipscore_of_a_run_whose_frozen_models_wait_on_the_host(
    made: Made, tmp_path: Path, quiet: Console
) -> None:
    """With real networks of random weights: in the log, in the table of ``evaluate``; offloading changes no number."""
    write_pairs(tmp_path / "others", [(40, 30)] * 4)
    torch.save(inception.architecture().state_dict(), tmp_path / "inception.pth")
    hf_clip().save_pretrained(tmp_path / "clip")
    clip = f"{{kind: clipscore, checkpoint: {tmp_path / 'clip'}}}"
    more = [
        f"reward={{model: {clip}, gradient: {{eta: 50}}, held_out: {{same: {clip}}}}}", f"judges={{clip: {clip}}}",
        f"evaluation.reference={tmp_path / 'others'}", f"evaluation.inception={tmp_path / 'inception.pth'}",
        "train.steps=2", "evaluation={every: 2, n: 20, nfe: [1]}",
    ]  # fmt: skip
    logged = {}
    for where in ("false", "true"):
        settings = made.settings(tmp_path / where, *more, f"machine.offload={where}")
        assert train(settings, False, quiet) == 0
        logged[where] = rows(RunDirectory(settings.directory))
    assert logged["true"] == logged["false"]
    last = logged["true"][-1]
    assert last["val/fid_1nfe"] > 0
    assert math.isfinite(last["val/kid_1nfe"])
    assert last["val/held_out_score/clip_1nfe"] == last["val/score/clipscore_1nfe"]
    assert inspect.evaluate(settings.directory, None, quiet) == 0
    table = json.loads((settings.directory / "evaluation" / "table.json").read_text())
    assert table["rows"]["1"]["fid"] > 0
    source = assembly.load_source(settings, torch.device("cpu"))
    judges = assembly.held_out_rewards(settings, source, torch.device("cpu"))
    followed = assembly.guide_of(settings, source, torch.device("cpu"))
    assert followed is not None
    networks = [reward.modules()["model"] for reward in (judges["same"], judges["clip"], followed.reward)]
    assert networks[0] is networks[1] is networks[2]
