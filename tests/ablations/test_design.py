"""Designs: sizes of the published tables, resolution from the defining relation, balance, orthogonality."""

from itertools import combinations, product

import numpy as np
import pytest

from ablations import design
from ablations.design import DESIGNS, Arms, Design, FractionalFactorial, Grid, OneFactorAtATime
from twinrl.config import Settings
from twinrl.config.errors import InputError

# runs of the smallest regular fraction: Box, Hunter and Hunter, Statistics for Experimenters, table 6.22 (≤ 11 factors)
SMALLEST = {
    (3, 3): 4, (5, 3): 8, (6, 3): 8, (7, 3): 8, (8, 3): 16, (11, 3): 16,
    (4, 4): 8, (6, 4): 16, (7, 4): 16, (8, 4): 16, (9, 4): 32, (10, 4): 32, (11, 4): 32,
    (5, 5): 16, (6, 5): 32, (7, 5): 64, (8, 5): 64, (9, 5): 128, (10, 5): 128, (11, 5): 128,
}  # fmt: skip


def two_levels(k: int) -> dict[str, tuple[str, ...]]:
    return {f"f{i}": ("low", "high") for i in range(k)}


@pytest.mark.parametrize(("k", "wanted"), SMALLEST)
def test_smallest_fraction_has_the_published_size_and_the_resolution(k: int, wanted: int) -> None:
    basis, words = design.smallest_fraction(k, wanted)
    assert 1 << basis == SMALLEST[k, wanted]
    assert len(words) == k - basis
    assert design.resolution(basis, words) >= wanted


@pytest.mark.parametrize(("k", "wanted"), [(7, 3), (8, 4), (8, 5), (11, 5)])
def test_effects_below_the_resolution_are_orthogonal(k: int, wanted: int) -> None:
    """At resolution R, p-factor and q-factor effects are orthogonal where p + q < R: the defining relation is right."""
    x = 1 - 2 * np.array(design.design_rows(*design.smallest_fraction(k, wanted)))
    assert (x.sum(0) == 0).all()
    for size in range(1, wanted):
        for columns in combinations(range(k), size):
            assert x[:, columns].prod(1).sum() == 0


def test_shortest_word_is_an_alias() -> None:
    basis, words = design.smallest_fraction(7, 4)
    x = 1 - 2 * np.array(design.design_rows(basis, words))
    word = design.defining_relation(basis, words)[0]
    columns = [i for i in range(7) if word >> i & 1]
    assert len(columns) == 4
    assert len(set(x[:, columns].prod(1))) == 1


def test_fraction_arms_start_at_all_first_levels_and_differ() -> None:
    arms = FractionalFactorial(FractionalFactorial.Config(resolution=4)).arms(two_levels(6))
    assert set(next(iter(arms.values())).values()) == {"low"}
    assert len({tuple(levels.values()) for levels in arms.values()}) == len(arms) == 16


@pytest.mark.parametrize(("factors", "wanted"), [(two_levels(3), 5), (two_levels(3) | {"g": ("a", "b", "c")}, 3)])
def test_impossible_fraction_is_refused(factors: dict[str, tuple[str, ...]], wanted: int) -> None:
    with pytest.raises(InputError, match="fraction"):
        FractionalFactorial(FractionalFactorial.Config(resolution=wanted)).arms(factors)


def test_grid_is_the_product() -> None:
    factors = {"a": ("0", "1"), "b": ("0", "1", "2")}
    arms = Grid(Grid.Config()).arms(factors)
    assert [tuple(levels.values()) for levels in arms.values()] == list(product(*factors.values()))


@pytest.mark.parametrize("start", ["first", "last", {"a": "1", "b": "2"}])
def test_one_factor_at_a_time_changes_one_factor(start: str | dict[str, str]) -> None:
    factors = {"a": ("0", "1"), "b": ("0", "1", "2")}
    arms = OneFactorAtATime(OneFactorAtATime.Config(start=start)).arms(factors)
    first, *others = arms.values()
    assert first == {"first": {"a": "0", "b": "0"}, "last": {"a": "1", "b": "2"}}.get(str(start), start)
    assert len(others) == 1 + 2
    assert all(sum(arm[f] != first[f] for f in factors) == 1 for arm in others)


def test_unknown_levels_are_refused() -> None:
    with pytest.raises(InputError, match="no level 7"):
        OneFactorAtATime(OneFactorAtATime.Config(start={"a": "7"})).arms({"a": ("0", "1")})
    with pytest.raises(InputError, match="no level x"):
        Arms(Arms.Config(arms={"mine": {"a": "x"}})).arms({"a": ("0", "1")})


# --- a design of one's own ------------------------------------------------------------------------------------


class Own(Design):
    class Config(Settings):
        kind: str

    def arms(self, factors):
        return SAYS["arms"]

    def describe(self, factors):
        return SAYS["describe"]


SAYS = {"arms": {"one": {"rate": "low"}}, "describe": "mine"}


@pytest.mark.parametrize(
    ("method", "says", "words"),
    [
        ("arms", None, "Own.arms returns None at "),
        ("arms", [{}], "Own.arms returns list at "),
        ("arms", {}, "Own.arms returns dict at .*at least one"),
        ("arms", {"one": "low"}, "Own.arms returns str 'low' at "),
        ("arms", {1: {"rate": "low"}}, "Own.arms returns dict at "),
        ("arms", {"one": {"rate": "no such"}}, "arm one of .*Own: factor rate has no level no such"),
        ("describe", 4, "Own.describe returns 4 at "),
    ],
)
def test_what_an_own_design_returns_is_checked(monkeypatch, method, says, words):
    kind, factors = f"{__name__}.Own", {"rate": ("low", "high")}
    design = DESIGNS.build(DESIGNS.find(kind).Config(kind=kind))
    assert getattr(design, method)(factors) == SAYS[method]
    monkeypatch.setitem(SAYS, method, says)
    with pytest.raises(InputError, match=words):
        getattr(design, method)(factors)
