"""``twinrl export``: a run's student as a diffusers folder, or its adapters, on disk or on the model hub."""

import os
from pathlib import Path
from typing import Literal

import yaml
from rich.console import Console

from twinrl.config.errors import InputError
from twinrl.run import layout
from twinrl.training.opened import OpenedRun, open_run

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
    token = _token() if push_to else None
    opened = open_run(path, step)
    cost = opened.export(folder, lora, dtype)
    with (folder / "README.md").open("a") as card:
        card.write(provenance(opened))
    console.print(f"{_step(opened)} exported to {folder}: {cost}")
    if push_to and token:
        push(folder, push_to, token)
        console.print(f"uploaded to {push_to}")
    return 0


def provenance(opened: OpenedRun) -> str:
    """The part of a model card that says how the student was trained."""
    shown = opened.settings.numeric() | {"seed": opened.settings.seed}
    written = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
    return f"\n## Training\n\nRun `{opened.directory.path.name}`, {_step(opened)}.\n\n```yaml\n{written}```\n"


def _step(opened: OpenedRun) -> str:
    return f"step {layout.step_of(opened.checkpoint)} of {opened.settings.train.steps}"


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
