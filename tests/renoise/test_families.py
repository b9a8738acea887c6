"""Renoise: published shapes, every family with every schedule, placement, refusals."""

from typing import Any

import pytest
import torch
import yaml
from scipy import stats

from twinrl.config import Settings, component, validate
from twinrl.config.errors import InputError
from twinrl.flow import draws
from twinrl.renoise import RENOISE, Renoise

RenoiseField: Any = component(RENOISE)
PUBLISHED = "{kind: beta, alpha: {kind: linear, initial: 4, final: 1, end: 30%}, beta: 1, placement: [training]}"
DMDR = """
kind: beta
alpha: {kind: cosine, initial: 4, final: 1, end: 10000}
beta: {kind: cosine, initial: 1.5, final: 1, end: 10000}
placement: [rectify, fake]
"""


class Holder(Settings):
    renoise: RenoiseField


def read(text: str) -> Renoise:
    config = validate(Holder, {"renoise": yaml.safe_load(text)}).renoise
    return RENOISE[config.kind](config)


def test_published_run() -> None:
    renoise = read(PUBLISHED)
    assert [renoise.at(step, 10_000).alpha for step in (0, 1000, 3000, 9999)] == [4, 3, 1, 1]
    assert renoise.at(0, 10_000).mean == 0.8
    assert renoise.end(10_000) == 3000
    assert [renoise.shapes(p) for p in ("training", "rectify", "fake")] == [True, False, False]


def test_dmdr() -> None:
    renoise = read(DMDR)
    halfway = renoise.at(5000, 60_000)
    assert (halfway.alpha, halfway.beta) == (pytest.approx(2.5), pytest.approx(1.25))
    assert renoise.end(60_000) == 10_000
    assert [renoise.shapes(p) for p in ("training", "rectify", "fake")] == [False, True, True]


@pytest.mark.parametrize("shape", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("step", [0, 300, 450, 1000])
def test_beta_draws_follow_the_schedule(shape: str, step: int) -> None:
    """Kolmogorov–Smirnov at several steps of every shape; and against the law of another step."""
    move = "{{kind: {shape}, initial: {a}, final: {b}, end: 60%}}"
    renoise = read(
        f"{{kind: beta, alpha: {move.format(shape=shape, a=4, b=1)}, beta: {move.format(shape=shape, a=1.5, b=1)}}}"
    )
    law = renoise.at(step, 1000)
    t = law.sample(draws.uniform((20_000,), 0, "renoise time", step)).numpy()
    assert stats.kstest(t, stats.beta(law.alpha, law.beta).cdf).pvalue > 1e-3
    other = renoise.at(600 if step < 400 else 0, 1000)
    assert stats.kstest(t, stats.beta(other.alpha, other.beta).cdf).pvalue < 1e-6


def test_logit_normal_moves() -> None:
    renoise = read("{kind: logit_normal, location: {kind: linear, initial: 2, final: 0, end: 50%}, scale: 0.5}")
    assert renoise.at(0, 100).mean > 0.85
    assert renoise.at(25, 100).location == 1
    assert renoise.at(99, 100).mean == pytest.approx(0.5)
    t = renoise.at(25, 100).sample(draws.uniform((20_000,), 0, "t"))
    assert stats.kstest(t.logit().numpy(), stats.norm(1, 0.5).cdf).pvalue > 1e-3


def test_where_renoise_has_ended_it_is_the_uniform_draw_itself() -> None:
    """Bitwise: an arm whose renoise has ended and an arm without renoise see the same times."""
    u = draws.uniform((100,), 0, "renoise time")
    assert torch.equal(read(PUBLISHED).at(3000, 10_000).sample(u), u)
    assert torch.equal(read("uniform").at(0, 10).sample(u), u)


def test_order_of_placements_does_not_change_the_configuration() -> None:
    one, other = (
        read("{kind: uniform, placement: [fake, training]}"),
        read("{kind: uniform, placement: [training, fake]}"),
    )
    assert one.config == other.config
    assert read("{kind: uniform, placement: [fake, fake]}").config.placement == ("fake",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{kind: beta, alpha: 0}", r"renoise.alpha: the schedule reaches 0; expected > 0 throughout"),
        ("{kind: beta, beta: {kind: cosine, initial: 1, final: -1}}", r"renoise.beta: the schedule reaches -1"),
        ("{kind: logit_normal, scale: 0}", r"renoise.scale: the schedule reaches 0"),
        ("{kind: beta, alpha: {kind: hard, final: 1, initial: 4, start: after_renoise}}", r"alpha waits for"),
        ("{kind: beta, placement: [tau]}", r"renoise.placement.0: input should be 'training', 'rectify' or 'fake'"),
        ("{kind: beta, placement: []}", r"at least 1 item"),
        ("gamma", r"unknown renoise 'gamma'; expected one of beta, uniform, logit_normal; or a class"),
        ("{kind: beta, alpha: {kind: linear, initial: 4, final: 1, start: 30%, end: 20%}}", r"alpha: the ramp ends"),
    ],
)  # fmt: skip
def test_errors_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(text)
    assert "\n" not in str(caught.value)
