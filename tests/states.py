"""The state of a run that has done nothing, for checkpoints of a few made-up tensors."""

from typing import Any

STATE: dict[str, Any] = {
    "step": 0, "iteration": 0, "attempt": 0, "event_count": 0, "log_offset": 0, "events_offset": 0,
    "teacher_decay": 0.0, "lr_policy": {}, "early_stop": {}, "gradients": {}, "monitor": {}, "reward": {},
    "content_hash": "", "config": {}, "parts": [],
}  # fmt: skip
