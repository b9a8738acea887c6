"""Training in bf16: the average follows, what a step cannot move is said, and the state is exact."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.backends.families.made import made, short_prompts
from tests.training.trainers import CPU, assert_same, finish, kill, make, state
from twinrl.config.errors import InputError
from twinrl.run import checkpoints, names
from twinrl.run.checkpoints import Checkpoint
from twinrl.training import assembly, schema
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Any:
    with short_prompts():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("low")


def settings_of(base: Path, runs: Path, *more: str) -> RunConfig:
    given = [
        *made(base, "z_image").overrides, "model.dtype=bf16", "train={steps: 6, batch: 4}", "optim.lr=1e-5",
        "checkpoint.every=2", "tracking.mlflow=false", "evaluation={every: 0, n: 20, nfe: [1]}",
        "gradients.telemetry.update_every=1", "teacher.decay=0.9", f"run.dir={runs}", *more,
    ]  # fmt: skip
    return schema.load("twinflow", given)


def source(settings: RunConfig) -> Any:
    return assembly.load_source(settings, CPU)


def test_what_a_step_cannot_move_is_an_event_that_names_the_remedy(base: Path, tmp_path: Path) -> None:
    settings = settings_of(base, tmp_path, "train.steps=3")
    finish(settings, source=source(settings))
    run = RunDirectory(settings.directory)
    logged = [json.loads(line) for line in run.log.read_text().splitlines()]
    assert all(0.5 < row[names.UNMOVED] < 1 for row in logged)
    assert [names.UNMOVED_MOMENTS in row for row in logged] == [False, True, True]  # there are none before the first
    (event,) = [e for e in map(json.loads, run.events.read_text().splitlines()) if e["kind"] == "unmoved"]
    assert event["series"] == names.UNMOVED
    assert "fix: model.dtype=float32" in event["message"]


def test_float32_measures_nothing_of_it(base: Path, tmp_path: Path) -> None:
    settings = settings_of(base, tmp_path, "train.steps=2", "model.dtype=float32")
    finish(settings, source=source(settings))
    assert names.UNMOVED not in RunDirectory(settings.directory).log.read_text()


def test_a_killed_run_goes_on_to_the_last_bit(base: Path, tmp_path: Path) -> None:
    straight, killed = (settings_of(base, tmp_path / name) for name in ("straight", "killed"))
    data = source(straight)
    first = finish(straight, source=data)
    kill(killed, 3, source=data)
    assert_same(first, finish(killed, source=data))
    average = {name: value for name, value in state(first).items() if name.startswith("ema.")}
    assert {value.dtype for value in average.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in average.values())
    assert any(value.any() for name, value in state(first).items() if name.startswith(assembly.REMAINDER))


def cast(file: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    cast = {name: value.to(dtype) for name, value in load_file(file).items()}
    save_file(cast, file)
    return cast


def without_remainder(folder: Path) -> None:
    found = checkpoints.load(folder)
    tensors = {part: kept for part, kept in found.tensors.items() if part != assembly.REMAINDER}
    counts = {part: len(kept) for part, kept in tensors.items()}
    said = {key: value for key, value in found.state.items() if key != "format"}
    (folder / f"{assembly.REMAINDER}.safetensors").unlink()
    checkpoints.write(folder, Checkpoint(tensors, said | {"parts": sorted(tensors), "tensors": counts}))


def test_averages_of_older_versions_are_taken_on(base: Path, tmp_path: Path) -> None:
    """They were in the weights' format; in any other they are damaged."""
    settings = settings_of(base, tmp_path)
    kill(settings, 3, source=(data := source(settings)))
    folder = RunDirectory(settings.directory).newest_checkpoint()
    file = folder / "ema.safetensors"
    older = cast(file, torch.bfloat16)
    without_remainder(folder)
    resumed = state(make(settings, source=data))
    assert all(torch.equal(resumed[f"ema.{name}"], value.float()) for name, value in older.items())
    cast(file, torch.float16)
    with pytest.raises(InputError, match=r"ema\.safetensors.*of another format.*float16 instead of float32"):
        make(settings, source=data)
