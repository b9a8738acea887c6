"""Image folders for real models: captions, aspect buckets, a latent cache, and batches of one bucket each.

``prepare`` turns a folder into a cache (``twinrl data prepare``); ``CachedDataset`` reads it; its ``sampler`` says
which rows a step sees.
"""

from twinrl.data.folders.buckets import Bucket, BucketsConfig
from twinrl.data.folders.encode import Encoder
from twinrl.data.folders.prepare import prepare
from twinrl.data.folders.sampler import BucketBatch, BucketSampler
from twinrl.data.folders.settings import PrepareConfig
from twinrl.data.folders.source import CachedDataset

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
