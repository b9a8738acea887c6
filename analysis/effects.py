"""Do the arms differ, and which factor makes it: main effects, interactions, the seed as a block, Holm's correction.

``y = μ + Σ factors + Σ interactions + seed + ε``, by least squares (statsmodels) on the values, or on their ranks
where runs diverged: one broken run among healthy ones would otherwise be all of the spread. For "diverged: yes or no"
by Firth's logistic regression (:mod:`analysis.firth`), without the block: paired seeds then make the test a little
conservative.

Columns are centred, so a coefficient is *this level minus the reference, averaged over the other factors*, also in
the presence of interactions. One F or likelihood-ratio test per factor; Holm's correction over all of them.

A study is asked more: whether its arms differ at all (one F test over arms), and where the design can tell pairs of
factors apart, whether they interact. All of these tests are one family (:func:`study_effects`), in which arms differ
wherever a factor is found.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from analysis import firth, intervals
from analysis.intervals import LEVEL, Interval
from twinrl.config.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

ARMS = "arms"
"""What the test over all arms is called among factors."""


@dataclass(frozen=True)
class Effect:
    """What one level of a factor changes.

    Attributes:
        factor: its name, ``a × b`` for an interaction.
        contrast: ``level − reference`` in words.
        interval: difference of the outcome (ranks: of its rank; yes/no: log odds ratio).
        p: of the whole factor, all levels together. p_holm: corrected for the number of factors tested.
        scale: values, ranks or log odds.
        seeds: distinct ones behind it. With one, p is about that seed: it says nothing about others.
    """

    factor: str
    contrast: str
    interval: Interval
    p: float
    p_holm: float
    scale: str
    seeds: int = 2

    @property
    def named(self) -> bool:
        """Whether the factor is found at 5 % family-wise, and not in one seed alone."""
        return self.p_holm < 1 - LEVEL and self.seeds > 1


@dataclass(frozen=True)
class FactorColumns:
    """The columns (n, k) of one factor or interaction, each with its contrast in words."""

    name: str
    columns: np.ndarray
    contrasts: tuple[str, ...]


def main_effects(
    trials: "pd.DataFrame",
    outcome: str,
    factors: Sequence[str],
    interactions: Sequence[tuple[str, str]] = (),
    reference: dict[str, object] | None = None,
    ranks: bool = False,
) -> list[Effect]:
    """Effects of ``factors`` on a numeric column of ``trials``, the factors in order of their p-values.

    Arguments:
        trials: one row a run, with ``seed``, the factors' levels and the outcome (±inf for a diverged run).
        interactions: pairs to be tested as well. reference: the base's level of each factor; default: the first.
        ranks: on the ranks of the outcome, as where it is not finite; for outcomes with a few far-off values.

    Raises:
        InputError: a column is missing, or the design cannot tell the factors apart.
    """
    effects = _on_numbers(trials, outcome, design(trials, [outcome], factors, interactions, reference or {}), ranks)
    return corrected(effects, trials["seed"].nunique())


def study_effects(
    trials: "pd.DataFrame",
    outcome: str,
    factors: Sequence[str],
    interactions: Sequence[tuple[str, str]] = (),
    reference: dict[str, object] | None = None,
    ranks: bool = False,
) -> tuple[Effect | None, list[Effect]]:
    """Whether the arms differ, and :func:`main_effects` with every pair of factors that the design can tell.

    All of them are one family (:func:`analysis.intervals.gated`): what is found among them is found at 5 %.

    Arguments:
        trials: as for :func:`main_effects`, with ``arm``. interactions: pairs beside those of :func:`telling_pairs`.

    Returns:
        the test over arms, None where a factor is the same or runs are too few; the effects.
    """
    pairs = list(dict.fromkeys([*interactions, *telling_pairs(trials, factors, interactions)]))
    found = _on_numbers(trials, outcome, design(trials, [outcome], factors, pairs, reference or {}), ranks)
    whole = arms_effect(trials, outcome, ranks) if len(factors) > 1 else None
    return gated(whole, corrected(found, trials["seed"].nunique()))


def gated(whole: Effect | None, found: list[Effect]) -> tuple[Effect | None, list[Effect]]:
    """The test over arms and the effects, corrected as one family; what is there alone stays as it is."""
    if whole is None or not found:
        return whole, found
    p = {effect.factor: effect.p for effect in found}
    gate, parts = intervals.gated(whole.p, list(p.values()))
    p_holm = dict(zip(p, parts.tolist(), strict=True))
    return replace(whole, p_holm=float(gate)), [replace(e, p_holm=p_holm[e.factor]) for e in found]


def arms_effect(trials: "pd.DataFrame", outcome: str, ranks: bool = False) -> Effect | None:
    """The F test that all arms are alike, the seed as a block; None where there are too few runs or arms."""
    if trials["arm"].nunique() < 2:
        return None
    try:
        found = _on_numbers(trials, outcome, [factor_block(ARMS, trials["arm"])], ranks)
    except InputError:  # too few runs
        return None
    return replace(found[0], seeds=trials["seed"].nunique())


def telling_pairs(
    trials: "pd.DataFrame", factors: Sequence[str], asked: Sequence[tuple[str, str]] = ()
) -> list[tuple[str, str]]:
    """The pairs of factors whose interactions the design tells from everything else, as in a grid of several seeds.

    A pair counts where all combinations of its levels were run. Where all such pairs cannot be told together, as in a
    fraction, there are none: one of them would stand for another.

    Arguments:
        asked: pairs that are in the model anyway.
    """
    if trials["seed"].nunique() < 2:
        return []
    full = [
        pair for pair in combinations(factors, 2)
        if pair not in asked and pair[::-1] not in asked
        and len(trials.groupby(list(pair), dropna=False)) == math.prod(trials[f].nunique(dropna=False) for f in pair)
    ]  # fmt: skip
    try:
        blocks = design(trials, [], factors, [*asked, *full], {})
    except InputError:
        return []
    columns = sum(block.columns.shape[1] for block in blocks) + trials["seed"].nunique()
    return full if columns < len(trials) else []


def _on_numbers(trials: "pd.DataFrame", outcome: str, blocks: Sequence[FactorColumns], ranks: bool) -> list[Effect]:
    """Uncorrected effects on a numeric column, by its ranks where asked or where it is not finite."""
    y = trials[outcome].to_numpy(float)
    scale = "values" if np.isfinite(y).all() and not ranks else "ranks"
    return _least_squares(blocks, _seed_block(trials, blocks), y if scale == "values" else _ranks(y), scale)


def odds_effects(
    trials: "pd.DataFrame",
    factors: Sequence[str],
    outcome: str = "diverged",
    interactions: Sequence[tuple[str, str]] = (),
    reference: dict[str, object] | None = None,
) -> list[Effect]:
    """As :func:`main_effects`, for a yes/no column; no effects where all outcomes are the same."""
    blocks = design(trials, [outcome], factors, interactions, reference or {})
    y = trials[outcome].to_numpy(float)
    if len(set(y)) < 2:
        return []
    return corrected(_logistic(blocks, y), trials["seed"].nunique())


# --- designs ----------------------------------------------------------------------------------------------


def design(
    trials: "pd.DataFrame",
    outcomes: Sequence[str],
    factors: Sequence[str],
    interactions: Sequence[tuple[str, str]],
    reference: dict[str, object],
) -> list[FactorColumns]:
    """The blocks of all factors and interactions, checked to be estimable."""
    for name in (*outcomes, *factors, *(f for pair in interactions for f in pair)):
        if name not in trials.columns:
            raise InputError(
                f"the study has no column {name}", expected=f"one of {', '.join(map(str, trials.columns))}"
            )
    if not factors:
        raise InputError("no factor varies in this study", expected="arms that differ in a setting")
    for name in factors:
        if trials[name].nunique() < 2:
            raise InputError(f"factor {name} has one level among these {len(trials)} runs", expected="two or more")
    mains = {name: factor_block(name, trials[name], reference.get(name)) for name in factors}
    blocks = [*mains.values(), *(_interaction(mains[a], mains[b]) for a, b in interactions)]
    _check_estimable(blocks, len(trials))
    return blocks


def factor_block(name: str, levels: "pd.Series", reference: object = None) -> FactorColumns:
    """Centred indicator columns of all levels but the reference."""
    values = [str(level) for level in levels]
    present = list(dict.fromkeys(values))
    base = str(reference) if reference is not None and str(reference) in present else present[0]
    others = [level for level in present if level != base]
    indicators = np.array([[value == level for level in others] for value in values], dtype=float)
    columns = indicators.reshape(len(values), len(others)) - 1 / max(1, len(present))
    return FactorColumns(name, columns, tuple(f"{level} − {base}" for level in others))


def _interaction(a: FactorColumns, b: FactorColumns) -> FactorColumns:
    columns = np.einsum("ni,nj->nij", a.columns, b.columns).reshape(len(a.columns), -1)
    contrasts = tuple(f"({left}) × ({right})" for left in a.contrasts for right in b.contrasts)
    return FactorColumns(f"{a.name} × {b.name}", columns, contrasts)


def _check_estimable(blocks: Sequence[FactorColumns], n: int) -> None:
    """Raises InputError naming the first factor that the ones before it already determine."""
    seen = np.ones((n, 1))
    for block in blocks:
        joined = np.concatenate([seen, block.columns], axis=1)
        if np.linalg.matrix_rank(joined) < joined.shape[1]:
            raise InputError(
                f"the effect of {block.name} cannot be told from the other factors'",
                fix="add arms in which it varies alone, or leave it out",
            )
        seen = joined


def _seed_block(trials: "pd.DataFrame", blocks: Sequence[FactorColumns]) -> np.ndarray:
    """Centred seed indicators, as many as the factors leave room for; none if no seed is in two runs."""
    columns = factor_block("seed", trials["seed"]).columns
    if columns.shape[1] + 1 >= len(trials):
        return columns[:, :0]
    joined = np.concatenate([np.ones((len(trials), 1)), *(block.columns for block in blocks)], axis=1)
    whole = np.concatenate([joined, columns], axis=1)
    if whole.shape[1] < len(trials) and np.linalg.matrix_rank(whole) == whole.shape[1]:
        return columns
    kept = []
    for k in range(columns.shape[1]):
        wider = np.concatenate([joined, columns[:, [k]]], axis=1)
        if np.linalg.matrix_rank(wider) == wider.shape[1] < len(trials):
            joined = wider
            kept.append(k)
    return columns[:, kept]


def _ranks(values: np.ndarray) -> np.ndarray:
    from scipy import stats

    return stats.rankdata(values)


# --- tests ------------------------------------------------------------------------------------------------


def _least_squares(blocks: Sequence[FactorColumns], seeds: np.ndarray, y: np.ndarray, scale: str) -> list[Effect]:
    from statsmodels.regression.linear_model import OLS

    x = np.concatenate([np.ones((len(y), 1)), *(block.columns for block in blocks), seeds], axis=1)
    if x.shape[1] >= len(y):
        raise InputError(
            "too few runs for so many factors",
            got=f"{len(y)} runs",
            expected=f"more than {x.shape[1]}",
            fix="add seeds",
        )
    result = OLS(y, x).fit()
    nothing = 1e-12 * np.abs(y).max()  # what rounding leaves where a column has no effect
    values = np.column_stack([result.params, result.conf_int(1 - LEVEL)])
    values[np.abs(values) < nothing] = 0
    effects, first = [], 1
    for block in blocks:
        index = range(first, first + block.columns.shape[1])
        first = index.stop
        p = float(result.f_test(np.eye(x.shape[1])[list(index)]).pvalue) if np.ptp(y) > 0 else 1.0
        for k, contrast in zip(index, block.contrasts, strict=True):
            estimate, low, high = values[k].tolist()
            interval = Interval(estimate, low, high, len(y), "least squares, seed as block")
            effects.append(Effect(block.name, contrast, interval, p, p, scale))
    return effects


def _logistic(blocks: Sequence[FactorColumns], y: np.ndarray) -> list[Effect]:
    x = np.concatenate([np.ones((len(y), 1)), *(block.columns for block in blocks)], axis=1)
    full = firth.fit(x, y)
    effects, first = [], 1
    for block in blocks:
        index = list(range(first, first + block.columns.shape[1]))
        first = index[-1] + 1
        p = firth.p_value(x, y, index, full)
        for k, contrast in zip(index, block.contrasts, strict=True):
            low, high = firth.profile_interval(x, y, k, full, LEVEL)
            interval = Interval(float(full.beta[k]), low, high, len(y), "Firth, profile of the penalised likelihood")
            effects.append(Effect(block.name, contrast, interval, p, p, "log odds"))
    return effects


def corrected(effects: list[Effect], seeds: int) -> list[Effect]:
    """The effects of a study of ``seeds``, with ``p_holm`` over the distinct factors, the smallest p first.

    Factors whose p differs by rounding alone (equal counts of runs that diverged) keep their order on every processor.
    """
    p = {effect.factor: effect.p for effect in effects}
    p_holm = dict(zip(p, intervals.holm(list(p.values())), strict=True))
    filled = [replace(effect, p_holm=float(p_holm[effect.factor]), seeds=seeds) for effect in effects]
    return sorted(filled, key=lambda effect: float(f"{effect.p:.6g}"))
