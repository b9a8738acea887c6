"""Loads the lab, building it on first use.

The cache's folder is named by the *recipe*, so a changed recipe builds anew; the lab is identified by the hash of
its *content*, which is checked on every load.
"""

from functools import partial
from pathlib import Path

from twinrl.flow.source import Split
from twinrl.lab.build import MANIFEST, PARTS, build, hash_of
from twinrl.lab.models import Models
from twinrl.lab.recipe import LabRecipe
from twinrl.lab.source import Lab
from twinrl.lab.storage import damaged, load_json, load_tensors, publish
from twinrl.lab.teachers import Teachers
from twinrl.machine.files import cache_dir

DEFAULT = LabRecipe()


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
    publish(folder, partial(build, recipe=recipe, progress=progress))
    return _load(folder, recipe, progress).to(device)


def _load(folder: Path, recipe: LabRecipe, progress: bool) -> Lab:
    """The lab from its files, its content checked."""
    manifest = load_json(folder / MANIFEST, folder)
    parts = {name: load_tensors(folder / f"{name}.safetensors", folder) for name in PARTS}
    found = hash_of(parts)
    if found != manifest.get("content_hash"):
        raise damaged(folder / MANIFEST, folder, "the files beside it have another content than it says")
    data = parts["data"]
    names = ("train", "validation", "test")
    return Lab(
        content_hash=found,
        splits={n: Split(data[f"{n}.grey"].repeat(1, 3, 1, 1), data[f"{n}.labels"]) for n in names},
        latents={n: data[f"{n}.latents"] for n in names},
        models=partial(Models.filled, recipe, parts),
        teachers=Teachers(recipe, parts["teacher"], progress),
    )
