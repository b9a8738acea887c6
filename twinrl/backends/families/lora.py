"""Low-rank adapters (LoRA, arXiv:2106.09685) through peft, in diffusers' file format.

A LoRA student trains the adapters, the second time embedding and the sign; everything else is frozen. Its frozen
teacher is the same network with all three switched off (``twinrl.backends.families.family.FrozenTeacher``).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from twinrl.config import Settings
from twinrl.config.errors import InputError
from twinrl.flow import draws

ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # diffusers' own name
TWIN_FILE = "twin_times.safetensors"
ALPHA_FILE = "lora_with_alpha.safetensors"


class LoraSettings(Settings):
    """Adapters."""

    rank: int = Field(64, ge=1, description="rank of the update")
    alpha: int | None = Field(None, ge=1, description="the update is scaled by alpha / rank; null = rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapters' input")
    targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="suffixes of module names; null = the family's"
    )


def add_lora(transformer: Any, settings: LoraSettings, family_targets: Sequence[str]) -> None:
    """Freeze ``transformer`` and add trainable adapters, which leave its output as it is at first.

    Raises:
        InputError: a target names no layer.
    """
    from peft import LoraConfig

    targets = list(family_targets if settings.targets is None else settings.targets)
    names = [name for name, _ in transformer.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            said = "the end of a module's name, such as "
            if settings.targets is None:
                known = said + ", ".join(names[-2:])
                raise InputError("the family's LORA_TARGETS name no layer", got=target, expected=known)
            raise InputError(
                "model.lora.targets names no layer", got=target, expected=said + ", ".join(family_targets[:2]),
                fix="leave model.lora.targets out: the family has its own",
            )  # fmt: skip
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha or settings.rank,
            lora_dropout=settings.dropout,
            init_lora_weights="gaussian",
            target_modules=targets,
        )
    )
    for parameter in transformer.twin_parameters().values():
        parameter.requires_grad_(True)


def first_values(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Initial values of an adapter's parameter by its name: A ~ N(0, 1/rank²), B = 0 (Gaussian initialisation of peft).

    Keyed by the name, so that each process of several can make those that it holds.
    """
    if "lora_A" not in name:
        return torch.zeros(tuple(shape))
    return draws.normal(tuple(shape), seed, f"adapter {name}") / shape[0]


@torch.no_grad()
def initialise(transformer: Any, seed: int) -> None:
    """Give all adapters their :func:`first_values`."""
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.copy_(first_values(name, parameter.shape, seed))


@contextmanager
def without_adapters(transformer: Any) -> Iterator[None]:
    """Inside, the adapters have no effect.

    Their ``requires_grad`` is left alone, unlike by peft's own switch: where the weights are sharded there are two
    parameters for each, gathered and not, and they would come to disagree.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def is_adapted(transformer: Any) -> bool:
    """Whether adapters were added."""
    return bool(getattr(transformer, "peft_config", None))


def save_lora(transformer: Any, pipeline_class: Any, folder: Path, part: str = "transformer") -> None:
    """Write the adapters as diffusers does (``load_lora_weights`` reads them), e₂ and the sign beside them.

    alpha / rank is multiplied into B, and alpha is the rank: loaders that read no metadata scale rightly, too. Tensors
    of alpha are in a file of their own (``ALPHA_FILE``) for programs that want them: diffusers refuses them (SD3, Sana,
    Stable Diffusion), or refuses them beside metadata (FLUX).
    """
    from peft.utils import get_peft_model_state_dict

    config = transformer.peft_config["default"]
    layers = {name: value.float() for name, value in get_peft_model_state_dict(transformer).items()}
    scaled = {n: v * (config.lora_alpha / config.r) if ".lora_B." in n else v for n, v in layers.items()}
    pipeline_class.save_lora_weights(
        save_directory=folder,
        **{f"{part}_lora_layers": scaled},
        **{f"{part}_lora_adapter_metadata": _metadata(transformer) | {"lora_alpha": config.r}},
    )
    alphas = {n.replace(".lora_A.weight", ".alpha"): float(config.lora_alpha) for n in layers if "lora_A" in n}
    tensors = layers | {name: torch.tensor(alpha) for name, alpha in alphas.items()}
    save_file({f"{part}.{n}": v.detach().contiguous().cpu() for n, v in tensors.items()}, folder / ALPHA_FILE)
    save_file({n: p.detach().contiguous().cpu() for n, p in transformer.twin_parameters().items()}, folder / TWIN_FILE)


def _metadata(transformer: Any) -> dict[str, Any]:
    described = transformer.peft_config["default"].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in described.items()}


def load_lora(transformer: Any, folder: Path, part: str = "transformer") -> None:
    """Give ``transformer`` the adapters, second time embedding and sign that :func:`save_lora` wrote.

    Raises:
        InputError: no such file, or it is another model's.
    """
    file = folder / TWIN_FILE
    if not file.is_file() or not (folder / ADAPTER_FILE).is_file():
        raise InputError(f"{folder} is no LoRA student", expected=f"files {ADAPTER_FILE} and {TWIN_FILE}")
    saved: dict[str, Tensor] = load_file(file)
    wanted = transformer.twin_parameters()
    shapes = {name: tuple(value.shape) for name, value in saved.items()}
    if shapes != {name: tuple(value.shape) for name, value in wanted.items()}:
        raise InputError(f"{file} belongs to another transformer", got=shapes.get("twin_sign"))
    transformer.load_lora_adapter(folder, weight_name=ADAPTER_FILE, prefix=part)
    _keep_precise(transformer, saved, load_file(folder / ADAPTER_FILE), part)


def _keep_precise(transformer: Any, twin: dict[str, Tensor], adapters: dict[str, Tensor], part: str) -> None:
    """What was trained as it was trained, in float32: diffusers rounds it to the format of the base."""
    for name, parameter in transformer.twin_parameters().items():
        parameter.data = twin[name].to(parameter.device)
    for path, layer in transformer.named_modules():
        for kind in ("lora_A", "lora_B"):
            for adapter in getattr(layer, kind, {}).values():
                adapter.weight.data = adapters[f"{part}.{path}.{kind}.weight"].to(adapter.weight.device)
