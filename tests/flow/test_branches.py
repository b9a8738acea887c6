"""Branches: exact shares, time rules, and rows that stay themselves however the batch is cut."""

import random
from fractions import Fraction

import pytest
import torch

from twinrl.config.errors import InputError
from twinrl.flow import draws
from twinrl.flow.branches import BRANCHES, Batch, BatchDraws, Rows, TimeLaw, allocate, divide

FOUR = {"e2e": 1.0, "mul": 1.0, "any": 1.0, "adv": 1.0}


def exact_allocation(mix: dict[str, float], batch: int) -> dict[str, int]:
    """Largest remainder in rational arithmetic on the decimals as written; ties go to the earlier branch."""
    shares = {name: Fraction(str(share)) for name, share in mix.items()}
    quotas = {name: batch * share / sum(shares.values()) for name, share in shares.items()}
    rows = {name: quota.numerator // quota.denominator for name, quota in quotas.items()}
    for _ in range(batch - sum(rows.values())):
        name = max(quotas, key=lambda n: (quotas[n] - rows[n], -list(quotas).index(n)))
        rows[name] += 1
    return rows


def random_mixes(n: int) -> list[tuple[dict[str, float], int]]:
    choose = random.Random(0)
    mixes = []
    for _ in range(n):
        names = choose.sample(list(BRANCHES), choose.randint(1, 4))
        scale = choose.choice([1, 10, 100])
        mix = {name: choose.randint(0, 15) / scale for name in names}
        mixes.append((mix | {names[0]: choose.randint(1, 15) / scale}, choose.randint(1, 40)))
    return mixes


def test_largest_remainder_is_exact_or_refused() -> None:
    """3000 mixes: all rows given away, each quota met to less than a row, and no branch silently empty."""
    refused = 0
    for mix, batch in random_mixes(3000):
        expected = exact_allocation(mix, batch)
        if any(share > 0 and expected[name] == 0 for name, share in mix.items()):
            refused += 1
            with pytest.raises(InputError, match="too small for the mix"):
                allocate(mix, batch)
            continue
        rows = allocate(mix, batch)
        assert rows == expected, (mix, batch)
        assert sum(rows.values()) == batch
        assert all(abs(rows[n] - batch * share / sum(mix.values())) < 1 for n, share in mix.items())
        assert all(rows[n] == 0 for n, share in mix.items() if share == 0)
    assert 100 < refused < 2900


@pytest.mark.parametrize(
    ("mix", "batch", "rows"),
    [
        (FOUR, 6, [2, 2, 1, 1]),  # rounding each of the first three to 2 leaves adv empty
        (FOUR, 8, [2, 2, 2, 2]),
        (FOUR, 4, [1, 1, 1, 1]),
        (dict.fromkeys(FOUR, 0.3), 7, [2, 2, 2, 1]),
        (dict(zip(FOUR, (3, 3, 3, 1), strict=True)), 8, [3, 2, 2, 1]),  # 2.4 ×3 and 0.8: rounding up leaves −1
        (dict(zip(FOUR, (1, 1, 1, 0), strict=True)), 8, [3, 3, 2, 0]),
        ({"e2e": 1, "mul": 4, "any": 10}, 5, [1, 1, 3]),  # equal remainders of ⅓: the earlier branch
    ],
)
def test_known_allocations(mix: dict[str, float], batch: int, rows: list[int]) -> None:
    assert list(allocate(mix, batch).values()) == rows


def test_too_small_a_batch_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"branch adv gets no row; got 3 rows for e2e=1.*raise train\.batch"):
        allocate(FOUR, 3)


# --- times ------------------------------------------------------------------------------------------------


def make(
    mix: dict[str, float] | None = None, n: int = 16, law: TimeLaw | None = None, seed: int = 0, step: int = 5
) -> Batch:
    """A global batch whose data and conditions say which row they are."""
    x = torch.arange(float(n)).view(n, 1, 1, 1).expand(n, 2, 3, 3)
    c, null = {"c": torch.arange(n)}, {"c": -torch.arange(n)}
    return divide(mix or FOUR, law or TimeLaw(), x, c, null, BatchDraws(seed, step, (n, 2, 3, 3)))


@pytest.mark.parametrize("ratio", [0.0, 0.02, 0.4, 1.0])
def test_time_rules(ratio: float) -> None:
    """Each branch against its rule, from the keyed uniforms themselves."""
    batch = make(dict.fromkeys(BRANCHES, 1.0), 64, TimeLaw(consistency_ratio=ratio))
    rows, t = batch.rows, draws.uniform((64,), 0, "t", 5)
    u = {name: draws.uniform((64,), 0, f"r {name}", 5) for name in BRANCHES}
    e2e, mul, any_, one, adv = (batch.branch[name] for name in BRANCHES)
    assert torch.equal(torch.cat([e2e, mul, any_, one, adv]), torch.arange(64))
    assert (rows.t[e2e] == 1).all()
    assert (rows.r[e2e] == 0).all()
    for at in (mul, any_, one, adv):
        assert torch.equal(rows.t[at], t[at])
    torch.testing.assert_close(rows.r[mul], t[mul] * (1 - u["mul"][mul] * min(0.05, ratio)))
    torch.testing.assert_close(rows.r[any_], t[any_] * (1 - u["any"][any_] * ratio))
    assert (rows.r[one] == 0).all()
    assert torch.equal(rows.r[adv], t[adv])
    assert ((rows.r >= 0) & (rows.r <= rows.t)).all()


@pytest.mark.parametrize(
    ("data", "times"), [(torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16, torch.float32)]
)
def test_times_have_the_precision_of_the_data_but_never_less_than_float32(
    data: torch.dtype, times: torch.dtype
) -> None:
    x = torch.zeros(8, 2, 3, 3, dtype=data)
    rows = divide(FOUR, TimeLaw(alpha=4), x, {}, {}, BatchDraws(0, 0, (8, 2, 3, 3))).rows
    assert (rows.t.dtype, rows.r.dtype, rows.z.dtype) == (times, times, data)
    assert rows.uniform("renoise time").dtype == times


def test_time_law() -> None:
    u = torch.linspace(0, 0.999, 50).double()
    torch.testing.assert_close(TimeLaw(alpha=4, scale=0.8).source_time(u), 0.8 * u**0.25)


def test_times_of_a_row_do_not_depend_on_the_other_branches() -> None:
    """Arms of a study with other mixes stay paired: a row's t, noise and uniform are its own."""
    four, alone = make(), make({"any": 1.0})
    at = four.branch["any"]
    assert torch.equal(four.rows.t[at], alone.rows.t[at])
    assert torch.equal(four.rows.r[at], alone.rows.r[at])
    assert torch.equal(four.rows.z, alone.rows.z)


def test_draws_depend_on_seed_step_and_purpose() -> None:
    rows = make().rows
    for other in (make(seed=1).rows, make(step=6).rows):
        assert not torch.equal(rows.z, other.z)
        assert not torch.equal(rows.normal("renoise noise"), other.normal("renoise noise"))
    purposes = ["noise", "renoise noise", "fake sample"]
    numbers = torch.stack([rows.normal(p).flatten() for p in purposes] + [rows.z.flatten()])
    assert torch.equal(numbers[0], numbers[3])  # "noise" is what z was made from
    assert (torch.corrcoef(numbers[:3]) - torch.eye(3)).abs().max() < 0.3  # 288 numbers each: five standard errors
    assert not torch.equal(rows.uniform("renoise time"), rows.uniform("fake time"))


# --- cutting ------------------------------------------------------------------------------------------------


def assert_same_rows(part: Rows, whole: Rows) -> None:
    """Every field of ``part`` is that of the rows of ``whole`` with the same index."""
    at = part.index
    for name in ("index", "x", "z", "t", "r", "x_t", "v"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[at]), name
    assert torch.equal(part.c["c"], whole.c["c"][at])
    assert torch.equal(part.null["c"], whole.null["c"][at])
    assert torch.equal(part.normal("renoise noise"), whole.normal("renoise noise")[at])
    assert torch.equal(part.uniform("renoise time"), whole.uniform("renoise time")[at])
    assert part.global_batch == whole.global_batch == len(whole)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 13, 16, 99])
def test_chunks_are_the_batch_again(size: int) -> None:
    batch = make(dict(zip(FOUR, (3, 1, 2, 1), strict=True)))
    chunks = batch.chunks(size)
    assert all(len(chunk.rows) <= size for chunk in chunks)
    assert torch.equal(torch.cat([chunk.rows.index for chunk in chunks]), batch.rows.index)
    for chunk in chunks:
        assert_same_rows(chunk.rows, batch.rows)
        assert set(chunk.branch) == set(batch.branch)
    for name, at in batch.branch.items():
        parts = [chunk.rows.index[chunk.branch[name]] for chunk in chunks]
        assert torch.equal(torch.cat(parts), batch.rows.index[at]), name


def test_on_joins_branches_in_the_order_of_the_batch() -> None:
    batch = make()
    rows = batch.on(("adv", "e2e"))
    assert torch.equal(rows.index, torch.cat([batch.branch["e2e"], batch.branch["adv"]]))
    assert_same_rows(rows, batch.rows)


def test_on_a_chunk_keeps_global_positions() -> None:
    batch = make()
    parts = [chunk.on(("mul", "adv")) for chunk in batch.chunks(5)]
    assert torch.equal(torch.cat([p.index for p in parts]), batch.on(("mul", "adv")).index)
    for part in parts:
        assert_same_rows(part, batch.rows)


def test_select_by_positions_and_by_mask() -> None:
    rows = make().rows
    odd = rows.select(rows.index % 2 == 1)
    assert torch.equal(odd.index, torch.arange(1, 16, 2))
    again = odd.select(torch.tensor([0, 3]))
    assert again.index.tolist() == [1, 7]
    assert_same_rows(again, rows)
