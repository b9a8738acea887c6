"""Rewards: images and prompts in, scores out; one file each, and this registry.

A new reward is a class with a ``Config`` and one line here, or a dotted path in the configuration. What it costs to
have its gradient in latent space is the business of :mod:`twinrl.rewards.latent`.
"""

from typing import Any

from twinrl.flow.source import Data
from twinrl.rewards.aesthetic import Aesthetic
from twinrl.rewards.analytic import Brightness, Compressibility, Quadratic, Sharpness
from twinrl.rewards.clipscore import CLIPScore
from twinrl.rewards.ensemble import Ensemble, Hinge
from twinrl.rewards.hpsv2 import HPSv2
from twinrl.rewards.imagereward import ImageReward
from twinrl.rewards.lab import ClassifierLogProbability, JudgeLogProbability, LabClip, LabHPS, LabJudge
from twinrl.rewards.per_prompt import PerPrompt
from twinrl.rewards.pickscore import PickScore
from twinrl.rewards.reward import REWARDS, Reward, RewardContext, RewardSettings
from twinrl.rewards.vlm import VLM

REWARDS.update(
    {
        # of the data source
        "lab_clip": LabClip,
        "lab_hps": LabHPS,
        "lab_judge": LabJudge,
        "judge_logprob": JudgeLogProbability,
        "classifier_logprob": ClassifierLogProbability,
        # published models
        "hpsv2": HPSv2,
        "pickscore": PickScore,
        "clipscore": CLIPScore,
        "imagereward": ImageReward,
        "aesthetic": Aesthetic,
        "vlm": VLM,
        # closed forms
        "brightness": Brightness,
        "quadratic": Quadratic,
        "sharpness": Sharpness,
        "compressibility": Compressibility,
        # rewards made of rewards
        "ensemble": Ensemble,
        "hinge": Hinge,
        "per_prompt": PerPrompt,
    }
)

__all__ = ["REWARDS", "Reward", "RewardContext", "RewardSettings", "build_reward"]


def build_reward(config: Any, source: Data | None = None, key: str = "reward", training: bool = True) -> Reward:
    """The reward that ``config`` describes, on the CPU (``.to(device)`` moves it).

    Arguments:
        config: validated settings, e.g. ``RewardSettings`` of a schema.
        source: the run's data source, where the reward is one of its scorers.
        key: dotted key of the settings, for messages, e.g. ``"rewards.preference"``.
        training: whether training follows it; held-out scorers are refused then.

    Raises:
        InputError: an unknown kind, a missing, damaged or foreign checkpoint, a scorer that is absent or held out.
    """
    context = RewardContext(key=key, training=training)
    if source is not None:
        networks = getattr(source, "networks", None)  # of a family: what is followed is also judged, and large
        context = RewardContext(source.scorers, source.held_out, training, key, networks)
    reward: Reward = REWARDS.build(config, context)
    return reward
