"""Image folders for real models: captions, aspect buckets, a latent cache, and batches of one bucket each.

``prepare`` turns a folder into a cache (``twinrl data prepare``); ``CachedDataset`` reads it; its ``sampler`` says
which rows a step sees.
"""

from twinrl.data.buckets import Bucket, BucketsConfig
from twinrl.data.dataset import CachedDataset
from twinrl.data.encode import Encoder
from twinrl.data.order import BucketBatch, BucketSampler
from twinrl.data.prepare import prepare
from twinrl.data.settings import PrepareConfig

__all__ = [
    "Bucket",
    "BucketBatch",
    "BucketSampler",
    "BucketsConfig",
    "CachedDataset",
    "Encoder",
    "PrepareConfig",
    "prepare",
]
