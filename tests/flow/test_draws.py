"""Keyed randomness: a function of the key alone, with the distributions it promises."""

import pytest
import torch
from scipy import stats

from twinrl.flow import draws

SHAPES = [(4.0, 1.0), (4.0, 1.5), (1.0, 1.5), (0.5, 0.5), (2.0, 5.0)]


def test_same_key_same_numbers() -> None:
    assert torch.equal(draws.normal((3, 4), 1, "noise", 2), draws.normal((3, 4), 1, "noise", 2))
    assert torch.equal(draws.uniform((5,), 1, "t", 2), draws.uniform((5,), 1, "t", 2))


def test_streams_of_different_keys_are_independent() -> None:
    """All 24 streams of small seeds, purposes and steps: no shared number, no correlation above 4.5/√n."""
    n = 4000
    keys = [(seed, purpose, step) for seed in (0, 1) for purpose in ("t", "r", "noise") for step in (0, 1, 10, 11)]
    streams = torch.stack([draws.normal((n,), *key).double() for key in keys])
    correlation = torch.corrcoef(streams) - torch.eye(len(keys))
    assert correlation.abs().max() < 4.5 / n**0.5
    assert len(streams.flatten().unique()) > 0.99 * streams.numel()


def test_rows_have_streams_of_their_own() -> None:
    rows = draws.normal_rows((1000,), 0, "noise", 2, range(4))
    assert torch.equal(draws.normal_rows((1000,), 0, "noise", 2, [3, 1]), rows[[3, 1]])
    assert (torch.corrcoef(rows.double()) - torch.eye(4)).abs().max() < 4.5 / 1000**0.5


def test_keys_do_not_run_together() -> None:
    """(1, "1/a") and (11, "a") or a step glued to a purpose must not collide."""
    keys = [(1, "1/a", 0), (11, "a", 0), (1, "a", 10), (1, "a1", 0), (1, "a/1", 0), (1, "a", 1)]
    assert len({draws.generator(*key).initial_seed() for key in keys}) == len(keys)


def test_global_state_is_neither_read_nor_written() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = draws.normal((8,), 0, "noise"), draws.uniform((8,), 0, "t"), draws.shuffled_rows(9, 4, 0, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    second = draws.normal((8,), 0, "noise"), draws.uniform((8,), 0, "t"), draws.shuffled_rows(9, 4, 0, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_global_stream_is_seeded_as_torch_does() -> None:
    found = []
    for seed in (torch.manual_seed, draws.seed_global):
        torch.rand(3)
        seed(2**61 + 7)
        found.append(torch.rand(5))
    assert torch.equal(*found)


def test_default_device_and_dtype_change_nothing() -> None:
    expected = draws.normal((8,), 0, "noise"), draws.uniform((8,), 0, "t"), draws.shuffled_rows(9, 4, 0, 3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = draws.normal((8,), 0, "noise"), draws.uniform((8,), 0, "t"), draws.shuffled_rows(9, 4, 0, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, expected, strict=True):
        assert (a.device.type, a.dtype) == ("cpu", b.dtype)
        assert torch.equal(a, b)


def test_distributions() -> None:
    assert stats.kstest(draws.normal((20_000,), 0, "noise").numpy(), "norm").pvalue > 1e-3
    u = draws.uniform((20_000,), 0, "t")
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    assert u.min() >= 0
    assert u.max() < 1


@pytest.mark.parametrize(("alpha", "beta"), SHAPES)
def test_beta_has_its_distribution(alpha: float, beta: float) -> None:
    drawn = draws.beta(draws.uniform((20_000,), 0, "t"), alpha, beta)
    assert drawn.dtype == torch.float32
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert stats.kstest(drawn.numpy(), stats.beta(alpha, beta).cdf).pvalue > 1e-3
    assert stats.kstest(drawn.numpy(), stats.beta(alpha + 0.2, beta).cdf).pvalue < 1e-6  # the test has power


def test_uniform_beta_is_the_identity() -> None:
    u = draws.uniform((100,), 0, "t")
    assert torch.equal(draws.beta(u, 1, 1), u)
    torch.testing.assert_close(draws.beta(u.double(), 1, 1 + 1e-9), u.double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("alpha", "beta"), SHAPES)
def test_beta_arms_stay_paired(alpha: float, beta: float) -> None:
    """Strictly monotone in the uniform: arms of different shape order the rows alike, and closed forms hold."""
    u = draws.uniform((500,), 0, "t").double()
    drawn = draws.beta(u, alpha, beta)
    assert torch.equal(drawn.argsort(), u.argsort())
    torch.testing.assert_close(draws.beta(u, 4, 1), u**0.25, rtol=1e-10, atol=0)
    torch.testing.assert_close(draws.beta(u, 1, 1.5), 1 - (1 - u) ** (1 / 1.5), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("alpha", "beta"), [(0, 1), (1, 0), (-1, 2)])
def test_beta_refuses_impossible_shapes(alpha: float, beta: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        draws.beta(torch.rand(2), alpha, beta)


@pytest.mark.parametrize(("n", "batch"), [(10, 5), (10, 3), (7, 7), (7, 16), (5, 23), (1, 4)])
def test_every_row_once_per_epoch(n: int, batch: int) -> None:
    """Batches joined end to end are permutations joined end to end, wherever a batch straddles epochs."""
    steps = 3 * n
    joined = torch.cat([draws.shuffled_rows(n, batch, 0, step) for step in range(steps)])
    assert len(joined) == steps * batch
    for epoch in joined.view(-1, n):  # steps·batch is a multiple of n
        assert torch.equal(epoch.sort().values, torch.arange(n))


def test_epochs_seeds_and_purposes_are_shuffled_differently() -> None:
    orders = [
        draws.shuffled_rows(50, 50, 0, 0), draws.shuffled_rows(50, 50, 0, 1),
        draws.shuffled_rows(50, 50, 1, 0), draws.shuffled_rows(50, 50, 0, 0, "other"),
    ]  # fmt: skip
    assert all(not torch.equal(a, b) for i, a in enumerate(orders) for b in orders[:i])


def test_data_order_does_not_depend_on_the_batch_size() -> None:
    """The same stream of rows, cut differently."""
    by_four = torch.cat([draws.shuffled_rows(10, 4, 0, step) for step in range(15)])
    by_six = torch.cat([draws.shuffled_rows(10, 6, 0, step) for step in range(10)])
    assert torch.equal(by_four, by_six)
