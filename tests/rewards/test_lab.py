"""The rewards that come with a data source."""

import pytest
import torch

from tests.rewards.tiny import reward
from twinrl.config.errors import InputError
from twinrl.rewards import RewardContext
from twinrl.rewards.lab import JudgeLogProbability

pytestmark = [pytest.mark.slow, pytest.mark.laboratory]


@pytest.fixture(scope="module")
def digits(lab):
    """Four test digits, their captions and wrong captions."""
    x, labels = lab.test.pixels[:4], lab.test.labels[:4]
    return x, lab.prompts(labels, 0, 0), lab.prompts((labels + 1) % 10, 0, 0)


@pytest.mark.parametrize("kind", ["lab_clip", "lab_hps"])
def test_scores_are_the_sources_and_differentiable(lab, digits, kind):
    x, right, _ = digits
    model = reward(kind, source=lab)
    assert torch.equal(model(x, right), lab.scorers[kind](x, right))
    x = x.clone().requires_grad_(True)
    model(x, right).sum().backward()
    assert (x.grad.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.campaign
@pytest.mark.parametrize("lab", ["whole_lab"], indirect=True)
@pytest.mark.parametrize("kind", ["lab_clip", "lab_hps"])
def test_right_captions_score_higher(lab, digits, kind):
    x, right, wrong = digits
    model = reward(kind, source=lab)
    assert (model(x, right) > model(x, wrong)).all()


def test_grey_digits_are_scored_as_rgb(lab, digits):
    x, right, _ = digits
    model = reward("lab_hps", source=lab)
    torch.testing.assert_close(model(x[:, :1], right), model(x, right))


def test_other_sizes_are_refused(lab):
    with pytest.raises(InputError, match="lab_hps takes 32×32 pixels; got 28×28"):
        reward("lab_hps", source=lab)(torch.zeros(1, 1, 28, 28), ["a handwritten two"])


def test_the_judge_judges_but_is_not_trained_on(lab, digits):
    with pytest.raises(InputError, match="training must not see it; expected one of lab_clip, lab_hps"):
        reward("lab_judge", source=lab)
    nested = {"kind": "hinge", "ceiling": 0.5, "reward": "lab_judge"}
    with pytest.raises(InputError, match=r"rewards\.x\.reward: lab_judge judges"):
        reward(nested, source=lab, key="rewards.x")
    x, right, _ = digits
    judge = reward("lab_judge", source=lab, training=False)
    assert torch.equal(judge(x, right), lab.scorers["lab_judge"](x, right))


def test_a_source_without_the_scorer_says_what_it_has(lab):
    with pytest.raises(InputError, match="no scorer judge_logprob; got scorers: lab_clip, lab_hps, lab_judge"):
        reward("judge_logprob", source=lab, training=False)
    with pytest.raises(InputError, match="no scorer lab_hps; got scorers: none"):
        reward("lab_hps")


def test_models_stay_the_sources(lab):
    """The lab's CLIP also conditions the flow: moving the reward off a device must not move it."""
    assert reward("lab_clip", source=lab).modules() == {}


def test_mnists_judge_takes_its_own_grey_pixels():
    from twinrl.lab.mnist import LabelLogProbability, MNISTJudge

    scorer = LabelLogProbability(MNISTJudge().eval())
    context = RewardContext({"judge_logprob": scorer}, frozenset({"judge_logprob"}), training=False)
    x, prompts = torch.rand(2, 1, 28, 28), ["the digit three", "the digit nine"]
    judge = JudgeLogProbability(JudgeLogProbability.Config(), context)
    assert torch.equal(judge(x, prompts), scorer(x, prompts))
