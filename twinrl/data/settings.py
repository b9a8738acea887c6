"""How a folder becomes a cache: the settings of ``twinrl data prepare``."""

from collections.abc import Callable
from typing import TypeAlias

from pydantic import Field

from twinrl.config import Settings
from twinrl.data.buckets import BucketsConfig
from twinrl.data.captions import ReadConfig

PrepareProgress: TypeAlias = Callable[[str, int, int | None], None]
"""Told (stage, done, total or None) while preparing; stages: verify, images, prompts."""


class PrepareConfig(Settings):
    """How a folder becomes a cache."""

    read: ReadConfig = ReadConfig()
    buckets: BucketsConfig = BucketsConfig()
    validation: float = Field(0.1, ge=0, lt=1, description="share of the validation split, drawn by image content")
    batch: int = Field(4, ge=1, description="images per call of the encoder")
    prompt_batch: int = Field(32, ge=1, description="prompts per call of the encoder")
    shard: int = Field(128, ge=1, description="records per shard: what a kill may lose")
    workers: int = Field(4, ge=1, description="threads that read and decode images")
