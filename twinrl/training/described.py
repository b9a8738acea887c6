"""What a family's pipeline is, by its description alone: networks, VAE and data without values (the meta device)."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from twinrl.backends.families import pipelines
from twinrl.backends.families.family import FamilyNetwork
from twinrl.backends.families.lora import add_lora
from twinrl.backends.families.pipelines import INDEX, building, components, quiet, read_index, transformer_config
from twinrl.config.errors import InputError
from twinrl.data.dataset import read_manifest
from twinrl.data.prepare import MANIFEST
from twinrl.flow.conditions import Condition
from twinrl.fsdp.initial import META
from twinrl.machine.dtypes import DTYPES
from twinrl.training.provider import Unloaded
from twinrl.training.schema import RunConfig

DEFAULT_PIXELS = 1024


def unloaded(settings: RunConfig) -> Unloaded:
    """The student, the data and the frozen parts of a pipeline, of which nothing but descriptions is read.

    Raises:
        InputError: no description can be had, or it is another family's.
    """
    folder, family = described(str(settings.model.path)), settings.model.family_class
    pipelines.check_class(folder, family.PIPELINE)
    pipelines.check_values(folder, family.LEFT_OUT)
    network = meta_family(settings, folder)
    used = (name for name in components(read_index(folder)) if name not in (family.PART, *family.LEFT_OUT))
    frozen = {name: module for name in used if (module := meta_component(folder, name)) is not None}
    data = Described(settings, folder, frozen.get("vae"))
    data.family.configure(network.transformer, settings.model.pretrained)
    return Unloaded(network, data, frozen)


def described(path: str) -> Path:
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


def meta_family(settings: RunConfig, folder: Path) -> FamilyNetwork:
    """The student as :meth:`Family.network` makes it, without values."""
    model, family = settings.model, settings.model.family_class
    with building(folder / family.PART), META:
        transformer: Any = family.TRANSFORMER.from_config(transformer_config(folder, family.PART))  # type: ignore[attr-defined]
        transformer.to(DTYPES[model.dtype])
        if model.lora is not None:
            add_lora(transformer, model.lora, family.LORA_TARGETS)
            for parameter in transformer.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
    if model.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return family.NETWORK(transformer)


def meta_component(folder: Path, name: str) -> nn.Module | None:
    """A frozen component without values; None for tokenizers and schedulers."""
    import diffusers
    import transformers

    library, cls = read_index(folder)[name]
    file = folder / name / "config.json"
    if not file.is_file():
        return None
    with building(folder / name), META:
        if library == "diffusers":
            return getattr(diffusers, cls).from_config(pipelines.described(file))
        config = transformers.AutoConfig.from_pretrained(folder / name, trust_remote_code=False)
        return getattr(transformers, cls)(config)


class Described:
    """What a family's data look like, from its descriptions alone, and its VAE without values."""

    def __init__(self, settings: RunConfig, folder: Path, vae: nn.Module | None):
        self.vae = vae
        if self.vae is not None:
            with quiet():
                self.vae.to(DTYPES[settings.model.frozen_dtype])
        pipeline = SimpleNamespace(vae=self.vae, components={})
        self.family = settings.model.family_class(folder, pipeline)
        self.transformer = transformer_config(folder, self.family.PART)
        self.latent_shape = self._latent_shape(settings)

    def _latent_shape(self, settings: RunConfig) -> tuple[int, int, int]:
        """Of the largest bucket; where no data are prepared, the size that the model was made for, or 1024² pixels."""
        root = settings.data.root
        if root is not None and (root / MANIFEST).exists():
            return max((row.latent_shape for row in read_manifest(root).buckets), key=math.prod)
        side = self.transformer.get("sample_size") or DEFAULT_PIXELS // self.family.COMPRESSION
        return self.family.channels, side, side

    def null_condition(self, n: int) -> Condition:
        """A condition of ``n`` rows with prompts of full length."""
        shapes = self.family.condition_shapes(self.transformer)
        return {name: torch.empty(n, *shape) for name, shape in shapes.items()}

    def decode(self, latents: Tensor) -> Tensor:
        """As the family's."""
        return self.family.decode(latents)

    def encode(self, pixels: Tensor) -> Tensor:
        """As the family's."""
        return self.family.encode(pixels)
