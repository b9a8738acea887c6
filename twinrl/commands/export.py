"""``twinrl export``: a run's student as a diffusers folder, or its adapters, on disk or on the model hub."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import yaml
from rich.console import Console

from twinrl import assembly, checkpoints
from twinrl.backends.families import load_family
from twinrl.backends.families.family import DTYPES, Family, FamilyNetwork
from twinrl.commands.inspect import checkpoint_of
from twinrl.data.source import Data
from twinrl.errors import InputError
from twinrl.run import layout
from twinrl.runs import RunDirectory
from twinrl.schema import RunConfig

TOKEN = "HF_TOKEN"


def export(
    path: Path,
    folder: Path,
    lora: bool,
    dtype: Literal["float32", "bf16"] | None,
    push_to: str | None,
    step: int | None,
    console: Console,
) -> int:
    """Write the judged student (the EMA where there is one) of the run ``path`` into ``folder``; 0.

    Arguments:
        path: a run that trained a family.
        folder: new or empty.
        lora: write the adapters alone.
        dtype: of the written transformer; None = as trained.
        push_to: name of a repository on the model hub, made private if it is new; None = none.
        step: checkpoint of this step instead of the newest.
        console: for messages.

    Raises:
        InputError: no such run or checkpoint, the run trained no family or no adapters, the pretrained model is
            another by now, the folder is in use, no token or no network for the hub.
    """
    run = RunDirectory(path)
    settings = run.settings()
    if settings.model.family is None:
        raise InputError(f"{path} has no diffusers pipeline to export", expected="a run with model.family")
    if lora and settings.model.lora is None:
        raise InputError(f"{path} trained no adapters", fix="leave --lora out: the whole model is its student")
    token = _token() if push_to else None
    from twinrl.backends.families import export as families
    from twinrl.sampling.scheduler import TwinFlowScheduler

    families.claim(folder)
    checkpoint = checkpoint_of(run, step)
    student, family = load_student(settings, checkpoint)
    base = str(settings.model.path)
    if lora:
        families.export_lora(student, family, folder, base=base)
    else:
        chosen = DTYPES[dtype] if dtype else None
        families.export(student, family, folder, TwinFlowScheduler(), base=base, dtype=chosen)
    with (folder / "README.md").open("a") as card:
        card.write(provenance(settings, run, checkpoint))
    console.print(f"{_step(checkpoint, settings)} exported to {folder}")
    if push_to and token:
        push(folder, push_to, token)
        console.print(f"uploaded to {push_to}")
    return 0


@dataclass(frozen=True)
class _Pretrained:
    """A family where a source is asked for: an export needs no data, which may have changed or be gone."""

    family: Family


def load_student(settings: RunConfig, folder: Path) -> tuple[FamilyNetwork, Family]:
    """The judged student of a checkpoint, and the pipeline that it started from.

    Raises:
        InputError: no such pipeline, or not the one of the run; a corrupted checkpoint.
    """
    from twinrl.data.folders.training import model_unchanged

    checkpoint = checkpoints.load(folder)
    family = load_family(str(settings.model.family), settings.model.pretrained)
    if not model_unchanged(checkpoint.state["content_hash"], family):
        raise InputError(
            f"{settings.model.path} is not the model that the run started from", got="files of another content",
            fix="give back the files of then: the student was trained on them",
        )  # fmt: skip
    network = assembly.new_network(settings, cast(Data, _Pretrained(family)))
    checkpoints.load_module(network, checkpoint.judged, str(folder))
    return assembly.inner_of(network.eval()), family


def provenance(settings: RunConfig, run: RunDirectory, checkpoint: Path) -> str:
    """The part of a model card that says how the student was trained."""
    shown = settings.numeric() | {"seed": settings.seed}
    written = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
    return f"\n## Training\n\nRun `{run.path.name}`, {_step(checkpoint, settings)}.\n\n```yaml\n{written}```\n"


def _step(checkpoint: Path, settings: RunConfig) -> str:
    return f"step {layout.step_of(checkpoint)} of {settings.train.steps}"


def _token() -> str:
    token = os.environ.get(TOKEN)
    if not token:
        raise InputError(
            f"uploading needs a token in ${TOKEN}", fix=f"export {TOKEN}=… in the shell, or leave --push-to out"
        )
    return token


def push(folder: Path, repository: str, token: str) -> None:
    """Upload a folder to the model hub; a new repository is private.

    Raises:
        InputError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"the hub refuses {repository}", got=str(error).splitlines()[0]) from error
    except (HTTPError, OSError) as error:  # the client's, whichever HTTP library it is built on
        raise InputError(
            "the model hub cannot be reached", got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix=f"upload {folder} later: it is complete",
        ) from error  # fmt: skip
