"""SimpleTuner's documented example, and what has no equivalent is refused by name."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from tests.disk import files_of_at_most
from twinrl.commands.import_simpletuner import (
    COUNTS,
    FLAGS,
    NUMBERS,
    READ,
    RENAMED,
    TEXTS,
    convert,
    import_simpletuner,
    read,
)
from twinrl.config.errors import InputError
from twinrl.training import schema

DOCUMENTED = {  # documentation/distillation/TWINFLOW.md, "Quick Config"
    "model_family": "sd3", "model_type": "lora",
    "pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-large", "output_dir": "output/sd3-twinflow",
    "distillation_method": None, "use_ema": True, "twinflow_enabled": True, "twinflow_target_step_count": 2,
    "twinflow_estimate_order": 2, "twinflow_enhanced_ratio": 0.5, "twinflow_delta_t": 0.01,
    "twinflow_target_clamp": 1.0, "learning_rate": 1e-4, "train_batch_size": 1, "gradient_accumulation_steps": 4,
    "mixed_precision": "bf16", "validation_guidance": 0.0, "validation_num_inference_steps": 2,
}  # fmt: skip

BRIDGED = {"diff2flow_enabled": True, "twinflow_allow_diff2flow": True}  # there, "for diffusion models"


def loaded(folder: Path, given: dict[str, Any]) -> schema.RunConfig:
    made, _ = convert(given)
    (folder / "made.yaml").write_text(yaml.safe_dump(made))
    return schema.load(str(folder / "made.yaml"))


def test_the_documented_example(tmp_path: Path) -> None:
    settings = loaded(tmp_path, DOCUMENTED)
    assert (settings.model.family, settings.model.path) == ("sd3", "stabilityai/stable-diffusion-3.5-large")
    assert settings.model.lora is not None
    assert settings.teacher.kind == "ema"
    assert (settings.train.batch, settings.train.micro_batch, settings.train.precision) == (4, 1, "bf16")
    assert settings.terms["base"].kind == "simpletuner_base"
    assert (settings.terms["base"].order, settings.terms["base"].delta, settings.terms["base"].clamp) == (2, 0.01, 1.0)
    assert sorted(settings.terms) == ["base", "flow_matching", "real_velocity"]
    assert (settings.guidance.strength, settings.guidance.range) == (0.5, None)
    assert (settings.optim.lr, settings.evaluation.nfe, settings.run.dir) == (1e-4, (2,), Path("output/sd3-twinflow"))
    assert not settings.model.target_time


def test_the_adversarial_terms_and_their_weights(tmp_path: Path) -> None:
    more = {"twinflow_adversarial_enabled": True, "twinflow_rectify_weight": 0.3, "max_grad_norm": 2, "seed": 5}
    settings = loaded(tmp_path, DOCUMENTED | more)
    assert (settings.terms["adversarial"].weight, settings.terms["rectify"].weight) == (1.0, 0.3)
    assert settings.gradients.total["clip"].max_norm == 2
    assert settings.seed == 5


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"model_family": "sd1x"}, "epsilon"),
        ({"model_family": "sd1x", "prediction_type": "epsilon"}, "epsilon"),
        ({"model_family": "sd2x"}, "v"),
        ({"model_family": "sd2x", "prediction_type": "epsilon"}, "epsilon"),
    ],
)
def test_diffusion_models_with_both_switches(tmp_path: Path, given: dict[str, Any], expected: str) -> None:
    model = loaded(tmp_path, DOCUMENTED | BRIDGED | given).model
    assert (model.family, model.prediction, model.diff2flow) == ("stable_diffusion", expected, True)


def test_families_under_its_names(tmp_path: Path) -> None:
    assert loaded(tmp_path, DOCUMENTED | {"model_family": "z-image"}).model.family == "z_image"


def test_values_are_taken_over(tmp_path: Path) -> None:
    changed = {
        "twinflow_estimate_order": 3,
        "twinflow_enhanced_ratio": 0.8,
        "twinflow_delta_t": 0.02,
        "ema_decay": 0.995,
    }
    settings = loaded(tmp_path, DOCUMENTED | changed | {"model_type": "full", "mixed_precision": "no"})
    assert (settings.terms["base"].order, settings.terms["base"].delta) == (3, 0.02)
    assert (settings.guidance.strength, settings.teacher.decay) == (0.8, 0.995)
    assert settings.model.lora is None
    assert settings.train.precision == "float32"


def test_values_are_what_they_spell(tmp_path: Path) -> None:
    plain = DOCUMENTED | {"ema_decay": 0.995, "gradient_checkpointing": False, "twinflow_adversarial_enabled": False}
    plain |= {"seed": 2**60 + 1, "validation_num_inference_steps": 4, "lora_alpha": None, "lora_rank": 8}
    spelled = {key: "none" if value is None else str(value) for key, value in plain.items()}
    assert convert(spelled)[0] == convert(plain)[0]
    assert loaded(tmp_path, spelled).seed == 2**60 + 1
    assert loaded(tmp_path, plain | {"train_batch_size": " 2 ", "lora_rank": 8.0, "use_ema": 1}).train.batch == 8
    assert loaded(tmp_path, plain | {"output_dir": "2023"}).run.dir == Path("2023")


def test_adapters_of_another_kind_are_said() -> None:
    _, notes = convert(DOCUMENTED | {"lora_type": "LyCORIS", "lycoris_config": "lycoris.json"})
    assert any("lycoris becomes a plain LoRA" in note for note in notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"twinflow_enabled": "false"}, "twinflow_enabled is not true"),
        ({"validation_guidance": "4.0"}, "validation_guidance cannot be combined"),
        ({"use_ema": "maybe"}, "use_ema is no value of its kind; got 'maybe'; expected true or false"),
        ({"train_batch_size": "2,222"}, "train_batch_size is no value of its kind; .* a whole number"),
        ({"train_batch_size": 2.5}, "train_batch_size is no value of its kind"),
        ({"train_batch_size": True}, "train_batch_size is no value of its kind"),
        ({"max_train_steps": "9" * 500}, "max_train_steps is no value of its kind"),
        ({"learning_rate": "1_0"}, "learning_rate is no value of its kind; .* a number"),
        ({"learning_rate": "nan"}, "learning_rate is no value of its kind"),
        ({"model_family": ["sd3"]}, r"model_family is no value of its kind; got \['sd3'\]; expected a text"),
        ({"twinflow_new_option": 1}, "twinflow_new_option has no equivalent"),
        ({"twinflow_enabled": False}, "twinflow_enabled is not true"),
        ({"distillation_method": "dmd"}, "distillation_method cannot be combined"),
        ({"scheduled_sampling_max_step_offset": 5}, "scheduled_sampling_max_step_offset cannot be combined"),
        ({"prediction_type": "epsilon"}, "prediction_type cannot be combined"),
        ({"validation_guidance": 4.0}, "validation_guidance cannot be combined"),
        ({"twinflow_allow_diff2flow": True}, "diff2flow_enabled and twinflow_allow_diff2flow go together"),
        (BRIDGED, "sd3 is a flow already"),
        ({"model_family": "sd1x"}, "sd1x is a diffusion model.*set diff2flow_enabled and twinflow_allow_diff2flow"),
        ({"model_family": "sd1x"} | BRIDGED | {"prediction_type": "sample"}, "prediction_type cannot be combined"),
        ({"use_ema": False}, "use_ema is off and twinflow_require_ema is on"),
        (
            {"model_family": "sdxl"},
            "model_family is not supported; got sdxl; expected one of flux, .* sd1x",
        ),
        ({"model_type": "controlnet"}, "model_type is not supported"),
        ({"twinflow_target_step_count": 8}, r"evaluation\.nfe.*1–4 steps"),
        ({"twinflow_target_clamp": 0.0}, r"terms\.base\.clamp.*greater than 0"),
        ({"mixed_precision": "fp16"}, "mixed_precision is not supported"),
    ],
)
def test_refusals_name_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert(DOCUMENTED | change)


def test_without_an_average_the_live_teacher_is_waived_by_name(tmp_path: Path) -> None:
    settings = loaded(tmp_path, DOCUMENTED | {"use_ema": False, "twinflow_allow_no_ema_teacher": True})
    assert (settings.teacher.kind, settings.teacher.allow_live) == ("live", True)


def test_the_command_writes_says_what_differs_and_leaves_files_alone(tmp_path: Path) -> None:
    source, out = tmp_path / "config.json", tmp_path / "out.yaml"
    source.write_text(json.dumps({f"--{key}": value for key, value in (DOCUMENTED | {"report_to": "wandb"}).items()}))
    console = Console(record=True, width=200, quiet=False, file=(tmp_path / "log").open("w"))
    assert import_simpletuner(source, out, console) == 0
    text = console.export_text()
    assert "left out: report_to" in text
    assert "data prepare" in text
    assert schema.load(str(out)).name == "out"
    with pytest.raises(InputError, match="exists"):
        import_simpletuner(source, out, console)
    odd = source.rename(tmp_path / "a\nb: \udce9.json")
    assert import_simpletuner(odd, tmp_path / "odd.yaml", console) == 0
    assert yaml.safe_load((tmp_path / "odd.yaml").read_text()) == yaml.safe_load(out.read_text())
    for name in ("nowhere/out.yaml", "x" * 300):
        with pytest.raises(InputError, match="cannot be written"):
            import_simpletuner(odd, tmp_path / name, console)
    source.write_text(json.dumps({"--seed": 1, "seed": 2}))
    with pytest.raises(InputError, match="has a key twice"):
        read(source)
    source.write_bytes(json.dumps(DOCUMENTED).encode("utf-16"))
    assert read(source) == DOCUMENTED
    source.write_text('{"output_dir": "café"}', encoding="latin-1")
    with pytest.raises(InputError, match="cannot be read as JSON; got not UTF-8: byte 19 is 0xe9"):
        read(source)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match=r"pipe\.json cannot be read as JSON; got .*Is no file"):
        read(tmp_path / "pipe.json")


def test_a_disk_without_room_leaves_nothing_behind(tmp_path: Path) -> None:
    source, out = tmp_path / "config.json", tmp_path / "new" / "out.yaml"
    source.write_text(json.dumps(DOCUMENTED))
    out.parent.mkdir()
    with files_of_at_most(60), pytest.raises(InputError, match=r"out\.yaml cannot be written; got File too large; fix"):
        import_simpletuner(source, out, Console(quiet=True))
    assert list(out.parent.iterdir()) == []
    assert import_simpletuner(source, out, Console(quiet=True)) == 0


def test_no_key_is_both_renamed_and_read() -> None:
    assert not READ & set(RENAMED)
    kinds = [FLAGS, COUNTS, NUMBERS, TEXTS]
    assert set().union(*kinds) == READ | set(RENAMED)
    assert sum(map(len, kinds)) == len(READ | set(RENAMED))
