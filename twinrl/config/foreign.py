"""Keys of other trainers that contradict TwinFlow: refused by name and with the reason, not as merely unknown.

The guards are SimpleTuner's own for its ``twinflow_*`` options. Two more hold without a key: an EMA teacher is
required unless waived by name (:class:`twinrl.flow.teacher.TeacherConfig`), and students are validated at guidance 0
and at 1–4 steps (:func:`check_steps`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from twinrl.config.errors import InputError

REFUSED_KEYS = {
    "distillation_method": "TwinFlow is the distillation here, two methods cannot train one student",
    "scheduled_sampling": "it replaces the inputs that TwinFlow's targets are built on",
    "prediction_type": "only flow-matching networks, which predict the velocity z − x, can be trained",
    "validation_guidance": "students are validated at guidance 0, their training target contains it",
}
MOST_STEPS = 4


def refuse(mapping: Mapping[str, Any], prefix: str = "") -> None:
    """Raises InputError where a configuration, at any depth, has a key that begins like one of ``REFUSED_KEYS``."""
    for key, value in mapping.items():
        if why := reason(str(key)):
            raise InputError(f"{prefix}{key} cannot be combined with TwinFlow: {why}", fix="remove the key")
        if isinstance(value, Mapping):
            refuse(value, f"{prefix}{key}.")


def reason(key: str) -> str | None:
    """Why a key is refused; None where it is not."""
    return next((why for name, why in REFUSED_KEYS.items() if key.startswith(name)), None)


def check_steps(nfe: Iterable[int]) -> None:
    """Raises ValueError where SimpleTuner's objective is to be validated at other than 1–4 steps."""
    if any(steps > MOST_STEPS for steps in nfe):
        raise ValueError(f"evaluation.nfe: the simpletuner objective is for 1–{MOST_STEPS} steps, got {list(nfe)}")
