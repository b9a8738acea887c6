"""The bucket sampler: one bucket a step, fair passes, a function of (seed, step) alone."""

from collections import Counter

import pytest
import torch

from twinrl.config.errors import InputError
from twinrl.data.buckets import Bucket
from twinrl.data.order import BucketBatch, BucketSampler


def sampler(sizes: dict[str, int], batch: dict[str, int], seed: int = 0) -> BucketSampler:
    """Buckets of these sizes; row numbers are shuffled over them."""
    numbers = torch.randperm(sum(sizes.values()), generator=torch.Generator().manual_seed(1))
    return BucketSampler(dict(zip(sizes, numbers.split(list(sizes.values())), strict=True)), batch, seed)


UNEVEN = sampler({"square": 53, "wide": 17, "tall": 3, "none": 0}, {"square": 8, "wide": 6, "tall": 4, "none": 8})
EVEN = sampler({"square": 40, "wide": 18, "tall": 8}, {"square": 8, "wide": 6, "tall": 4})


def batches(of: BucketSampler, steps: int) -> list[BucketBatch]:
    return [of.batch(step) for step in range(steps)]


@pytest.mark.parametrize("of", [UNEVEN, EVEN])
def test_a_batch_is_full_and_of_one_bucket(of: BucketSampler) -> None:
    for bucket, rows in batches(of, 60):
        assert len(rows) == of.batch_size[bucket]
        assert set(rows.tolist()) <= set(of.members[bucket].tolist())


def test_an_epoch_is_one_pass_where_batches_divide_the_buckets() -> None:
    assert EVEN.steps_before(1) == 5 + 3 + 2
    for epoch in range(4):
        seen = torch.cat([EVEN.batch(step).rows for step in range(epoch * 10, epoch * 10 + 10)])
        assert sorted(seen.tolist()) == list(range(66))


def test_no_row_is_seen_again_before_its_bucket_was_seen() -> None:
    seen: dict[str, list[int]] = {}
    for bucket, rows in batches(UNEVEN, 200):
        seen.setdefault(bucket, []).extend(rows.tolist())
    for bucket, rows in seen.items():
        n = len(UNEVEN.members[bucket])
        for start in range(0, len(rows) - n + 1, n):
            assert sorted(rows[start : start + n]) == sorted(UNEVEN.members[bucket].tolist())


@pytest.mark.parametrize("epochs", [1, 2, 7, 30])
def test_buckets_stay_in_proportion_to_their_rows(epochs: int) -> None:
    shown: Counter[str] = Counter()
    for bucket, rows in batches(UNEVEN, UNEVEN.steps_before(epochs)):
        shown[bucket] += len(rows)
    for bucket, members in UNEVEN.members.items():
        assert 0 <= epochs * len(members) - shown[bucket] < UNEVEN.batch_size[bucket]


def test_resuming_anywhere_and_in_any_order_gives_the_same_batches() -> None:
    straight = batches(UNEVEN, 60)
    for step in (59, 0, 31, 30, 7):
        fresh = sampler({"square": 53, "wide": 17, "tall": 3, "none": 0}, UNEVEN.batch_size | {"none": 8})
        bucket, rows = fresh.batch(step)
        assert bucket == straight[step].bucket
        assert torch.equal(rows, straight[step].rows)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_slice_one_global_batch(ranks: int) -> None:
    area = 64 * 64
    rows = {name: Bucket(*size).batch_rows(8 * area, 4) for name, size in {"a": (64, 64), "b": (32, 64)}.items()}
    for step in range(12):
        each = [sampler({"a": 40, "b": 50}, rows).batch(step) for _ in range(ranks)]
        assert len({batch.bucket for batch in each}) == 1
        slices = [batch.rows.chunk(ranks)[rank] for rank, batch in enumerate(each)]
        assert len({len(part) for part in slices}) == 1
        assert torch.equal(torch.cat(slices), sampler({"a": 40, "b": 50}, rows).batch(step).rows)


def test_seeds_differ_and_epochs_differ() -> None:
    other = sampler({"square": 40, "wide": 18, "tall": 8}, EVEN.batch_size, seed=1)
    assert [b.bucket for b in batches(EVEN, 10)] != [b.bucket for b in batches(other, 10)]
    first, second = (torch.cat([EVEN.batch(s).rows for s in range(a, a + 10)]) for a in (0, 10))
    assert not torch.equal(first, second)


def test_a_bucket_smaller_than_its_batch_waits_until_it_fills_one() -> None:
    tiny = sampler({"one": 1}, {"one": 8})
    assert tiny.steps_before(7) == 0
    assert tiny.batch(0).rows.tolist() == [0] * 8
    assert tiny.epoch(3) == 31
    mixed = sampler({"square": 64, "rare": 1}, {"square": 8, "rare": 8})
    shown = Counter(bucket for bucket, _ in batches(mixed, 65))
    assert shown == {"square": 64, "rare": 1}


def test_nothing_to_sample_is_explained() -> None:
    with pytest.raises(InputError, match="no bucket has an image"):
        sampler({"a": 0}, {"a": 4})
