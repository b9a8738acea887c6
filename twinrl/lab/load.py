"""Loads laboratories: the digits', built on first use, and those that ``twinrl lab build`` has made.

The digits' folder is named by the *recipe*, so a changed recipe builds anew; one of one's own has a name. Both are
identified by the hash of their *content*, which is checked on every load.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from twinrl.config.errors import InputError
from twinrl.lab import pictures
from twinrl.lab.build import MANIFEST, PARTS, build, unpacked
from twinrl.lab.digits import Warp, digits, load_digit_splits
from twinrl.lab.material import SPLITS, Material
from twinrl.lab.models import Models
from twinrl.lab.recipe import LabRecipe, network_settings
from twinrl.lab.source import Lab
from twinrl.lab.storage import content_hash, damaged, load_json, load_tensors, publish
from twinrl.lab.teachers import Teachers
from twinrl.lab.workshop import SECONDS, Workshop
from twinrl.machine.files import cache_dir

DEFAULT, NO_WARP = LabRecipe(), Warp(variants=0)
FORMAT = 1
"""Of the folder of a laboratory of one's own."""
BUILD = "twinrl lab build FOLDER"


def load_lab(device: str = "cpu", progress: bool = True, recipe: LabRecipe = DEFAULT) -> Lab:
    """The digits lab, built on first use (about a minute and a half on two cores) and cached.

    Arguments:
        device: of models and latents.
        progress: whether building shows a progress bar on standard error.
        recipe: constants of the build; the default is the lab that the project's results refer to.

    Raises:
        InputError: a cached file is damaged; the message says which folder to delete.
    """
    folder = cache_dir() / f"digits-{recipe.hash()[:12]}"
    _make(folder, recipe.hash(), recipe, lambda: digits(load_digit_splits(recipe.warp or NO_WARP)), progress)
    manifest, parts = _read(folder)
    made = digits({name: unpacked(parts["data"], name) for name in SPLITS})
    return _lab(made, manifest, parts, recipe, progress).to(device)


# --- laboratories of one's own -------------------------------------------------------------------------------------


def folder_of(name: str) -> Path:
    """Where a laboratory lies: a folder by its path, or by its name in the cache."""
    path = Path(name).expanduser()
    return path if os.sep in name or (path / MANIFEST).is_file() else cache_dir() / "labs" / name


def build_lab(
    folder: Path,
    material: Material,
    recipe: LabRecipe,
    about: Mapping[str, Any],
    progress: bool = True,
    seconds: float = SECONDS,
) -> bool:
    """Build a laboratory into ``folder``, or go on with a build that was killed; whether there was anything to do.

    Arguments:
        folder: see :func:`folder_of`.
        material: the pictures.
        recipe: constants; with the pictures they decide the content.
        about: what is told of the pictures, as JSON has it.
        progress: whether a bar is drawn.
        seconds: between two savings of a training.

    Raises:
        InputError: the folder holds another laboratory, or cannot be written.
    """
    key = _key(material, recipe)
    if folder.exists():
        _check_key(folder, key)
        return False
    more = {"format": FORMAT, "name": material.name, "key": key, "recipe": recipe.plain(), "about": dict(about)}
    _make(folder, key, recipe, lambda: material, progress, more, seconds)
    _check_key(folder, key)  # another process may have built it meanwhile
    return True


def _check_key(folder: Path, key: str) -> None:
    """Raises InputError where a folder holds a laboratory of something else."""
    if described(folder).get("key") != key:
        raise InputError(
            f"{folder} holds another laboratory", got="other pictures, captions or settings",
            fix="name another with --to, or delete it",
        )  # fmt: skip


def open_lab(name: str, progress: bool = True) -> Lab:
    """The laboratory of this name or in this folder, on the CPU.

    Raises:
        InputError: there is none, or it is damaged.
    """
    folder = folder_of(name)
    described(folder)
    manifest, parts = _read(folder)
    try:
        recipe = LabRecipe.of(manifest["recipe"])
        captions = manifest["captions"]
        splits = {each: unpacked(parts["data"], each, captions["captions"][each]) for each in SPLITS}
        made = pictures.material(manifest["name"], splits, captions["classes"], captions["vocabulary"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder / MANIFEST, folder, str(error)) from error
    return _lab(made, manifest, parts, recipe, progress)


def described(folder: Path) -> dict[str, Any]:
    """What a laboratory's manifest says. Raises InputError where there is none, or it is of another format."""
    if not (folder / MANIFEST).is_file():
        others = sorted(path.parent.name for path in (cache_dir() / "labs").glob(f"*/{MANIFEST}"))
        raise InputError(
            f"there is no laboratory {folder.name}", got=f"{folder} without {MANIFEST}",
            expected=f"{', '.join(others)}, or a folder" if others else None, fix=f"{BUILD} --to {folder.name}",
        )  # fmt: skip
    manifest: dict[str, Any] = load_json(folder / MANIFEST, folder)
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"the laboratory in {folder} is of another format", got=manifest.get("format"), expected=FORMAT,
            fix=f"delete it and build it again: {BUILD}",
        )  # fmt: skip
    return manifest


def network_of(name: str) -> dict[str, Any]:
    """Settings of the network whose teacher belongs to a laboratory. Raises InputError as :func:`open_lab`."""
    folder = folder_of(name)
    try:
        plain = described(folder)["recipe"]["network"]
        network_settings(plain)
        return dict(plain)
    except (KeyError, TypeError) as error:
        raise damaged(folder / MANIFEST, folder, f"no {error}") from error
    except ValueError as error:
        raise damaged(folder / MANIFEST, folder, str(error)) from error


def _key(material: Material, recipe: LabRecipe) -> str:
    """A digest of all that decides a laboratory: pictures, captions and constants."""
    splits = {name: {"pixels": split.pixels, "labels": split.labels} for name, split in material.splits.items()}
    return content_hash(splits, [material.captions.plain(), recipe.hash()])


# --- both ----------------------------------------------------------------------------------------------------------


def _make(
    folder: Path,
    key: str,
    recipe: LabRecipe,
    material: Callable[[], Material],
    progress: bool,
    about: Mapping[str, Any] | None = None,
    seconds: float = SECONDS,
) -> None:
    """Build what is not there."""
    workshop = Workshop.of(folder, key, seconds)
    publish(
        folder,
        partial(build, recipe=recipe, material=material, workshop=workshop, progress=progress, about=about),
    )
    workshop.close()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Manifest and tensors, the content checked."""
    manifest: dict[str, Any] = load_json(folder / MANIFEST, folder)
    parts = {name: load_tensors(folder / f"{name}.safetensors", folder) for name in PARTS}
    if content_hash(parts, manifest.get("captions")) != manifest.get("content_hash"):
        raise damaged(folder / MANIFEST, folder, "the files beside it have another content than it says")
    return manifest, parts


def _lab(
    material: Material,
    manifest: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, Tensor]],
    recipe: LabRecipe,
    progress: bool,
) -> Lab:
    return Lab(
        content_hash=str(manifest["content_hash"]),
        material=material,
        latents={name: parts["data"][f"{name}.latents"] for name in SPLITS},
        models=partial(Models.filled, recipe, material.captions.vocabulary, len(material.classes), parts),
        teachers=Teachers(recipe, parts["teacher"], progress),
        network=recipe.network,
    )
