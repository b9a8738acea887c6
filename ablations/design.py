"""Experimental designs: which combinations of factor levels a study runs.

A design turns factors (name → level names, in the study's order) into arms (name → {factor: level}). Every
design is a class with a nested ``Config``; ``DESIGNS`` names them, and a dotted path to a user's own class works.

*Two-level fractional factorials.* k factors in 2^b runs: the first b factors run through all combinations (bits),
and the level of each other factor is the XOR of a set of them, its *generator* (D = AB: d = a ⊕ b). A generator with
its factor is a *word* (ABD) that is constant over all runs, and so is every product of words: the *defining relation*.
Effects whose product is a word can't be told apart. The *resolution* is the length of the shortest word: III mixes
main effects with interactions of two factors, IV those interactions with each other, V neither
(Box, Hunter and Hunter, *Statistics for Experimenters*, ch. 6; tables of generators agree with :func:`generators`
in size). pyDOE3 (1.6) does not look at products of words: what it gives as resolution V for 7 factors or more is IV.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import combinations, product
from operator import xor
from typing import Any, ClassVar, Literal

from pydantic import Field

from twinrl.config import Settings, nearest
from twinrl.config.components import Registry, Returned, all_of, checked, wrong_return
from twinrl.config.errors import InputError

Factors = Mapping[str, Sequence[str]]
"""Factor → its levels' names, in order."""
ArmLevels = dict[str, dict[str, str]]
"""Arm → {factor: level}."""

ROMAN = {3: "III", 4: "IV", 5: "V"}
LETTERS = "ABCDEFGHJKLMNOPQRSTUVWXYZ"  # no I, which stands for the identity


def arm_name(levels: Mapping[str, str]) -> str:
    """``"lr=high teacher=ema"``: factors in their order; the arm without factors is ``base``."""
    return " ".join(f"{factor}={level}" for factor, level in levels.items()) or "base"


def _arms(value: Any, owner: Any, method: str, arguments: tuple[Any, ...]) -> None:
    """At least one arm, of known factors and levels and of keys."""
    all_of(dict, Mapping)(value, owner, method, arguments)
    if not value or not all(isinstance(key, str) for key in (*value, *(k for arm in value.values() for k in arm))):
        raise wrong_return(value, owner, method, "arm → {factor: level}, at least one")
    for name, chosen in value.items():
        levels = {factor: str(level) for factor, level in chosen.items() if factor in arguments[0]}
        check_levels(levels, arguments[0], f"arm {name} of {type(owner).__module__}.{type(owner).__qualname__}")


def _text(value: Any, owner: Any, method: str, arguments: tuple[Any, ...]) -> None:
    checked(value, str, owner, method)


class Design(ABC):
    """Which arms a study runs. Subclasses give ``Config``, :meth:`arms` and :meth:`describe`."""

    Config: ClassVar[type[Settings]] = Settings
    RETURNS: ClassVar[Mapping[str, Returned]] = {"arms": _arms, "describe": _text}

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def arms(self, factors: Factors) -> Mapping[str, Mapping[str, object]]:
        """Arm → {factor: level}, which may be mixed with {key.path: value}."""

    @abstractmethod
    def describe(self, factors: Factors) -> str:
        """One line for people."""


class Grid(Design):
    """Every combination of levels.

    *When to use*: two or three factors, or when interactions of any order are the question.
    """

    class Config(Settings):
        kind: Literal["grid"] = "grid"

    def arms(self, factors: Factors) -> ArmLevels:
        """The product of all levels, the last factor fastest."""
        combos = [dict(zip(factors, levels, strict=True)) for levels in product(*factors.values())]
        return {arm_name(levels): levels for levels in combos}

    def describe(self, factors: Factors) -> str:
        """One line for people."""
        return "every combination of " + " × ".join(f"{name} ({len(levels)})" for name, levels in factors.items())


class OneFactorAtATime(Design):
    """A starting arm and its neighbours: each differs from it in one factor.

    *When to use*: to ask "what does removing this one thing do", from either end: from the published settings, which
    single correction helps? From the corrected ones, which single return to the published setting hurts?
    """

    class Config(Settings):
        kind: Literal["one_factor_at_a_time"] = "one_factor_at_a_time"
        start: Literal["first", "last"] | dict[str, str] = Field(
            "first", description="the starting arm: first or last level of every factor, or a level per factor"
        )

    def arms(self, factors: Factors) -> ArmLevels:
        """The starting arm, then one arm for each other level of each factor."""
        start = self._start(factors)
        changes = [(f, level) for f, levels in factors.items() for level in levels if level != start[f]]
        return {"start": start} | {f"{f}={level}": start | {f: level} for f, level in changes}

    def _start(self, factors: Factors) -> dict[str, str]:
        start = self.config.start
        if isinstance(start, str):
            return {f: levels[0 if start == "first" else -1] for f, levels in factors.items()}
        check_levels(start, factors, "design.start")
        if missing := [f for f in factors if f not in start]:
            raise InputError(f"design.start has no level of factor {missing[0]}", expected="a level for every factor")
        return {f: start[f] for f in factors}

    def describe(self, factors: Factors) -> str:
        """One line for people."""
        return f"one factor at a time from {arm_name(self._start(factors))}"


class FractionalFactorial(Design):
    """The smallest two-level fraction of a stated resolution, its runs balanced and orthogonal.

    The run with every factor at its first level is among them.

    *When to use*: many factors. Resolution III screens main effects if interactions are small; IV keeps main effects
    clear of two-factor interactions; V estimates both.
    """

    class Config(Settings):
        kind: Literal["fractional_factorial"] = "fractional_factorial"
        resolution: Literal[3, 4, 5] = Field(4, description="shortest word of the defining relation: 3, 4 or 5")

    def arms(self, factors: Factors) -> ArmLevels:
        """One arm for each run, ``r00``, ``r01``, …

        Raises:
            InputError: a factor has not two levels, or no fraction smaller than the full factorial exists.
        """
        basis, words = self._built(factors)
        runs = design_rows(basis, words)
        arms = [{f: factors[f][bit] for f, bit in zip(factors, run, strict=True)} for run in runs]
        width = len(str(len(arms) - 1))
        return {f"r{index:0{width}d}": levels for index, levels in enumerate(arms)}

    def _built(self, factors: Factors) -> tuple[int, list[int]]:
        wrong = [f for f, levels in factors.items() if len(levels) != 2]
        if wrong:
            raise InputError(
                f"factor {wrong[0]} can't be in a fractional factorial",
                got=f"{len(factors[wrong[0]])} levels", expected="2 levels", fix="use kind grid, or drop levels",
            )  # fmt: skip
        return smallest_fraction(len(factors), self.config.resolution)

    def describe(self, factors: Factors) -> str:
        """Size, resolution, generators and the shortest words, with a letter for each factor."""
        basis, words = self._built(factors)
        k, relation = len(factors), defining_relation(basis, words)
        shown = ", ".join(f"{LETTERS[basis + i]}={_letters(word)}" for i, word in enumerate(words))
        shortest = [_letters(w) for w in relation if w.bit_count() == resolution(basis, words)]
        key = ", ".join(f"{LETTERS[i]} = {f}" for i, f in enumerate(factors))
        return (
            f"2^({k}-{k - basis}) fraction of resolution {ROMAN.get(resolution(basis, words), 'above V')}: {shown}; "
            f"{len(shortest)} shortest words ({', '.join(shortest[:6])}{', …' if len(shortest) > 6 else ''}); {key}"
        )


def _letters(word: int) -> str:
    return "".join(LETTERS[i] for i in range(word.bit_length()) if word >> i & 1)


class Arms(Design):
    """Arms written out one by one.

    *When to use*: a reproduction, a handful of configurations with names of their own.
    """

    class Config(Settings):
        kind: Literal["arms"] = "arms"
        arms: dict[str, dict[str, object]] = Field(
            min_length=1, description="arm → {factor: level} and {key.path: value}, mixed as you like"
        )

    def arms(self, factors: Factors) -> dict[str, dict[str, object]]:
        """The arms as written; what is not a factor is an override of the configuration."""
        for name, chosen in self.config.arms.items():
            check_levels({f: level for f, level in chosen.items() if f in factors}, factors, f"arm {name}")
        return dict(self.config.arms)

    def describe(self, factors: Factors) -> str:
        """One line for people."""
        return f"{len(self.config.arms)} explicit arms"


DESIGNS = Registry(
    "design",
    Design,
    {
        "grid": Grid,
        "one_factor_at_a_time": OneFactorAtATime,
        "fractional_factorial": FractionalFactorial,
        "arms": Arms,
    },
)


def check_levels(chosen: Mapping[str, object], factors: Factors, where: str) -> None:
    """Raises InputError where ``chosen`` names an unknown factor or an unknown level of one."""
    for factor, level in chosen.items():
        if factor not in factors:
            raise InputError(f"{where}: unknown factor {factor}", fix=nearest(factor, dict.fromkeys(factors)))
        if level not in factors[factor]:
            raise InputError(f"{where}: factor {factor} has no level {level}", expected=", ".join(factors[factor]))


# --- two-level fractions ----------------------------------------------------------------------------------


def smallest_fraction(k: int, wanted: int) -> tuple[int, list[int]]:
    """The smallest b with generators for a 2^b-run design of k two-level factors at resolution ≥ ``wanted``.

    Returns:
        b, and the generators of factors b…k−1 as bit masks over the first b.

    Raises:
        InputError: only the full factorial would do.
    """
    for basis in range(1, k):
        words = generators(basis, k - basis, wanted)
        if words is not None:
            return basis, words
    raise InputError(
        f"no fraction of {k} two-level factors has resolution {ROMAN[wanted]}",
        expected=f"at least {wanted} factors for resolution {ROMAN[wanted]}" if k < wanted else "a lower resolution",
        fix="use kind grid",
    )


def generators(basis: int, added: int, wanted: int) -> list[int] | None:
    """``added`` generators over ``basis`` factors, every word ``wanted`` letters or longer; None if there are none.

    The columns of all factors (unit masks and generators) must have no ``wanted`` − 1 or fewer that XOR to zero,
    which is a linear code of that distance: a backtracking search over masks, the heaviest first.
    """
    masks = sorted(range(1, 1 << basis), key=lambda mask: (-mask.bit_count(), mask))
    start = [1 << i for i in range(basis)]

    def extend(columns: list[int], candidates: Sequence[int], missing: int) -> list[int] | None:
        if missing == 0:
            return columns[basis:]
        taken = _sums(columns, wanted - 2)
        free = [mask for mask in candidates if mask not in taken]
        for index, mask in enumerate(free):
            if len(free) - index < missing:
                return None
            found = extend([*columns, mask], free[index + 1 :], missing - 1)
            if found is not None:
                return found
        return None

    return extend(start, masks, added)


def _sums(columns: Sequence[int], most: int) -> set[int]:
    """XORs of up to ``most`` of the columns."""
    return {reduce(xor, chosen) for size in range(1, most + 1) for chosen in combinations(columns, size)}


def defining_relation(basis: int, words: Sequence[int]) -> list[int]:
    """All words (masks over all k factors) that are constant over the design: products of the generators' words."""
    full = [word | 1 << (basis + i) for i, word in enumerate(words)]
    relation = {reduce(xor, chosen) for size in range(1, len(full) + 1) for chosen in combinations(full, size)}
    return sorted(relation, key=lambda word: (word.bit_count(), word))


def resolution(basis: int, words: Sequence[int]) -> int:
    """Letters of the shortest word of the defining relation."""
    return min(word.bit_count() for word in defining_relation(basis, words))


def design_rows(basis: int, words: Sequence[int]) -> list[tuple[int, ...]]:
    """The 2^basis runs as levels 0 and 1 of every factor; the first run is all 0."""
    rows = []
    for run in range(1 << basis):
        bits = [run >> i & 1 for i in range(basis)]
        rows.append((*bits, *((run & word).bit_count() & 1 for word in words)))
    return rows
