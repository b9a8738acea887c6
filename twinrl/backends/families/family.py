"""What a family of pretrained models brings: one protocol over transformer, VAE, text encoders and pipeline.

A *family* is one architecture with its diffusers pipeline (SD3, Qwen-Image, …). It offers

- ``network(config)``: a student ``F(x, t, r, c)`` in twinrl's conventions (t = 1 noise, v = noise − data),
- ``encode_prompts`` and ``null_condition``: conditions whose tensors all have B rows, whatever the texts' lengths,
- ``encode``, ``decode``, ``latent_shape``: the space of the flow,
- ``LORA_TARGETS`` and ``block_classes``: what to adapt, and what to shard.

To add one, write its file (a transformer with ``TwinTimes``, a ``FamilyNetwork``, a ``Family``) and one line in
``twinrl.backends.families.FAMILIES``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from twinrl.backends.families import pipelines
from twinrl.backends.families.diffusion import check_bridge
from twinrl.backends.families.lora import LoraSettings, add_lora, initialise, is_adapted
from twinrl.backends.families.twin_times import TwinTimes
from twinrl.config import Settings
from twinrl.config.components import Returned, all_of, checked, wrong_return
from twinrl.config.errors import InputError
from twinrl.flow.conditions import Condition
from twinrl.flow.returned import check_condition
from twinrl.machine.dtypes import DTYPES
from twinrl.machine.moving import on_host

TEXT_WIDTHS = ("cap_feat_dim", "caption_channels", "joint_attention_dim", "cross_attention_dim")
"""Where transformers' configurations have the width of the text, the most particular name first."""


class FamilyConfig(Settings):
    """A pretrained diffusers model as the start of a student."""

    path: str = Field(description="folder of a diffusers pipeline, or its name on the hub")
    lora: LoraSettings | None = Field(None, description="train adapters only; null = all parameters")
    gradient_checkpointing: bool = Field(False, description="recompute blocks in the backward pass to save memory")
    dtype: Literal["float32", "bf16"] = Field("float32", description="weights of the transformer")
    frozen_dtype: Literal["float32", "bf16"] = Field("float32", description="weights of text encoders and VAE")
    embedded_guidance: float = Field(3.5, ge=0, description="guidance that FLUX.1-dev and FLUX.2-dev are told")
    prediction: Literal["epsilon", "v"] | None = Field(
        None, description="what a diffusion model predicts; null = the model is a flow"
    )
    diff2flow: bool = Field(False, description="train a diffusion model as a flow (Diff2Flow); needs prediction")


class FamilyNetwork(nn.Module, ABC):
    """``F(x, t, r, condition)`` around a family's transformer.

    Under LoRA its state dict is what it trains (adapters, second time, sign), not the pretrained weights.

    Arguments:
        transformer: with ``TwinTimes``; the only submodule.
    """

    def __init__(self, transformer: TwinTimes):
        super().__init__()
        self.transformer = transformer
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.register_load_state_dict_post_hook(_frozen_may_be_missing)

    def forward(self, x_bchw: Tensor, t_b: Tensor, r_b: Tensor, condition: Condition) -> Tensor:
        """Latents (B, C, H, W), t in [−1, 1] (negative = fake branch), |r| ≤ |t| → velocity in x's dtype."""
        dtype = self.transformer.base_dtype
        told = {name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()}
        with self.transformer.at(t_b, r_b):
            found = self.velocity(self.latents(x_bchw), t_b.abs(), told)
        return checked(found, Tensor, self, "velocity", x_bchw.shape).to(x_bchw.dtype)

    def latents(self, x_bchw: Tensor) -> Tensor:
        """The latents as :meth:`velocity` gets them: in the transformer's dtype."""
        return x_bchw.to(self.transformer.base_dtype)

    @abstractmethod
    def velocity(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """The transformer's velocity noise − data (B, C, H, W) at noise level |t|; all in the transformer's dtype."""


def _trained(network: FamilyNetwork, name: str) -> bool:
    """Whether a parameter of an adapted network is trained, by its name; copies for teachers have no gradients."""
    return "lora_" in name or name.endswith(
        tuple(f"transformer.{twin}" for twin in network.transformer.twin_parameters())
    )


def _leave_out_frozen(network: FamilyNetwork, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    if is_adapted(network.transformer):
        for name in [n for n in state if n.startswith(f"{prefix}transformer.") and not _trained(network, n)]:
            del state[name]


def _frozen_may_be_missing(network: FamilyNetwork, keys: Any) -> None:
    if is_adapted(network.transformer):
        keys.missing_keys[:] = [name for name in keys.missing_keys if _trained(network, name)]


class FrozenTeacher(nn.Module):
    """The pretrained model inside a student: its network with adapters, second time and sign switched off.

    *When to use*: a frozen teacher of a LoRA student; it needs no copy of the weights. Under full-parameter training
    it would change with the student: use a copy there.
    """

    def __init__(self, student: FamilyNetwork):
        super().__init__()
        self._student = (student,)  # a tuple, so that the student's parameters are not this module's

    @torch.no_grad()
    def forward(self, x_bchw: Tensor, t_b: Tensor, r_b: Tensor, condition: Condition) -> Tensor:
        """As the pretrained network at (x, t, t); r and the sign of t are ignored."""
        with self._student[0].transformer.as_pretrained():
            return self._student[0](x_bchw, t_b, r_b, condition)


Arguments = tuple[Any, ...]


def _condition(value: Any, owner: Any, method: str, arguments: Arguments) -> None:
    check_condition(value, len(arguments[0]), owner, method)


def _of_pixels(value: Any, owner: Any, method: str, arguments: Arguments) -> None:
    pixels = arguments[0]
    checked(value, Tensor, owner, method, (len(pixels), *owner.latent_shape(*pixels.shape[-2:])))


def _of_latents(value: Any, owner: Any, method: str, arguments: Arguments) -> None:
    checked(value, Tensor, owner, method)
    if value.ndim != 4 or len(value) != len(arguments[0]) or value.shape[1] != 3:
        raise wrong_return(value, owner, method, f"pixels ({len(arguments[0])}, 3, H, W)")


def _sizes(value: Any, owner: Any, method: str, arguments: Arguments) -> None:
    all_of(tuple, int)(value, owner, method, arguments)
    if len(value) != 3 or min(value) < 1:
        raise wrong_return(value, owner, method, "(C, h, w)")


def _rows(value: Any, owner: Any, method: str, arguments: Arguments) -> None:
    if len(checked(value, Tensor, owner, method)) != len(arguments[0]):
        raise wrong_return(value, owner, method, f"{len(arguments[0])} rows")


class Family(ABC):
    """A loaded pipeline without its transformer, in twinrl's terms; made by :meth:`load`.

    Arguments:
        folder: of the pipeline.
        pipeline: the diffusers pipeline; its transformer is not loaded.

    Attributes:
        NAME: in ``FAMILIES``.
        PIPELINE: the diffusers pipeline's class name.
        TRANSFORMER: our subclass of its transformer; "TwinFlow" is in its name, by which exports find twinrl's own.
        NETWORK: the network around it.
        LORA_TARGETS: linear layers that adapters go to by default (suffixes of module names).
        BLOCKS: class names of the repeated blocks, the units to checkpoint and to shard.
        TOKENS: most text tokens of a prompt; longer ones are cut.
        MASKED: whether conditions say by a ``mask`` which tokens are none.
        PATCH: sides of latents are multiples of this.
        COMPRESSION: pixels to a side of a latent, in the published models.
        PART: the pipeline's component that is trained.
        LEFT_OUT: components that are neither loaded nor exported.
        SETTINGS: what the pipeline's class is told beside its components.
    """

    NAME: ClassVar[str]
    PIPELINE: ClassVar[str]
    TRANSFORMER: ClassVar[type[TwinTimes]]
    NETWORK: ClassVar[type[FamilyNetwork]]
    LORA_TARGETS: ClassVar[tuple[str, ...]]
    BLOCKS: ClassVar[tuple[str, ...]]
    TOKENS: ClassVar[int] = 512
    MASKED: ClassVar[bool] = False
    PATCH: ClassVar[int] = 2
    COMPRESSION: ClassVar[int] = 8
    PART: ClassVar[str] = "transformer"
    LEFT_OUT: ClassVar[tuple[str, ...]] = ()
    SETTINGS: ClassVar[Mapping[str, Any]] = {}
    RETURNS: ClassVar[Mapping[str, Returned]] = {
        "_encode_prompts": _condition, "encode": _of_pixels, "decode": _of_latents, "latent_shape": _sizes,
        "condition_shapes": all_of(dict, tuple), "to_pipeline": _rows, "from_pipeline": _rows,
        "frozen_modules": all_of(list, nn.Module),
    }  # fmt: skip

    def __init__(self, folder: Path, pipeline: Any):
        self.folder, self.pipeline = folder, pipeline
        self.device = torch.device("cpu")
        for module in self.frozen_modules():
            module.requires_grad_(False).eval()

    @classmethod
    def load(cls, config: FamilyConfig) -> "Family":
        """The family of the pipeline at ``config.path``: everything but the transformer.

        Raises:
            InputError: no such folder or hub name, another family's folder, a missing or damaged component.
        """
        folder = pipelines.resolve(config.path)
        dtype = DTYPES[config.frozen_dtype]
        pipeline = pipelines.load_pipeline(folder, cls.PIPELINE, dtype, cls.PART, cls.LEFT_OUT, cls.SETTINGS)
        return cls(folder, pipeline)

    def network(self, config: FamilyConfig, seed: int = 0) -> FamilyNetwork:
        """A new student with the pretrained weights (and those of a published TwinFlow checkpoint, if it is one).

        ``seed`` decides the initial adapters, the only random weights; the global random state is left untouched.

        Raises:
            InputError: the transformer cannot be loaded, or is a variant that the family cannot train.
        """
        check_bridge(self.NAME, config.prediction, config.diff2flow)
        self.check_variant(pipelines.transformer_config(self.folder, self.PART))
        transformer = pipelines.load_transformer(self.folder, self.TRANSFORMER, DTYPES[config.dtype], self.PART)
        self.configure(transformer, config)
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self._adapt(transformer, config, seed)
        return self.NETWORK(transformer)

    def _adapt(self, transformer: Any, config: FamilyConfig, seed: int) -> None:
        """Add the configured adapters."""
        if config.lora is None:
            return
        with torch.random.fork_rng(devices=[]):
            add_lora(transformer, config.lora, self.LORA_TARGETS)
        for parameter in transformer.parameters():
            if parameter.requires_grad:  # few, and bf16 would swallow the updates of an average
                parameter.data = parameter.data.float()
        if not any(parameter.is_meta for parameter in transformer.parameters()):
            initialise(transformer, seed)

    def outline(self, config: FamilyConfig) -> FamilyNetwork:
        """What :meth:`network` makes, with parameters on the meta device: shapes, no values; buffers are there.

        *When to use*: several processes, each of which reads its own part (:meth:`files`, ``TwinTimes.origins``).
        """
        from accelerate import init_empty_weights

        check_bridge(self.NAME, config.prediction, config.diff2flow)
        described = pipelines.transformer_config(self.folder, self.PART)
        self.check_variant(described)
        with pipelines.building(self.folder / self.PART), init_empty_weights():
            transformer: Any = self.TRANSFORMER.from_config(described)  # type: ignore[attr-defined]
            transformer.to(DTYPES[config.dtype])
        self.configure(transformer, config)
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        with init_empty_weights():
            self._adapt(transformer, config, 0)
        return self.NETWORK(transformer)

    @staticmethod
    def dtype_of(config: FamilyConfig) -> torch.dtype:
        """Of the pretrained weights."""
        return DTYPES[config.dtype]

    def files(self) -> list[Path]:
        """The safetensors files with the transformer's weights. Raises InputError where there are none."""
        return pipelines.weight_files(self.folder / self.PART)

    def check_variant(self, described: Mapping[str, Any]) -> None:  # noqa: B027 (most families have one variant)
        """Raises InputError where the transformer's configuration is that of a variant that cannot be trained."""

    def configure(self, transformer: Any, config: FamilyConfig) -> None:  # noqa: B027
        """Apply settings that only this family has."""

    @property
    def content_hash(self) -> str:
        """Hex digest of the pretrained files, for a run's provenance."""
        return pipelines.content_hash(self.folder)

    # --- prompts ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The condition of B prompts: (B, ...) tensors, padded so that conditions of any prompts can be joined."""
        with pipelines.quiet():
            return self._encode_prompts(list(prompts))

    def limits(self) -> dict[str, int]:
        """Tokenizer → the most tokens of a prompt that its text encoder sees."""
        parts = {name: getattr(part, "model_max_length", None) for name, part in self.pipeline.components.items()}
        return {name: min(self.TOKENS, limit) for name, limit in parts.items() if limit is not None}

    def cut(self, prompts: Sequence[str]) -> dict[str, int]:
        """Tokenizer → how many of the prompts are longer than it may be told; the text encoder sees their beginning."""
        with pipelines.quiet():
            ids = {name: getattr(self.pipeline, name)(list(prompts))["input_ids"] for name in self.limits()}
        return {name: sum(len(row) > self.limits()[name] for row in rows) for name, rows in ids.items()}

    @abstractmethod
    def _encode_prompts(self, prompts: list[str]) -> Condition: ...

    def condition_shapes(self, described: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of one row's condition with a prompt of full length, from the transformer's configuration.

        Raises:
            InputError: the width of the text has an unknown name there; such a family says it itself.
        """
        width = next((described[name] for name in TEXT_WIDTHS if name in described), None)
        if width is None:
            raise InputError(
                f"{self.NAME}'s transformer does not say how wide its text is", got=", ".join(described),
                expected=" or ".join(TEXT_WIDTHS), fix="override Family.condition_shapes",
            )  # fmt: skip
        pooled = described.get("pooled_projection_dim")
        return {"text": (self.TOKENS, width)} | ({} if pooled is None else {"pooled": (pooled,)})

    def null_condition(self, n: int) -> Condition:
        """The empty condition ∅, the empty prompt, n rows."""
        return {k: v.expand(n, *v.shape[1:]) for k, v in self.encode_prompts([""]).items()}

    # --- pixels and latents -----------------------------------------------------------------------------

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of height × width pixels.

        Raises:
            InputError: the size does not divide into the transformer's patches.
        """
        factor = self.pipeline.vae_scale_factor
        step = factor * self.PATCH
        if height % step or width % step:
            raise InputError(f"size does not fit {self.NAME}", got=f"{height}×{width}", expected=f"multiples of {step}")
        return self.channels, height // factor, width // factor

    @property
    def channels(self) -> int:
        """C of the latents."""
        return self.pipeline.vae.config.latent_channels

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [−1, 1] → normalised latents (B, C, h, w), the posterior's mean; differentiable."""
        vae = self.pipeline.vae
        mean = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
        return ((mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor).to(pixels.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents → pixels, not clamped; differentiable."""
        vae = self.pipeline.vae
        z = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return vae.decode(z, return_dict=False)[0].to(latents.dtype)

    def frozen_modules(self) -> list[nn.Module]:
        """Text encoders and VAE."""
        named = self.pipeline.components.items()
        return [part for name, part in named if isinstance(part, nn.Module) and name != self.PART]

    def block_classes(self, network: FamilyNetwork) -> set[type[nn.Module]]:
        """The classes of the repeated blocks: units for sharding and checkpointing."""
        return {type(m) for m in network.modules() if type(m).__name__ in self.BLOCKS}

    def to(self, device: torch.device | str) -> "Family":
        """Text encoders and VAE on ``device``, in place."""
        self.device = torch.device(device)
        for module in self.frozen_modules():
            module.to(self.device)
        return self


def pad_tokens(text: Tensor, length: int) -> Tensor:
    """(B, L, ...) cut or padded with zeros to (B, length, ...)."""
    text = text[:, :length]
    missing = text.new_zeros(len(text), length - text.shape[1], *text.shape[2:])
    return torch.cat([text, missing], dim=1)


def trimmed(condition: Condition) -> tuple[Tensor, Tensor | None]:
    """Text (B, L, D) and mask (B, L) without columns that are padding in every row; no mask where nothing is padded."""
    mask = condition.get("mask")
    if mask is None:
        return condition["text"], None
    shown = on_host(mask)
    longest = max(1, int(shown.sum(dim=1).max()))
    text, whole = condition["text"][:, :longest], bool(shown[:, :longest].all())
    return text, None if whole else mask[:, :longest]
