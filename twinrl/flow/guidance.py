"""Guidance in the target: the student learns the guided velocity, so sampling needs no guidance.

    v* = v + w·(F̄(x_t,t,t,c) − F̄(x_t,t,t,∅))         lo < t < hi, strictly; v* = v = z − x elsewhere
    v* = F̄(∅) + w·(F̄(c) − F̄(∅))                      image-free: there is no data velocity to start from

(TwinFlow, arXiv:2512.05150; the strict limits leave rows at t = 1 unenhanced.)
"""

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from twinrl.config import Settings
from twinrl.flow.branches import Rows
from twinrl.flow.conditions import Network
from twinrl.flow.transport import like


class GuidanceConfig(Settings):
    """How classifier-free guidance enters the target velocity."""

    strength: float = Field(0.5, ge=0, allow_inf_nan=False, description="w; 0 leaves the path's velocity")
    range: tuple[float, float] | None = Field(
        (0.0, 1.0), description="rows with lo < t < hi (strictly) are enhanced; null = all rows"
    )
    form: Literal["data", "teacher"] = Field(
        "data", description="start from the data velocity z − x, or from the teacher's F̄(∅) (image-free)"
    )
    empty: Literal["source", "permuted"] = Field(
        "source",
        description="∅: the source's empty condition, or the batch's conditions in random order (MNIST tutorial)",
    )

    @model_validator(mode="after")
    def _ordered(self) -> "GuidanceConfig":
        if self.range is not None and self.range[0] >= self.range[1]:
            raise ValueError(f"range {self.range} is empty; expected lo < hi")
        return self


def enhanced_velocity(rows: Rows, config: GuidanceConfig, teacher: Network) -> Tensor:
    """v* of the rows (B, C, H, W); two teacher passes unless ``w`` = 0 in the data form."""
    v = rows.v
    if config.strength == 0 and config.form == "data":
        return v
    x_t = rows.x_t
    conditional = teacher(x_t, rows.t, rows.t, rows.c)
    empty = teacher(x_t, rows.t, rows.t, rows.null)
    start = v if config.form == "data" else empty
    enhanced = start + config.strength * (conditional - empty)
    if config.range is None:
        return enhanced
    low, high = config.range
    return enhanced.where(like((rows.t > low) & (rows.t < high), v), v)
