"""The sampler's search on planted qualities, and by the command on a run."""

import math
from pathlib import Path

import pytest
import torch

from twinrl.config.errors import InputError
from twinrl.evaluation import best
from twinrl.evaluation.best import Best, Searched
from twinrl.evaluation.table import IntervalEstimate
from twinrl.flow import draws
from twinrl.sampling import SamplerConfig, few_step


def noise(draw: int) -> float:
    return 0.1 * float(draws.normal((1,), 0, "quality", draw))


def planted(sampler: SamplerConfig, draw: int) -> float:
    """Less fresh noise is better, and ``any`` is better than the others; every draw moves all alike."""
    return 1 + sampler.stochastic_ratio + (sampler.style != "any") + noise(draw)  # type: ignore[operator]


def test_the_search_finds_what_is_better_and_the_comparison_says_so() -> None:
    found = best.search(planted, 4)
    assert (found.style, found.steps, found.stochastic_ratio) == ("any", 4, 0)
    judged = best.compared(planted, 4, found)
    assert judged.better
    assert judged.difference.value == pytest.approx(-2)
    assert judged.difference.high - judged.difference.low < 1e-9  # the noise is the pairs'


def test_luck_of_the_search_is_not_called_better() -> None:
    """Qualities of pure noise: something is least, and the comparison on fresh draws does not confirm it."""

    def luck(sampler: SamplerConfig, draw: int) -> float:
        key = int.from_bytes(str(sampler).encode(), "big") % 2**31
        return float(draws.normal((1,), key, "luck", draw))

    verdicts = [best.compared(luck, nfe, best.search(luck, nfe)).better for nfe in range(2, 22)]
    assert sum(verdicts) <= 3  # 2.5 % of 20 are expected


def test_what_is_not_finite_is_never_chosen_and_refused_as_the_usual() -> None:
    def broken(sampler: SamplerConfig, draw: int) -> float:
        return math.nan if sampler.style != "few" else planted(sampler, draw)

    assert best.search(broken, 2).style == "few"
    assert not best.compared(broken, 2, SamplerConfig(steps=2, style="mul")).better
    with pytest.raises(InputError, match="samples of 2 evaluations are not finite"):
        best.compared(lambda sampler, draw: math.nan, 2, few_step(2))


def test_the_usual_one_stays_where_nothing_is_better() -> None:
    def usual(sampler: SamplerConfig, draw: int) -> float:
        return float(sampler != few_step(4)) + noise(draw)

    found = best.search(usual, 4)
    assert found == few_step(4)
    assert not best.compared(usual, 4, found).better


def test_the_bar_knows_how_many_draws_are_judged() -> None:
    calls = []

    def counted(sampler: SamplerConfig, draw: int) -> float:
        calls.append(draw)
        return planted(sampler, draw)

    best.compared(counted, 2, best.search(counted, 2))
    assert len(calls) == best.judged_in(1)
    assert len(best.candidates(2)) == best.ROUNDS[0][0]


def test_what_was_found_is_kept_and_damage_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "samplers.json"
    assert best.read(path, "again") is None
    searched = Searched(7, [Best(4, best.candidates(4)[5], 1.5, 1.25, IntervalEstimate(-0.25, -0.5, -0.1, "m"))])
    best.write(path, searched)
    assert best.read(path, "again") == searched
    path.write_text(path.read_text().replace('"few"', '"nonsense"').replace('"any"', '"nonsense"'))
    path.write_text(path.read_text().replace('"usual": 1.5', '"usual": "x"'))
    with pytest.raises(InputError, match=r"samplers\.json is damaged; got .*; fix: search again: again"):
        best.read(path, "again")


def test_settings_fill_their_ranges() -> None:
    found = best.candidates(4)[3:]
    ratios = torch.tensor([float(each.stochastic_ratio) for each in found])
    assert {each.style for each in found} == {"few", "any", "mul"}
    assert {0.0, 1.0} < set(ratios.tolist())
    assert max(each.gap_end for each in found) < 0.8
    assert all(0.5 <= value <= 2 for each in found for value in each.kumaraswamy)
