"""What a family's pipeline is, by its description alone: its VAE without values (the meta device), and its shapes."""

import math
from pathlib import Path
from types import SimpleNamespace

from torch import nn

from twinrl.backends.families import pipelines
from twinrl.backends.families.pipelines import INDEX, building, components, quiet, read_index, transformer_config
from twinrl.config.errors import InputError
from twinrl.data.dataset import read_manifest
from twinrl.data.prepare import MANIFEST
from twinrl.fsdp.initial import META
from twinrl.machine.dtypes import DTYPES
from twinrl.training.schema import RunConfig

DEFAULT_PIXELS = 1024
VAE = "vae"


class Described:
    """The pipeline of a run, of which nothing but descriptions is read.

    Attributes:
        family: with the VAE on the meta device. transformer: its configuration.
        latent_shape: (C, H, W) of the largest latents.

    Raises:
        InputError: no description can be had, or it is another family's.
    """

    def __init__(self, settings: RunConfig):
        folder, kind = fetched(str(settings.model.path)), settings.model.family_class
        pipelines.check_class(folder, kind.PIPELINE)
        pipelines.check_values(folder, kind.LEFT_OUT)
        vae = _vae(folder) if VAE in components(read_index(folder)) and VAE not in kind.LEFT_OUT else None
        if vae is not None:
            with quiet():
                vae.to(DTYPES[settings.model.frozen_dtype])
        self.family = kind(folder, SimpleNamespace(vae=vae, components={}))
        self.transformer = transformer_config(folder, self.family.PART)
        self.latent_shape = self._latent_shape(settings)

    def _latent_shape(self, settings: RunConfig) -> tuple[int, int, int]:
        """Of the largest bucket; where no data are prepared, the size that the model was made for, or 1024² pixels."""
        root = settings.data.root
        if root is not None and (root / MANIFEST).exists():
            return max((row.latent_shape for row in read_manifest(root).buckets), key=math.prod)
        side = self.transformer.get("sample_size") or DEFAULT_PIXELS // self.family.COMPRESSION
        return self.family.channels, side, side


def fetched(path: str) -> Path:
    """A folder with the pipeline's descriptions; of a hub name these alone are fetched.

    Raises:
        InputError: the hub cannot be reached and has no copy here.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        return Path(snapshot_download(path, allow_patterns=[INDEX, "*/config.json", "scheduler/*.json"]))
    except (OSError, HfHubHTTPError, HTTPError, ValueError) as error:
        why = str(error).removeprefix("Got: ").partition("\n")[0]  # the hub's client says that already
        raise InputError(
            f"{path} is no folder here, and the description of {path} cannot be fetched from the hub", got=why or None,
            fix="give the folder of a downloaded pipeline as model.path",
        ) from error  # fmt: skip


def _vae(folder: Path) -> nn.Module:
    import diffusers

    _, cls = read_index(folder)[VAE]
    with building(folder / VAE), META:
        made: nn.Module = getattr(diffusers, cls).from_config(pipelines.described(folder / VAE / "config.json"))
        return made
