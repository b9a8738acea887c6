"""Chains as they are configured: order, removal, a user's own rule, and one line for every mistake."""

import sys

import pytest
import torch

from tests.fake_source import register
from tests.gradients.steps import assert_close, step_of
from twinrl import cli
from twinrl.config import Settings
from twinrl.config.errors import InputError
from twinrl.gradients import Gradient, GradientsConfig, RuleContext, Transform
from twinrl.gradients.chain import Chain
from twinrl.training import schema


def gradients(*overrides: str, preset: str = "lab") -> GradientsConfig:
    return schema.load(preset, list(overrides)).gradients


def after(config: GradientsConfig, term: str) -> list[float]:
    """What the term's chain makes of (3, 4)."""
    gradient = Gradient({0: torch.tensor([3.0, 4.0], dtype=torch.float64)})
    Chain(config.rules(term))(gradient, RuleContext())
    return gradient.tensors[0].tolist()


class Halve(Transform):
    """A user's own rule with a setting and a memory."""

    class Config(Settings):
        kind: str
        times: int = 1

    def __init__(self, config: Config):
        super().__init__(config)
        self.calls = 0

    def __call__(self, gradient: Gradient, context: RuleContext) -> None:
        self.calls += 1
        gradient.scale_(0.5**self.config.times)

    def state(self) -> dict[str, float]:
        return {"calls": self.calls}

    def load(self, state: dict[str, float]) -> None:
        self.calls = int(state["calls"])


class NoRule:
    """Has a Config, but is no rule."""

    class Config(Settings):
        kind: str


# --- chains -----------------------------------------------------------------------------------------------------


def test_rules_apply_in_the_order_of_their_names() -> None:
    """Clip to 1 and double, or double and clip to 1."""
    clip, scale = "clip: {max_norm: 1}", "scale: {factor: 2}"
    assert after(gradients(f"gradients.each={{{clip}, {scale}}}"), "base") == pytest.approx([1.2, 1.6])
    assert after(gradients(f"gradients.each={{{scale}, {clip}}}"), "base") == pytest.approx([0.6, 0.8])


def test_the_order_is_known_to_whoever_identifies_a_run() -> None:
    first = gradients("gradients.each={clip: {}, scale: {}}", "gradients.terms.base={scale: {}, agc: {}}")
    assert first.order == {"terms.base": ["scale", "agc"], "each": ["clip", "scale"], "total": []}
    assert gradients("gradients.each={scale: {}, clip: {}}").order["each"] == ["scale", "clip"]


def test_each_is_for_terms_without_a_chain_of_their_own() -> None:
    config = gradients(
        "gradients.each.scale.factor=3", "gradients.terms.base.scale.factor=5", "gradients.terms.rectify={}"
    )
    assert [after(config, term)[0] for term in ("adversarial", "base", "rectify")] == [9, 15, 3]


def test_null_removes_a_rule() -> None:
    both = "gradients.terms.base={clip: {max_norm: 1}, scale: {factor: 2}}"
    assert after(gradients(both), "base") == pytest.approx([1.2, 1.6])
    assert after(gradients(both, "gradients.terms.base.clip=null"), "base") == [6, 8]
    alone = "gradients.each.scale.factor=3", "gradients.terms.base.clip.max_norm=1", "gradients.terms.base.clip=null"
    assert after(gradients(*alone), "base") == [3, 4]  # an empty chain is still its own
    assert after(gradients(*alone, "gradients.terms.base=null"), "base") == [9, 12]
    assert gradients("gradients.total.clip.max_norm=1", "gradients.total.clip=null").total == {}
    assert gradients("gradients.total.clip=null").total == {}


def test_two_rules_of_a_kind_under_names_of_their_own() -> None:
    config = gradients(
        "gradients.each={first: {kind: scale, factor: 2}, clip: {max_norm: 5}, then: {kind: scale, factor: 10}}"
    )
    assert after(config, "base") == pytest.approx([30, 40])
    assert list(config.each) == ["first", "clip", "then"]


def test_a_rule_named_alone_has_its_defaults() -> None:
    assert after(gradients("gradients.each.mine=clip"), "base") == pytest.approx([0.6, 0.8])


def test_a_users_own_rule_by_dotted_path() -> None:
    step = step_of("lab", f"gradients.terms.rectify.mine={{kind: {__name__}.Halve, times: 2}}")
    engine = step.engine()
    gradient, _, _ = step.run(engine)
    others = step.plain("base") + step.plain("adversarial")
    assert_close(gradient, others + step.plain("rectify") / 4)
    other = step.engine()
    other.load(engine.state())
    assert other.chains["rectify"].state() == {"mine": {"calls": 1}}


# --- mistakes ---------------------------------------------------------------------------------------------------

MISTAKES = {
    "rule of a term that is not there": (
        ["gradients.terms.reward.clip.max_norm=1"],
        ["gradients.terms.reward", "no such term", "base, adversarial, rectify"],
    ),
    "unknown rule": (["gradients.each.clp={}"], ["unknown gradient transform 'clp'", "clip, zclip, agc, relative"]),
    "unknown setting": (["gradients.each.clip.max_nrm=1"], ["gradients.each.clip.max_nrm", "did you mean max_norm?"]),
    "negative threshold": (["gradients.terms.base.clip.max_norm=-1"], ["gradients.terms.base.clip.max_norm", "got -1"]),
    "negative threshold of all": (["gradients.total.clip.max_norm=-2"], ["gradients.total.clip.max_norm", "got -2"]),
    "relative under total": (["gradients.total.relative={}"], ["total.relative", "put it under gradients.terms"]),
    "project under total": (["gradients.total.project={}"], ["total.project", "put it under gradients.terms"]),
    "agc in output space": (
        ["gradients.space=output", "gradients.terms.base.agc={}"],
        ["agc compares with the weights", "gradients.space=parameter, got output"],
    ),
    "agc of each in output space": (["gradients.space=output", "gradients.each.agc={}"], ["gradients.space=parameter"]),
    "rules without a space": (["gradients.space=none", "gradients.each.clip={}"], ["parameter or output, got none"]),
    "rules of a term without a space": (
        ["gradients.space=none", "gradients.terms.base.clip={}"],
        ["parameter or output, got none"],
    ),
    "all relative": (["gradients.each.relative={}"], ["every term has a rule relative to the others"]),
    "all waiting in one way or another": (
        ["gradients.each.relative={}", "gradients.terms.base.project={}"],
        ["every term has a rule relative to the others"],
    ),
    "unknown space": (["gradients.space=outputs"], ["gradients.space", "'outputs'"]),
    "no module": (["gradients.each.mine.kind=nowhere.Rule"], ["'nowhere.Rule' cannot be imported"]),
    "no rule": ([f"gradients.each.mine.kind={__name__}.NoRule"], ["NoRule' is no gradient transform", "s.Transform"]),
    "a number for a rule": (["gradients.each.clip=1"], ["gradients.each.clip", "expected a name or a mapping"]),
    "a number for a chain": (["gradients.terms.base=1"], ["gradients.terms.base"]),
    "negative period": (["gradients.telemetry.shares_every=-1"], ["gradients.telemetry.shares_every", "got -1"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake: str) -> None:
    overrides, expected = MISTAKES[mistake]
    with pytest.raises(InputError) as error:
        schema.load("twinflow", overrides)
    message = str(error.value)
    assert "\n" not in message
    assert [part for part in expected if part not in message] == []


@pytest.mark.parametrize(
    "mistake", ["rule of a term that is not there", "unknown rule", "agc in output space", "no rule"]
)
def test_a_mistake_is_exit_code_2(
    mistake: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    overrides, expected = MISTAKES[mistake]
    monkeypatch.setattr(sys, "argv", ["twinrl", "train", "twinflow", *overrides])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("twinrl: ")
    assert error.count("\n") == 1
    assert expected[0] in error


def test_what_relative_needs_is_there_where_one_term_has_none() -> None:
    config = gradients("gradients.each.relative={}", "gradients.terms.base={}")
    assert [config.needs_others(term) for term in ("base", "adversarial", "rectify")] == [False, True, True]
