"""Sizes, the choice of a bucket, crops, batch sizes and the split."""

import math

import pytest

from twinrl.config import validate
from twinrl.config.errors import InputError
from twinrl.data.buckets import SIZES, Bucket, BucketsConfig, fit, parse_ratio
from twinrl.data.identity import uniform, validation_place
from twinrl.data.problems import NO_BUCKET, TOO_SMALL, UnusableError


def config(**changes: object) -> BucketsConfig:
    return validate(BucketsConfig, changes)


@pytest.mark.parametrize("multiple", [16, 32, 64])
@pytest.mark.parametrize("area", [512**2, 1024**2, 1328**2])
def test_sizes_meet_ratio_and_area_in_multiples(multiple: int, area: int) -> None:
    settings = config(area=area, multiple=multiple)
    for ratio, bucket in zip(settings.ratios, settings.buckets(), strict=True):
        assert bucket.width % multiple == bucket.height % multiple == 0
        step = 1.1 * multiple / min(bucket.width, bucket.height)  # about what one multiple is worth
        assert abs(math.log(bucket.ratio / parse_ratio(ratio))) <= step
        assert abs(math.log(bucket.pixels / area)) <= step


def test_landscape_and_portrait_mirror_each_other() -> None:
    found = {(bucket.width, bucket.height) for bucket in config().buckets()}
    assert found == {(height, width) for width, height in found}


def test_qwen_sizes_are_multiples_of_16_with_their_stated_ratios() -> None:
    ratios = [1, 16 / 9, 9 / 16, 4 / 3, 3 / 4, 3 / 2, 2 / 3]
    buckets = config(sizes="qwen-image").buckets()
    assert len(buckets) == len(SIZES["qwen-image"]) == 7
    assert [bucket.ratio for bucket in buckets] == pytest.approx(ratios, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sizes": [[1472, 1140]]}, "1472x1140 is not a positive multiple of 16"),
        ({"sizes": "qwen"}, "unknown preset 'qwen'"),
        ({"ratios": [969]}, "quotes"),  # what YAML makes of 16:9
        ({"ratios": ["1:0"]}, "is not a ratio"),
        ({"ratios": ["1:1", "1.05"], "area": 64**2}, "two buckets have the size 64x64"),
        ({"tolerence": 0.2}, "did you mean tolerance"),
    ],
)
def test_wrong_settings_are_explained(changes: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        config(**changes)


def place(width: int, height: int, **changes: object) -> tuple[str, tuple[float, ...]]:
    found = fit(config(**{"area": 64**2, "ratios": ["1:1", "2:1", "1:2"], "multiple": 2} | changes), width, height, "x")
    return found.bucket.name, found.box


def test_the_closest_bucket_is_the_one_that_keeps_most() -> None:
    for width in range(100, 400, 7):
        settings = config(area=64**2, ratios=["1:1", "2:1", "1:2"], multiple=2)
        found = fit(settings, width, 150, "x")
        kept = {b: min(width, 150 * b.ratio) * min(150, width / b.ratio) for b in settings.buckets()}
        assert kept[found.bucket] == pytest.approx(max(kept.values()))


def test_a_crop_has_the_buckets_ratio_and_lies_inside() -> None:
    name, (left, top, right, bottom) = place(270, 200)
    assert (name, top, bottom) == ("64x64", 0, 200)
    assert (left, right) == (35, 235)


@pytest.mark.parametrize("size", [(400, 150), (300, 170), (150, 400), (210, 200)])
def test_a_crop_is_the_largest_of_its_buckets_ratio(size: tuple[int, int]) -> None:
    found = fit(config(area=64**2, ratios=["1:1", "2:1", "1:2"], multiple=2), *size, "x")
    left, top, right, bottom = found.box
    assert (right - left) / (bottom - top) == pytest.approx(found.bucket.ratio)
    assert (left, right) == (0, size[0]) or (top, bottom) == (0, size[1])
    assert min(left, top, size[0] - right, size[1] - bottom) >= 0


def test_outside_the_tolerance() -> None:
    assert place(130, 100, outside="skip", tolerance=0.31)[0] == "64x64"
    with pytest.raises(UnusableError, match="30% off 64x64") as error:
        place(130, 100, outside="skip", tolerance=0.2)
    assert error.value.reason == NO_BUCKET
    assert place(130, 100, outside="closest", tolerance=0.2)[1] == (0, 0, 130, 100)  # stretched, nothing lost
    assert place(130, 100, outside="crop", tolerance=0.2)[1] == (15, 0, 115, 100)


def test_upscaling_is_bounded() -> None:
    assert place(64, 64, max_upscale=1.0)[0] == "64x64"
    assert place(52, 52)[0] == "64x64"
    with pytest.raises(UnusableError, match=r"enlarged 1\.28 times") as error:
        place(50, 50)
    assert error.value.reason == TOO_SMALL


def test_centre_weighted_crops_follow_the_triangular_law() -> None:
    settings = config(sizes=[[64, 64]], multiple=64, crop="centre_weighted")
    places = [fit(settings, 164, 64, f"image {i}").box[0] / 100 for i in range(4000)]
    assert 0 < min(places) < 0.05
    assert 0.95 < max(places) < 1
    within = sum(0.25 < p < 0.75 for p in places) / len(places)
    assert within == pytest.approx(0.75, abs=0.03)  # a uniform law has 0.5 there
    assert fit(settings, 164, 64, "image 7").box[0] / 100 == places[7]


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("rows", [1, 4, 16, 61])
def test_pixels_per_step_are_constant_to_half_a_step_of_the_batch(rows: int, multiple: int) -> None:
    wanted = rows * 1328**2
    for bucket in config(sizes="qwen-image").buckets():
        batch = bucket.batch_rows(wanted, multiple)
        assert batch % multiple == 0
        off = abs(batch * bucket.pixels - wanted)
        assert off <= multiple * bucket.pixels / 2 or batch == multiple


def test_smaller_buckets_have_larger_batches() -> None:
    assert Bucket(32, 32).batch_rows(8 * 64 * 64) == 32


def test_the_split_takes_its_share_and_is_independent_of_the_crop() -> None:
    names = [f"image {i}" for i in range(5000)]
    validation = [name for name in names if validation_place(name) < 0.1]
    assert len(validation) / len(names) == pytest.approx(0.1, abs=0.015)
    assert sum(uniform(name, "crop a") for name in validation) / len(validation) == pytest.approx(0.5, abs=0.04)
    assert set(validation) < {name for name in names if validation_place(name) < 0.2}
