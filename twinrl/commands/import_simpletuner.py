"""``twinrl import-simpletuner``: a SimpleTuner configuration as one of twinrl, and what differs.

Every ``twinflow_*`` key is mapped or refused by name. Of the others those that decide the training of a student are
mapped; the rest is listed as left out. Facts about the keys are from SimpleTuner's documentation
(documentation/distillation/TWINFLOW.md and OPTIONS.md).
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from twinrl import config as configuration
from twinrl.backends.families import FAMILIES
from twinrl.backends.families.diffusion import DIFFUSION_FAMILIES, PREDICTIONS, check_bridge
from twinrl.config import foreign
from twinrl.config.errors import InputError
from twinrl.machine import files, text
from twinrl.training.schema import RunConfig

RENAMED = {
    "twinflow_estimate_order": "terms.base.order",
    "twinflow_enhanced_ratio": "guidance.strength",
    "twinflow_delta_t": "terms.base.delta",
    "twinflow_target_clamp": "terms.base.clamp",
    "ema_decay": "teacher.decay",
    "learning_rate": "optim.lr",
    "max_train_steps": "train.steps",
    "seed": "seed",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "max_grad_norm": "gradients.total.clip.max_norm",
    "checkpointing_steps": "checkpoint.every",
    "checkpoint_step_interval": "checkpoint.every",
    "validation_steps": "evaluation.every",
    "validation_step_interval": "evaluation.every",
    "output_dir": "run.dir",
}
"""Keys whose value is taken over as it is."""

READ = {
    "twinflow_enabled", "twinflow_target_step_count", "twinflow_adversarial_enabled", "twinflow_adversarial_weight",
    "twinflow_rectify_weight", "twinflow_require_ema", "twinflow_allow_no_ema_teacher", "twinflow_allow_diff2flow",
    "diff2flow_enabled", "use_ema", "model_family", "model_type", "pretrained_model_name_or_path", "lora_rank",
    "lora_alpha", "lora_dropout", "train_batch_size", "gradient_accumulation_steps", "mixed_precision",
    "validation_num_inference_steps", "lr_scheduler", "prediction_type", "lora_type",
}  # fmt: skip
"""Keys that are read below; with RENAMED and the guards of ``foreign`` all that is understood."""

FLAGS = {
    "twinflow_enabled", "twinflow_adversarial_enabled", "twinflow_require_ema", "twinflow_allow_no_ema_teacher",
    "twinflow_allow_diff2flow", "diff2flow_enabled", "use_ema", "gradient_checkpointing",
}  # fmt: skip
COUNTS = {
    "twinflow_target_step_count", "twinflow_estimate_order", "lora_rank", "train_batch_size",
    "gradient_accumulation_steps", "validation_num_inference_steps", "max_train_steps", "seed", "checkpointing_steps",
    "checkpoint_step_interval", "validation_steps", "validation_step_interval",
}  # fmt: skip
NUMBERS = {
    "twinflow_enhanced_ratio", "twinflow_delta_t", "twinflow_target_clamp", "twinflow_adversarial_weight",
    "twinflow_rectify_weight", "ema_decay", "learning_rate", "max_grad_norm", "lora_alpha", "lora_dropout",
}  # fmt: skip
TEXTS = (READ | set(RENAMED)) - FLAGS - COUNTS - NUMBERS
"""Every key that is understood is of one kind, though its files spell values as they please: ``"false"``, ``"2"``."""

SPELLED = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
UNSET = ("", "none", "null")

FAMILY_NAMES = {"z-image": "z_image", "sd1x": "stable_diffusion", "sd2x": "stable_diffusion"}
"""Its names of families where ours differ."""
PREDICTED = {"sd1x": "epsilon", "sd2x": "v_prediction"}
"""What its diffusion models predict where the file does not say."""

LORA_RANK = 16  # SimpleTuner's, where the file has none


@dataclass
class Imported:
    """A configuration on its way.

    Attributes:
        given: SimpleTuner's keys without leading dashes, each of its kind (:func:`typed`).
        made: twinrl's mapping.
        notes: what differs, for people.
    """

    given: Mapping[str, Any]
    made: dict[str, Any] = field(default_factory=lambda: {"extends": "simpletuner"})
    notes: list[str] = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        """A value, or the default where it is absent or null."""
        value = self.given.get(key)
        return default if value is None else value

    def put(self, path: str, value: Any) -> None:
        """Set a dotted key."""
        for key in reversed(path.split(".")):
            value = {key: value}
        self.made = configuration.merge(self.made, value)


def import_simpletuner(path: Path, out: Path | None, console: Console) -> int:
    """Write the configuration of the file ``path`` to ``out``, print what differs; 0.

    Without ``out`` it goes to the working folder, under the name of ``path`` with .yaml.

    Raises:
        InputError: the file cannot be read, is not for TwinFlow, has an option that twinrl has not, or ``out`` exists.
    """
    out = out or Path(path.stem + ".yaml")
    if os.path.exists(out):  # False where the name is too long, which writing says
        raise InputError(f"{out} exists", fix="name another file with -o")
    made, notes = convert(read(path))
    content = yaml.safe_dump(made, sort_keys=False, allow_unicode=True)
    try:
        files.write_text(out, f"# from SimpleTuner's {text.printable(path.name)}\n{content}")
    except OSError as error:
        raise InputError(f"{out} cannot be written", got=error.strerror, fix="name another file with -o") from error
    console.print(f"written to {out}; what differs:")
    for note in notes:
        console.print(f"- {note}", markup=False)
    return 0


def read(path: Path) -> dict[str, Any]:
    """The keys of a SimpleTuner file, without leading dashes.

    Raises:
        InputError: it is no JSON object, or has a key in both ways.
    """
    try:
        files.check_plain(path)
        found = json.loads(text.decode(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON", got=error) from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is no JSON object", got=type(found).__name__, expected='{"model_family": …}')
    keys = {key.lstrip("-"): value for key, value in found.items()}
    if len(keys) < len(found):
        raise InputError(f"{path} has a key twice, with dashes and without", fix="keep one of each")
    return keys


def typed(key: str, value: Any) -> Any:
    """The value of a key as what it is: a flag, a count, a number or a text; of a key that is not understood as given.

    Raises:
        InputError: it cannot be that.
    """
    spelled = value.strip().lower() if isinstance(value, str) else value
    if value is None or spelled in UNSET:
        return None
    for keys, kind, make in (
        (FLAGS, "true or false", _flag), (COUNTS, "a whole number", _count), (NUMBERS, "a number", _number),
        (TEXTS, "a text", _text),
    ):  # fmt: skip
        if key in keys:
            try:
                return make(spelled if keys is not TEXTS else value)
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                raise InputError(f"{key} is no value of its kind", got=f"{value!r:.80}", expected=kind) from error
    return value


def _flag(value: Any) -> bool:
    return SPELLED[str(value).lower()]


def _count(value: Any) -> int:
    number = _number(value)
    if not number.is_integer():
        raise ValueError
    return int(value) if str(value).lstrip("+-").isdigit() else int(number)  # whole digits beyond a float's stay exact


def _number(value: Any) -> float:
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def convert(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """twinrl's mapping for SimpleTuner's, checked against the schema, and what differs.

    Raises:
        InputError: names the key that has no equivalent.
    """
    given = {key: typed(key, value) for key, value in given.items()}
    found = Imported(given)
    _guards(found)
    _model(found)
    _batch(found)
    _objective(found)
    _teacher(found)
    for key, path in RENAMED.items():
        if found.get(key) is not None:
            found.put(path, given[key])
    _rest(found)
    mapping = {key: value for key, value in found.made.items() if key != "extends"}
    configuration.validate(RunConfig, configuration.merge(configuration.load_mapping("simpletuner"), mapping))
    return found.made, found.notes


def _guards(found: Imported) -> None:
    """Refuse what contradicts TwinFlow, and twinflow options that nobody here knows."""
    for key, value in found.given.items():
        if key.startswith("twinflow_") and key not in READ | set(RENAMED):
            raise InputError(f"{key} has no equivalent here", fix="remove the key, or describe what it should do")
        harmless = _off(value) or (key == "prediction_type" and _is_bridged_or_flow(found, value))
        if not harmless and (reason := foreign.reason(key)):
            raise InputError(f"{key} cannot be combined with TwinFlow: {reason}", got=value, fix="remove the key")
    if not found.get("twinflow_enabled", False):
        raise InputError("twinflow_enabled is not true", fix="only TwinFlow configurations can be imported")


def _off(value: object) -> bool:
    """Whether an option of any kind is switched off, however that is spelled."""
    spelled = str(value).strip().lower()
    try:
        return not value or spelled in UNSET or not SPELLED.get(spelled, True) or float(spelled) == 0
    except ValueError:
        return False


def _is_bridged_or_flow(found: Imported, prediction: object) -> bool:
    return prediction == "flow_matching" or (prediction in PREDICTIONS and _bridged(found))


def _bridged(found: Imported) -> bool:
    """Whether both switches of Diff2Flow are on. Raises InputError where one is."""
    switches = {key: bool(found.get(key, False)) for key in ("diff2flow_enabled", "twinflow_allow_diff2flow")}
    if len(set(switches.values())) > 1:
        raise InputError(
            "diff2flow_enabled and twinflow_allow_diff2flow go together", got=switches, fix="set both or none to true"
        )
    return all(switches.values())


def _model(found: Imported) -> None:
    named, path = found.get("model_family"), found.get("pretrained_model_name_or_path")
    family = FAMILY_NAMES.get(named, named)
    if family not in FAMILIES:
        known = sorted({*FAMILIES, *FAMILY_NAMES} - set(FAMILY_NAMES.values()))
        raise InputError("model_family is not supported", got=named, expected=f"one of {', '.join(known)}")
    if path is None:
        raise InputError("pretrained_model_name_or_path is missing", expected="a diffusers folder or hub name")
    found.put("model", {"family": family, "path": path, "frozen_dtype": "bf16"})
    _prediction(found, family)
    found.put("data", {"source": "folder"})
    found.notes.append(
        f"data: `twinrl data prepare IMAGES --model {path} --dtype bf16` takes the place of the data backends; "
        "then set data.root"
    )
    kind = found.get("model_type", "full")
    if kind not in ("lora", "full"):
        raise InputError("model_type is not supported", got=kind, expected="lora or full")
    if kind == "lora":
        rank = found.get("lora_rank", LORA_RANK)
        lora = {"rank": rank, "alpha": found.get("lora_alpha", rank), "dropout": found.get("lora_dropout", 0.0)}
        found.put("model", {"lora": lora, "dtype": "bf16"})
        found.notes.append(
            f"adapters: rank {rank} on the family's own layers, kept in float32; the second time and the sign train too"
        )
        if (adapters := found.get("lora_type", "standard").lower()) != "standard":
            found.notes.append(f"adapters: lora_type {adapters} becomes a plain LoRA; its own settings are left out")


def _prediction(found: Imported, family: str) -> None:
    """Both switches of a diffusion model, under our names. Raises InputError where the file has one that is none."""
    bridged = _bridged(found)
    if family in DIFFUSION_FAMILIES and not bridged:
        raise InputError(
            f"{found.get('model_family')} is a diffusion model and TwinFlow trains flows",
            fix="set diff2flow_enabled and twinflow_allow_diff2flow to true",
        )
    given = found.get("prediction_type", PREDICTED.get(found.get("model_family"), "epsilon"))
    prediction = PREDICTIONS.get(given) if bridged else None
    check_bridge(family, prediction, bridged)
    if bridged:
        found.put("model", {"prediction": prediction, "diff2flow": True})
        found.notes.append(
            f"prediction: {prediction}, which must be what the pipeline's scheduler says; "
            "here teachers see noise levels of the diffusion model's own schedule (docs/models.md)"
        )


def _batch(found: Imported) -> None:
    rows, times = found.get("train_batch_size", 1), found.get("gradient_accumulation_steps", 1)
    found.put("train", {"batch": rows * times, "micro_batch": rows})
    precision = found.get("mixed_precision", "no")
    known = {"bf16": "bf16", "no": "float32"}
    if precision not in known:
        raise InputError("mixed_precision is not supported", got=precision, expected="bf16 or no")
    found.put("train.precision", known[precision])
    found.notes.append(f"batch: {rows * times} rows a step over all processes, in micro-batches of {rows}")
    schedule = found.get("lr_scheduler", "constant")
    if schedule == "cosine":
        found.put("lr_policy", {"kind": "cosine"})
    elif schedule != "constant":
        found.notes.append(f"lr_scheduler {schedule}: the learning rate is constant here; see lr_policy")


def _objective(found: Imported) -> None:
    steps = {found.get("twinflow_target_step_count", 1)}
    if found.get("validation_num_inference_steps") is not None:
        steps.add(found.get("validation_num_inference_steps"))
    found.put("evaluation", {"nfe": sorted(steps), "n": 64, "batch": 4, "grid_samples": 4})
    found.notes.append(
        "base: has SimpleTuner's biased fixed point (R = F − S − v*); terms.base={kind: base} is without it"
    )
    found.notes.append("time: the network is told the sign of t and never r, as there; model.target_time=true tells it")
    if found.get("twinflow_adversarial_enabled", False):
        for term, key in (("adversarial", "twinflow_adversarial_weight"), ("rectify", "twinflow_rectify_weight")):
            found.put(f"terms.{term}.weight", found.get(key, 1.0))
    else:
        found.made["terms"] = {**found.made.get("terms", {}), "adversarial": None, "rectify": None}
        found.notes.append("terms: no adversarial and rectify, since twinflow_adversarial_enabled is off")


def _teacher(found: Imported) -> None:
    if found.get("use_ema", False):
        if found.get("ema_decay") is None:
            found.notes.append("teacher: ema_decay is not in the file; here 0.99, which the paper often uses")
        return
    waived = not found.get("twinflow_require_ema", True) or found.get("twinflow_allow_no_ema_teacher", False)
    if not waived:
        raise InputError("use_ema is off and twinflow_require_ema is on", fix="set use_ema to true")
    found.put("teacher", {"kind": "live", "allow_live": True})
    found.notes.append("teacher: the live student, which is known to collapse training")


def _rest(found: Imported) -> None:
    known = READ | set(RENAMED)
    left = [key for key, value in found.given.items() if key not in known and value is not None]
    left = [key for key in left if not foreign.reason(key)]
    if left:
        found.notes.append(f"left out: {', '.join(sorted(left))}")
