"""A checkpoint that is not as its run wrote it: one line that names the file, and nothing on disk changes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.fake_source import FakeSource, register, small
from tests.training.trainers import finish, kill, make, state
from twinrl.config.errors import InputError
from twinrl.run import checkpoints
from twinrl.run.checkpoints import Checkpoint
from twinrl.run.names import UNMOVED
from twinrl.training.opened import open_run
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig

Tensors = dict[str, Tensor]


@pytest.fixture
def begun(tmp_path: Path) -> RunConfig:
    """A run that was killed after step 7, with a checkpoint of step 5."""
    settings = small(tmp_path, "stability.capsules.every=0")
    kill(settings, 7)
    return settings


def rewrite(settings: RunConfig, part: str, change: Callable[[Tensors], Tensors]) -> Path:
    file = RunDirectory(settings.directory).newest_checkpoint() / f"{part}.safetensors"
    save_file({name: value.contiguous() for name, value in change(load_file(file)).items()}, file)
    return file


def every(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    """Changes the tensors whose names end so."""
    return lambda tensors: {key: change(value) if key.endswith(name) else value for key, value in tensors.items()}


def without(beginning: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if not key.startswith(beginning)}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {new if key == old else key: value for key, value in tensors.items()}


def of_momentum(tensors: Tensors) -> Tensors:
    """As SGD keeps it, as many tensors as before."""
    renamed = {"exp_avg": "momentum_buffer", "exp_avg_sq": "b", "step": "c"}
    return {key.replace(old, new): v for key, v in tensors.items() for old, new in renamed.items() if key.endswith(old)}


def tree(folder: Path) -> dict[Path, bytes]:
    """Every file with its content."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def with_nan(value: Tensor) -> Tensor:
    return value.flatten().index_fill(0, torch.tensor([0]), torch.nan).view_as(value)


DAMAGES: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "student int8": ("student", every("", lambda v: v.to(torch.int8)), "int8 instead of float32"),
    "student bf16": ("student", every("", lambda v: v.bfloat16()), "bfloat16 instead of float32"),
    "student float64": ("student", every("weight", lambda v: v.double()), "float64 instead of float32"),
    "student nan": ("student", every("weight", with_nan), "not finite"),
    "ema bf16": ("ema", every("weight", lambda v: v.bfloat16()), "bfloat16 instead of float32"),
    "ema infinite": ("ema", every("bias", lambda v: v / 0), "not finite"),
    "no entries of a parameter": ("optimizer", without("0."), "tensors instead of"),
    "no moment of a parameter": ("optimizer", renamed("0.exp_avg_sq", "0.more"), "expected exp_avg, exp_avg_sq, step"),
    "no entries": ("optimizer", lambda tensors: {}, "0 tensors instead of"),
    "moments bf16": ("optimizer", every("exp_avg", lambda v: v.bfloat16()), "key 0.exp_avg, bfloat16"),
    "moments int8": ("optimizer", every("exp_avg_sq", lambda v: v.to(torch.int8)), "key 0.exp_avg_sq, int8"),
    "moments nan": ("optimizer", every("exp_avg", with_nan), "not finite"),
    "steps zeroed": ("optimizer", every("step", torch.zeros_like), "0 steps of parameter 0 at step 5"),
    "one step zeroed": ("optimizer", every("1.step", torch.zeros_like), "0 steps of parameter"),
    "steps beyond the run": ("optimizer", every("step", lambda v: v + 1), "6 steps of parameter 0 at step 5"),
    "another optimizer": ("optimizer", of_momentum, "expected exp_avg, exp_avg_sq, step"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(begun: RunConfig, damage: str) -> None:
    part, change, words = DAMAGES[damage]
    file = rewrite(begun, part, change)
    before = tree(begun.directory)
    with pytest.raises(InputError) as error:
        make(begun)
    message = str(error.value)
    assert [word for word in (str(file), words, "fix: ") if word not in message] == []
    assert "\n" not in message
    assert tree(begun.directory) == before


SPIKE = "monitor.watch.detectors.spike grad/total/norm_raw"
DRIFT = "monitor.watch.detectors.drift grad/total/norm_raw"
STATES = {
    "no count": (f"{DRIFT}.skip", "-inf", "is no count"),
    "a negative count": (f"{DRIFT}.block", -3, "is no count"),
    "a count of text": (f"{SPIKE}.healthy", "4", "is no count"),
    "half an episode": ("monitor.watch.episodes.spike", 1.5, "is no count"),
    "no number": (f"{DRIFT}.baseline", "low", "is no number"),
    "not finite": (f"{SPIKE}.window", [1.0, "nan"], "is not finite"),
    "400 digits": ("monitor.divergence.best", int("7" * 400), "is no number"),
    "truth": ("monitor.divergence.best", True, "is no number"),
    "no stretch": ("monitor.divergence.bad.length", None, "is no count"),
    "judged by text": ("monitor.divergence.judged.sound", "2", "sound: "),
    "precision": ("monitor.precision.opt/unmoved_frac", -1, "is no count"),
    "early stop": ("early_stop.bad", 2.0, "is no count"),
    "rate": ("lr_policy.scale", "inf", "is not finite"),
}


@pytest.mark.parametrize("damage", STATES)
def test_a_damaged_entry_of_the_state_is_named(begun: RunConfig, damage: str) -> None:
    path, value, words = STATES[damage]
    file = RunDirectory(begun.directory).newest_checkpoint() / "state.json"
    content = json.loads(file.read_text())
    holder, keys = content, path.replace("opt/unmoved_frac", UNMOVED).split(".")
    for key in keys[:-1]:
        holder = holder[key]
    assert keys[-1] in holder
    holder[keys[-1]] = value
    file.write_text(json.dumps(content))
    before = tree(begun.directory)
    with pytest.raises(InputError, match=f"state.json is corrupted.*{path.partition('.')[0]}.*{words}"):
        make(begun)
    assert tree(begun.directory) == before


@pytest.mark.parametrize("place", ["deleted", "unmounted"])
def test_a_log_whose_checkpoints_are_gone_is_not_cut_off(begun: RunConfig, place: str) -> None:
    run = RunDirectory(begun.directory)
    elsewhere = run.path.parent / "elsewhere"
    run.checkpoints.rename(elsewhere)
    if place == "unmounted":
        run.checkpoints.symlink_to(run.path.parent / "nowhere")
    before = tree(run.path)
    with pytest.raises(InputError, match=r"checkpoints of .* are gone; got a log of 7 steps; fix: put them back, or"):
        make(begun)
    assert tree(run.path) == before
    run.checkpoints.unlink(missing_ok=True)
    elsewhere.rename(run.checkpoints)
    assert make(begun).step == 5


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    settings = small(tmp_path)
    kill(settings, 4)
    finish(settings)


def test_an_older_checkpoint_does_not_say_how_many_tensors_it_has(begun: RunConfig) -> None:
    folder = RunDirectory(begun.directory).newest_checkpoint()
    found = checkpoints.load(folder)
    older = {key: value for key, value in found.state.items() if key not in ("tensors", "format")}
    checkpoints.write(folder, Checkpoint(found.tensors, older))
    finish(begun)


def test_a_run_that_broke_goes_on_with_its_numbers(tmp_path: Path) -> None:
    """What its events have recorded is no damage."""
    settings = small(tmp_path, "stability.policy=record", "optim.lr=1e30", "stability.capsules.every=0")
    kill(settings, 7)
    assert RunDirectory(settings.directory).events.read_text()
    resumed = make(settings)
    assert not all(value.isfinite().all() for value in state(resumed).values())
    resumed.train()


@pytest.mark.parametrize("damage", ["ema infinite", "ema bf16"])
def test_whoever_looks_at_a_damaged_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    register(monkeypatch)
    settings = small(tmp_path)
    finish(settings, source=FakeSource())
    part, change, words = DAMAGES[damage]
    rewrite(settings, part, change)
    with pytest.raises(InputError, match=words):
        _ = open_run(settings.directory).network


def test_a_checkpoint_in_anothers_folder_is_not_looked_at(begun: RunConfig) -> None:
    folder = RunDirectory(begun.directory).newest_checkpoint()
    folder.rename(folder.with_name("step-00000004"))
    with pytest.raises(InputError, match="step 5 in the folder step-00000004 of a run of 12 steps"):
        _ = open_run(begun.directory).checkpoint
