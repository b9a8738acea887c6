"""Every constant that decides the lab's content."""

import hashlib
import json
from dataclasses import asdict, dataclass

from twinrl.backends import MLP
from twinrl.lab.digits import HELD_OUT_TEMPLATES, TEMPLATES, Warp
from twinrl.lab.fitting import Recipe
from twinrl.lab.pretrain import Pretraining

_VERSION = 1  # raise it when code, not a constant, changes what is built

WARP = Warp()
CODEC = Recipe(steps=400, batch=32, lr=4e-3, seed=1)
JUDGE = Recipe(steps=400, batch=128, lr=3e-3, seed=2)
CLIP = Recipe(steps=500, batch=96, lr=2e-3, seed=3, weight_decay=0.1)
HPS = Recipe(steps=250, batch=64, lr=1e-3, seed=4)
PREFERENCE_JUDGE = Recipe(steps=400, batch=64, lr=1e-3, seed=6, weight_decay=0.1)
TEACHER = Pretraining()
NETWORK = MLP.Config()


@dataclass(frozen=True)
class LabRecipe:
    """How the lab is made.

    Attributes:
        warp: of the training variants.
        codec, judge, clip, hps, preference_judge: how these models are trained.
        teacher: how teachers are pretrained, the default network's and those of other architectures.
        clip_size: width and image layers of ``lab_clip`` and ``lab_hps``.
        preference_judge_size: width and image layers of ``lab_judge``.
        network: the default network, whose teacher belongs to the lab.
    """

    warp: Warp = WARP
    codec: Recipe = CODEC
    judge: Recipe = JUDGE
    clip: Recipe = CLIP
    hps: Recipe = HPS
    preference_judge: Recipe = PREFERENCE_JUDGE
    teacher: Pretraining = TEACHER
    clip_size: tuple[int, int] = (64, 3)
    preference_judge_size: tuple[int, int] = (96, 2)
    network: MLP.Config = NETWORK

    def hash(self) -> str:
        """Hex digest of all constants, captions and the version of the code; names the cache's folder."""
        constants = asdict(self) | {"network": self.network.model_dump(), "version": _VERSION}
        constants["captions"] = [TEMPLATES, HELD_OUT_TEMPLATES]
        return hashlib.sha256(json.dumps(constants, sort_keys=True).encode()).hexdigest()
