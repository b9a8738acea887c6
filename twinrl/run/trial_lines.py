"""The lines of a study's ledger, as its readers may count on them. Imports neither torch nor pandas.

{"format": "twinrl-ledger/1", "config_hash": …, "seed": 0, "fingerprint": …, "status": "finished", "step": 800, …}
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from twinrl.run import runlog

LEDGER_FORMAT = "twinrl-ledger/1"


class _Failure(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    step: NonNegativeInt
    kind: str = ""
    after: float = 0.0
    recovered: bool = False


class _Line(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    format: Literal["twinrl-ledger/1"]
    config_hash: str
    seed: NonNegativeInt
    fingerprint: str
    status: Literal["finished", "stopped", "diverged", "pruned", "failed"]
    step: NonNegativeInt = 0
    message: str = ""
    metrics: dict[str, float] = {}
    diverged: _Failure | None = None
    seconds: float = Field(0.0, ge=0)
    where: dict[str, Any] = {}


def checked(line: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a line without its format, non-finite metrics as numbers.

    Raises:
        ValueError: it is no record of a trial; pydantic's, which names the entry.
    """
    content = dict(line)
    if isinstance(metrics := content.get("metrics"), dict):
        content["metrics"] = {name: runlog.decode(value) for name, value in metrics.items()}
    _Line.model_validate(content)
    del content["format"]
    return content
