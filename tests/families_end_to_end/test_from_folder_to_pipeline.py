"""The whole way for every family: pipeline on disk → prepared images → training with a reward → kill and resume →
export → a stock diffusers pipeline whose samples are our sampler's.

`make test` goes it with packed latents (FLUX), lists of latents (Z-Image), a U-Net (Stable Diffusion) and SD3.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.backends.families.conftest import CALL, length
from tests.backends.families.held import from_pipeline, to_pipeline
from tests.backends.families.made import Made, assert_alike, few, made, short_prompts
from tests.data.tiny import write_pairs
from tests.logs import rows
from tests.rewards.tiny import hf_clip
from twinrl.backends.families import FAMILIES, family_class
from twinrl.backends.families.family import FrozenTeacher
from twinrl.commands import data, inspect
from twinrl.commands.export import export
from twinrl.commands.train import resume, train
from twinrl.config.errors import InputError
from twinrl.rewards import inception
from twinrl.run import checkpoints
from twinrl.training import assembly, schema
from twinrl.training.opened import open_run
from twinrl.training.runs import RunDirectory
from twinrl.training.trainer import Trainer

pytestmark = pytest.mark.slow

PROMPTS = ["a red cat", "b"]
MAX_NORM = 1e-4  # gradients of this reward are 7e-4 to 1.5e-3 long
STEPS = 4


def settings_of(family: Made, runs: Path, *overrides: str) -> schema.RunConfig:
    return schema.load(
        "twinflow",
        [
            *family.overrides, f"train={{steps: {STEPS}, batch: 8}}", "optim.lr=1e-3", "terms.reward={branches: [e2e]}",
            "reward={model: brightness, gradient: {eta: 50}, held_out: {edges: sharpness}}",
            f"gradients.terms.reward.clip.max_norm={MAX_NORM}", "checkpoint.every=2", "tracking.mlflow=false",
            "evaluation={every: 4, n: 20, nfe: [1, 2], grid_samples: 2, batch: 20, velocity_rows: 4}",
            f"run.dir={runs}", "name=tiny", *overrides,
        ],
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with short_prompts():
        yield


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture
def family(request: pytest.FixtureRequest, base: Path) -> Made:
    """The family that the test names, saved to disk, with images of two shapes prepared for it."""
    return made(base, request.param)


@pytest.fixture
def sd3(base: Path) -> Made:
    return made(base, "sd3")


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


def judged(run: RunDirectory) -> dict[str, torch.Tensor]:
    return dict(checkpoints.load(run.newest_checkpoint()).judged)


def families(*quick: str) -> Any:
    """All families, of which some are quickly proved; the others take a campaign."""
    marks = {name: [] if name in quick else [pytest.mark.campaign] for name in FAMILIES}
    return pytest.mark.parametrize("family", [pytest.param(name, marks=marks[name]) for name in marks], indirect=True)


@families("flux")
def test_train_with_reward_kill_resume_export_sample(family: Made, tmp_path: Path, quiet: Console) -> None:
    settings = settings_of(family, tmp_path / "straight", "model.lora={rank: 2}")
    assert train(settings, False, quiet) == 0
    run = RunDirectory(settings.directory)

    logged = rows(run)
    assert len(logged) == STEPS
    assert all(math.isfinite(row["loss/total"]) and math.isfinite(row["reward/mean"]) for row in logged)
    assert all(row["grad/reward/norm_clipped"] <= MAX_NORM * 1.001 for row in logged)
    assert max(row["grad/reward/norm_raw"] for row in logged) > 2 * MAX_NORM  # so the clip has something to do
    for name in ("val/quality", "val/velocity_mse", "val/score/brightness_1nfe", "val/held_out_score/edges_2nfe"):
        assert math.isfinite(logged[-1][name])
    assert all("lora_" in name or "twin" in name or "_2." in name for name in judged(run))  # the base is not stored

    killed = kill(settings_of(family, tmp_path / "killed", "model.lora={rank: 2}"), 3)
    assert resume(killed.path, quiet) == 0
    before, after = judged(run), judged(killed)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert rows(killed) == logged

    export(run.path, tmp_path / "student", False, None, None, None, quiet)
    assert_samples_alike(family, run, tmp_path / "student")


@families("z_image", "stable_diffusion")
def test_full_training_exports_its_average(family: Made, tmp_path: Path, quiet: Console) -> None:
    more = ["train.steps=2", "evaluation.nfe=[1]", "model.gradient_checkpointing=true"]
    settings = settings_of(family, tmp_path / "runs", *more)
    assert train(settings, False, quiet) == 0
    run = RunDirectory(settings.directory)
    parts = checkpoints.load(run.newest_checkpoint()).tensors
    assert any(not torch.equal(parts["ema"][name], parts["student"][name]) for name in parts["ema"])
    export(run.path, tmp_path / "student", False, None, None, None, quiet)
    (file,) = (tmp_path / "student" / family_class(family.name).PART).glob("*.safetensors")
    written = load_file(file)
    assert all(torch.equal(written[name.removeprefix("transformer.")], value) for name, value in parts["ema"].items())
    assert_samples_alike(family, run, tmp_path / "student")


def assert_samples_alike(made: Made, run: RunDirectory, folder: Path) -> None:
    """A stock pipeline from ``folder`` draws what the run's own student does."""
    from diffusers import DiffusionPipeline

    opened = open_run(run.path)
    source, network = opened.provider.source, opened.network
    family, shape = source.family, source.family.latent_shape(32, 64)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for steps in (1, 2):
        z = torch.randn(2, *shape, generator=torch.Generator().manual_seed(steps))
        size = {"height": 32, "width": 64, "output_type": "latent"} | length(family)
        told = size | CALL[made.name] | {"num_inference_steps": steps, "guidance_scale": 0}
        theirs = pipeline(prompt=list(PROMPTS), latents=to_pipeline(family, z), **told)[
            0
        ]  # Z-Image writes into its list
        ours = few(family, network, z, source.condition(PROMPTS), steps)
        assert (ours - z).abs().mean() > 0.1
        assert_alike(made.name, from_pipeline(family, theirs, shape), ours)


def test_lora_keeps_one_copy_of_the_base(sd3: Made, tmp_path: Path) -> None:
    """The average shares what is frozen; the frozen teacher is the model under the adapters."""
    more = ["model={lora: {rank: 2}, dtype: bf16}", "teacher={kind: frozen, guidance: ema}"]
    settings, device = settings_of(sd3, tmp_path, *more), torch.device("cpu")
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
    trainer.train_step()
    assert all(torch.equal(student[name], value) for name, value in frozen.items())
    assert any(not torch.equal(student[name], average[name]) for name in trained)
    trainer.log.close()
    trainer.events.close()


def test_prompts_alone(sd3: Made, tmp_path: Path, quiet: Console) -> None:
    """Image-free: a prompt list with a frozen teacher; quality is the held-out reward."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"prompt number {n}" for n in "abcdefghijklmnopqrst"))
    to = tmp_path / "prompts"
    overrides = ["buckets.sizes=[[32,32]]", "buckets.multiple=8", "validation=0.3"]
    data.prepare_data(prompts, str(sd3.pipeline), to, overrides, data.EncodingOptions("cpu"), quiet)
    more = [
        "model.lora={rank: 2}", f"data={{source: prompts, root: {to}}}", "teacher.kind=frozen",
        "guidance={form: teacher, strength: 4}", "train.steps=2", "evaluation.nfe=[1]",
    ]  # fmt: skip
    settings = settings_of(sd3, tmp_path / "runs", *more)
    assert train(settings, False, quiet) == 0
    last = rows(RunDirectory(settings.directory))[-1]
    assert last["val/quality"] == -last["val/held_out_score/edges_1nfe"]
    assert "val/velocity_mse" not in last
    with pytest.raises(InputError, match=r"prompts without images.*data\.source=prompts"):
        assembly.load_source(settings_of(sd3, tmp_path, f"data.root={to}"), torch.device("cpu"))


@pytest.mark.slow
def test_sampling_a_run_and_wrong_input(sd3: Made, tmp_path: Path, quiet: Console) -> None:
    settings = settings_of(sd3, tmp_path / "runs", "train.steps=1", "evaluation.nfe=[1]")
    assert train(settings, False, quiet) == 0
    picture = tmp_path / "s.png"
    assert inspect.sample(settings.directory, ["a cat"], 2, 3, 0, picture, None, False, quiet) == 0
    assert inspect.sample(settings.directory, [], 1, 2, 0, picture, None, False, quiet) == 0
    assert inspect.sampler(settings.directory, [2], None, quiet) == 0
    assert inspect.sample(settings.directory, [], 2, 2, 0, picture, None, True, quiet) == 0
    assert picture.stat().st_size > 500
    with pytest.raises(InputError, match="no adapters"):
        export(settings.directory, tmp_path / "out", True, None, None, None, quiet)
    with pytest.raises(InputError, match="needs a token in \\$HF_TOKEN"):
        export(settings.directory, tmp_path / "out", False, None, "owner/name", None, quiet)
    other = settings_of(sd3, tmp_path, "model.frozen_dtype=bf16")
    with pytest.raises(
        InputError, match=r"prepared with another encoder.*model\.frozen_dtype=float32, or .*--dtype bf16"
    ):
        assembly.load_source(other, torch.device("cpu"))


def test_an_export_needs_the_model_and_not_the_data(sd3: Made, tmp_path: Path, quiet: Console) -> None:
    """Of an unfinished run too, after its data are gone; but not on top of another model."""
    own = Made("sd3", *(shutil.copytree(path, tmp_path / path.name) for path in (sd3.pipeline, sd3.prepared)))
    run = kill(settings_of(own, tmp_path / "killed", "model.lora={rank: 2}"), 3)
    shutil.rmtree(own.prepared)
    export(run.path, tmp_path / "student", False, None, None, None, quiet)
    assert f"step 2 of {STEPS}" in (tmp_path / "student" / "README.md").read_text()
    with pytest.raises(InputError, match="student is in use"):
        export(run.path, tmp_path / "student", True, None, None, None, quiet)
    weights = own.pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.manual_seed(1)
    other = {name: torch.randn_like(value) for name, value in load_file(weights).items()}
    save_file(other, weights)
    with pytest.raises(InputError, match="sd3 is not the model that the run started from"):
        export(run.path, tmp_path / "again", True, None, None, None, quiet)


@pytest.mark.parametrize("fid", [False, pytest.param(True, marks=pytest.mark.campaign)])
def test_judges_of_a_run_whose_frozen_models_wait_on_the_host(
    sd3: Made, tmp_path: Path, quiet: Console, fid: bool
) -> None:
    """With real networks of random weights: in the log, in the table of ``evaluate``; offloading changes no number."""
    hf_clip().save_pretrained(tmp_path / "clip")
    clip = f"{{kind: clipscore, checkpoint: {tmp_path / 'clip'}}}"
    more = [
        f"reward={{model: {clip}, gradient: {{eta: 50}}, held_out: {{same: {clip}}}}}", f"judges={{clip: {clip}}}",
        "train.steps=2", "evaluation={every: 2, n: 20, nfe: [1], batch: 20}",
    ]  # fmt: skip
    if fid:
        write_pairs(tmp_path / "others", [(40, 30)] * 4)
        torch.save(inception.architecture().state_dict(), tmp_path / "inception.pth")
        more.append(f"evaluation.reference={tmp_path / 'others'}")
        more.append(f"evaluation.inception={tmp_path / 'inception.pth'}")
    logged = {}
    for where in ("false", "true"):
        settings = settings_of(sd3, tmp_path / where, *more, f"machine.offload={where}")
        assert train(settings, False, quiet) == 0
        logged[where] = rows(RunDirectory(settings.directory))
    assert logged["true"] == logged["false"]
    last = logged["true"][-1]
    assert last["val/held_out_score/clip_1nfe"] == last["val/score/clipscore_1nfe"]
    if fid:
        assert inspect.evaluate(settings.directory, None, quiet) == 0
        table = json.loads((settings.directory / "evaluation" / "table.json").read_text())
        assert last["val/fid_1nfe"] > 0
        assert math.isfinite(last["val/kid_1nfe"])
        assert table["rows"]["1"]["fid"] > 0
    provider = open_run(settings.directory).provider
    judges, followed = provider.judges(), provider.guide()
    assert followed is not None
    networks = [reward.modules()["model"] for reward in (judges["same"], judges["clip"], followed.reward)]
    assert networks[0] is networks[1] is networks[2]
