"""SimpleTuner's guards, each refused by name."""

import pytest

from twinrl.config import foreign
from twinrl.config.errors import InputError
from twinrl.training import schema


@pytest.mark.parametrize(
    "key",
    [
        "distillation_method=dmd",
        "train.distillation_method=lcm",
        "scheduled_sampling_max_step_offset=5",
        "model.prediction_type=epsilon",
        "validation_guidance=4",
    ],
)
def test_keys_that_contradict_twinflow_are_refused_by_name_with_the_reason(key: str) -> None:
    with pytest.raises(InputError, match=rf"{key.split('=')[0]} cannot be combined with TwinFlow: .+; fix: remove"):
        schema.load("simpletuner", [key])


def test_every_refusal_has_a_reason() -> None:
    assert all(len(reason) > 20 for reason in foreign.REFUSED_KEYS.values())


def test_simpletuner_is_validated_at_one_to_four_steps() -> None:
    assert schema.load("simpletuner", ["evaluation.nfe=[1, 4]"]).evaluation.nfe == (1, 4)
    with pytest.raises(InputError, match=r"evaluation\.nfe.*1–4 steps, got \[8\]"):
        schema.load("simpletuner", ["evaluation.nfe=[8]"])
    assert schema.load("twinflow", ["evaluation.nfe=[8]"]).evaluation.nfe == (8,)


def test_a_live_teacher_needs_the_waiver_by_name() -> None:
    with pytest.raises(InputError, match=r"teacher\.allow_live=true"):
        schema.load("simpletuner", ["teacher.kind=live"])
    assert schema.load("simpletuner", ["teacher.kind=live", "teacher.allow_live=true"]).teacher.kind == "live"
