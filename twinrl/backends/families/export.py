"""A student as a diffusers folder: stock pipelines then sample it in one to four steps.

The folder holds the pipeline with the student's transformer, which takes r = 0 where nobody says otherwise, and a
few-step scheduler. diffusers loads components of foreign classes only from modules that are already imported, and looks
them up by the library's name in ``model_index.json``: that is ``twinrl``, so ``import twinrl`` suffices. A family of
one's own is known once its module is imported, too.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinrl.backends.families.family import Family, FamilyConfig, FamilyNetwork
from twinrl.backends.families.lora import is_adapted, load_lora, save_lora
from twinrl.backends.families.pipelines import INDEX, is_hub_name, quiet
from twinrl.backends.families.rounding import Cost
from twinrl.config.errors import InputError
from twinrl.machine import files
from twinrl.machine.dtypes import DTYPES

LIBRARY = "twinrl"
TOLD = ("embedded_guidance", "prediction", "diff2flow")
"""What a card repeats of how the base model was loaded, beside its format."""


def export(
    network: FamilyNetwork,
    family: Family,
    folder: Path,
    scheduler: Any,
    *,
    base: str,
    dtype: torch.dtype | None = None,
    costs: "Costs | None" = None,
) -> "Costs":
    """Write the student as a diffusers pipeline, and say what rounding has cost; adapters are merged into the weights.

    Arguments:
        network: the student; left as it is. Its transformer is copied where it has adapters.
        family: brings text encoders, tokenizers and VAE. folder: must not exist, or be empty.
        scheduler: a ``TwinFlowScheduler``; it decides style and seed of the samples.
        base: the pretrained model, for the model card. dtype: of the written transformer; None keeps the student's.
        costs: of a student without adapters; its caller knows where training began.

    Raises:
        InputError: the folder is in use.

    *When to use*: at the end of a run, to use or to publish the student without twinrl's trainer. For a small file
    beside an unchanged base model see :func:`export_lora`.
    """
    claim(folder)
    transformer, costs = network.transformer, costs or Costs(dtype or network.transformer.base_dtype)
    if adapted := is_adapted(transformer):
        transformer = merged(transformer, costs)
    if dtype is not None and any(p.dtype != dtype for p in transformer.parameters()):
        with quiet():
            transformer = (transformer if adapted else copy.deepcopy(transformer)).to(dtype)
    parts = family.pipeline.components | {family.PART: transformer, "scheduler": scheduler} | family.SETTINGS
    with quiet():
        type(family.pipeline)(**parts).save_pretrained(folder)
    _name_library(folder / INDEX, (family.PART, "scheduler"))
    for file in folder.glob("*/config.json"):
        _load_in_single_precision(file)
    (folder / "README.md").write_text(card(family, base, folder.name, costs, adapted))
    return costs


class Costs:
    """What rounding to the written format costs, and what loading in bf16 does.

    Arguments:
        dtype: of the written weights.
    """

    def __init__(self, dtype: torch.dtype):
        self.written, self.half = Cost(dtype), Cost(torch.bfloat16)

    def see(self, exact: Tensor, moved: Tensor) -> Tensor:
        """As :meth:`Cost.see`, of the written format."""
        self.half.see(exact, moved)
        return self.written.see(exact, moved)

    def remedy(self, adapted: bool) -> str:
        """In words, what to do where it costs more than 1 %; else nothing."""
        ways = "--lora (the adapters beside the base model) or --dtype float32" if adapted else "--dtype float32"
        return f"; {ways} keeps all of it" if self.written.matters else ""


def export_lora(
    network: FamilyNetwork, family: Family, folder: Path, *, base: str, config: FamilyConfig | None = None
) -> None:
    """Write the adapters in diffusers' LoRA format, and beside them the second time embedding and the sign.

    Arguments:
        network, family, folder, base: as for :func:`export`.
        config: how the model under the adapters was loaded for training, for the card; None: by default.

    Raises:
        InputError: the student has no adapters, or the folder is in use.

    *When to use*: many students of one large base model. Load them with :func:`with_lora`: a stock transformer reads
    the adapters but has no second time.
    """
    if not is_adapted(network.transformer):
        raise InputError("the student has no adapters", fix="export the whole model, or train with model.lora")
    claim(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_lora(network.transformer, type(family.pipeline), folder, family.PART)
    dtype = _config_name(network.transformer.base_dtype)
    told = (config or FamilyConfig(path=base)).model_copy(update={"dtype": dtype})
    (folder / "README.md").write_text(lora_card(family, base, told))


def with_lora(network: FamilyNetwork, family: Family, folder: Path) -> FamilyNetwork:
    """``network``, freshly loaded without adapters, with those that :func:`export_lora` wrote; changed in place.

    Raises:
        InputError: the folder holds no LoRA student, or another model's.
    """
    load_lora(network.transformer, folder, family.PART)
    return network


def claim(folder: Path) -> None:
    """Raises InputError unless ``folder`` is new or empty, and can be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is in use", expected="a new or empty folder", fix="name another")
    files.check_writable(folder, str(folder), "name another")


@torch.no_grad()
def merged(transformer: Any, costs: Costs) -> Any:
    """A copy whose adapters are part of the weights: added in float32, rounded once to the written format."""
    from peft.tuners.lora import Linear

    whole = copy.deepcopy(transformer)
    adapted: list[Any] = [module for module in whole.modules() if isinstance(module, Linear)]
    for layer in adapted:
        for part in (layer.lora_A, layer.lora_B):
            part.float()
        base, update = layer.get_base_layer(), layer.get_delta_weight("default")
        base.weight.data = costs.see(base.weight.float() + update, update)
    whole.unload_lora()
    return whole


def _config_name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def _name_library(index: Path, ours: Sequence[str]) -> None:
    """diffusers records the module of our classes' files, which ``import twinrl`` would not have imported."""
    entries = json.loads(index.read_text())
    entries |= {name: [LIBRARY, entries[name][1]] for name in ours}
    index.write_text(json.dumps(entries, indent=2) + "\n")


def _load_in_single_precision(file: Path) -> None:
    """Where nobody says ``torch_dtype``, diffusers loads float32 and transformers what a configuration says: text
    encoders that were saved in bf16 would not fit the rest. The weights stay as they are written."""
    described = json.loads(file.read_text())
    parts = [described, *(value for value in described.values() if isinstance(value, dict))]
    stated = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if part.get(key)]
    for part, key in stated:
        part[key] = "float32"
    if stated:
        file.write_text(json.dumps(described, indent=2) + "\n")


def _called(base: str) -> str:
    """What a card calls the pretrained model: its name on the hub, or a folder's name without where it lies."""
    return base if is_hub_name(base) else Path(base).resolve().name


def _base_model(base: str) -> str:
    """A card's line on the pretrained model; the hub refuses cards that name what it does not have."""
    return f"base_model: {base}\n" if is_hub_name(base) else ""


def card(family: Family, base: str, name: str, costs: Costs, adapted: bool) -> str:
    """The model card of an exported folder."""
    module, written = family.TRANSFORMER.__module__, costs.written
    half = f"`torch_dtype=torch.bfloat16` takes half of the memory; {costs.half}."
    kept = f"The weights are {written.name}; {written}{costs.remedy(adapted)}."
    kept = f"The weights are float32. {half}" if written.dtype == torch.float32 else kept
    own = "" if module.startswith(f"{LIBRARY}.") else f"\nimport {module}"
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
{_base_model(base)}tags:
- twinflow
- few-step
---
# {name}

A few-step student of `{_called(base)}` (pipeline `{family.PIPELINE}`), trained with TwinFlow (arXiv:2512.05150) by
`twinrl`.

```python
import torch
import twinrl{own}
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("{name}", torch_dtype=torch.{written.name})
image = pipeline("a red bicycle", num_inference_steps=2, guidance_scale=0).images[0]
```

- {kept}
- 1–4 steps. Guidance is part of the training target: switch it off (`guidance_scale=0`).
- The scheduler is `TwinFlowScheduler`: its `seed` decides the noise between steps, the pipeline's `generator` the
  start.
- diffusers loads classes of other libraries from local folders only: download the repository first.
- The transformer has a second time embedding (`{family.TRANSFORMER.TIME}_2`) and a sign of the branch (`twin_sign`),
  which a stock transformer would ignore.
- The licence of the base model applies.
"""


def lora_card(family: Family, base: str, config: FamilyConfig) -> str:
    """The model card of exported adapters."""
    told = {"path": _called(base)} | {
        name: value for name, value in config.model_dump(exclude_defaults=True).items() if name in TOLD
    }
    arguments = ", ".join(f"{name}={value!r}" for name, value in (told | {"dtype": config.dtype}).items())
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
{_base_model(base)}tags:
- twinflow
- lora
---
Adapters of a few-step student of `{_called(base)}`, trained with TwinFlow (arXiv:2512.05150) by `twinrl`.

`pytorch_lora_weights.safetensors` is in diffusers' format. `twin_times.safetensors` holds the second time embedding and
the sign; without it the student does not know that it is asked for a jump.

The base model was {config.dtype} in training, and the adapters correct it as it was then. Load it in this format,
whatever it has on disk: a stock pipeline with `torch_dtype={DTYPES[config.dtype]}`. alpha / rank is part of the
adapters, so that they are added as they are.

```python
from pathlib import Path
from twinrl.backends.families import load_family
from twinrl.backends.families.export import with_lora
from twinrl.backends.families.family import FamilyConfig

config = FamilyConfig({arguments})
family = load_family("{family.NAME}", config)
student = with_lora(family.network(config), family, Path("this folder"))
```
"""
