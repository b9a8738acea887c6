"""Every constant that decides a laboratory's content."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from twinrl.backends import MLP, NETWORKS
from twinrl.backends.unet import UNet
from twinrl.config import stored
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
class Form:
    """Sizes of pictures and models; the defaults are the digits'.

    Attributes:
        side: of a picture in pixels, a multiple of 32.
        codec_channels: of the autoencoder at full, half and quarter resolution, multiples of 8.
        latent_channels: C of the latents (C, side/4, side/4).
        judge_channels: of the judge's three convolutions, multiples of 8.
        context: tokens of a caption, start and end among them.
        patch: side of an image tower's patch in pixels.
        shift: training pictures of judges and scorers are moved by up to so many pixels.
        clusters: classes where no column names them.
    """

    side: int = 32
    codec_channels: tuple[int, int, int] = (8, 16, 32)
    latent_channels: int = 4
    judge_channels: tuple[int, int, int] = (24, 48, 64)
    context: int = 16
    patch: int = 8
    shift: int = 0
    clusters: int = 10

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the space of the flow."""
        return self.latent_channels, self.side // 4, self.side // 4


@dataclass(frozen=True)
class LabRecipe:
    """How a laboratory is made.

    Attributes:
        warp: of the digits' training variants; None: pictures of one's own have none.
        codec, judge, clip, hps, preference_judge: how these models are trained.
        teacher: how teachers are pretrained, the default network's and those of other architectures.
        clip_size: width and image layers of ``lab_clip`` and ``lab_hps``.
        preference_judge_size: width and image layers of ``lab_judge``.
        network: settings of the default network, whose teacher belongs to the laboratory.
        form: sizes.
    """

    warp: Warp | None = WARP
    codec: Recipe = CODEC
    judge: Recipe = JUDGE
    clip: Recipe = CLIP
    hps: Recipe = HPS
    preference_judge: Recipe = PREFERENCE_JUDGE
    teacher: Pretraining = TEACHER
    clip_size: tuple[int, int] = (64, 3)
    preference_judge_size: tuple[int, int] = (96, 2)
    network: Any = NETWORK
    form: Form = Form()

    @property
    def grouping(self) -> Recipe:
        """Of the text–image model whose features are clustered; it is thrown away afterwards."""
        steps = max(self.clip.steps // 2, min(self.clip.steps, LEAST_STEPS))
        return replace(self.clip, steps=steps, seed=7)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"network": self.network.model_dump(mode="json")}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "LabRecipe":
        """From :meth:`plain`. Raises ValueError or InputError where it is something else."""
        found = stored.made(cls, plain)
        return replace(found, network=network_settings(found.network))

    def hash(self) -> str:
        """Hex digest of all constants and the version of the code; of digits also of the captions.

        It names the cache's folder. The digits' form, which came later, is left out.
        """
        constants = asdict(self) | {"network": self.network.model_dump(), "version": _VERSION}
        if self.form == Form():
            del constants["form"]
        if self.warp is not None:
            constants["captions"] = [TEMPLATES, HELD_OUT_TEMPLATES]
        return hashlib.sha256(json.dumps(constants, sort_keys=True).encode()).hexdigest()


def network_settings(plain: dict[str, Any]) -> Any:
    """Settings of a laboratory's network. Raises ValueError for what none has, such as a class of somebody's own, whose
    code would run."""
    if (kind := plain["kind"]) not in NETWORKS:
        raise ValueError(f"the network {kind!r:.80}, which is none of {', '.join(NETWORKS)}")
    return NETWORKS[kind].Config.model_validate(plain)


LEAST_STEPS = 20
"""Of a model of :func:`for_pictures`: a warm-up of a tenth of them needs more than one."""
MINUTES = {32: 30, 64: 120}
"""Side of a picture → minutes of a build on two cores for which :func:`for_pictures` has its steps."""


def for_pictures(side: int, minutes: int | None = None) -> LabRecipe:
    """The recipe of a laboratory of one's own pictures.

    Arguments:
        side: of a picture in pixels, 32 or 64.
        minutes: what the build may take on two cores; codec and teacher have steps in proportion, the others where
            they are fewer than by default. The numbers do not depend on the machine.
    """
    share = (minutes or MINUTES[side]) / MINUTES[side]

    def steps(default: int, most: float = 1.0) -> int:
        return max(LEAST_STEPS, round(default * min(share, most)))

    return LabRecipe(
        warp=None,
        codec=Recipe(steps=steps(2000, math.inf), batch=32, lr=2e-3, seed=1),
        judge=Recipe(steps=steps(1200), batch=128, lr=2e-3, seed=2, weight_decay=0.05),
        clip=Recipe(steps=steps(800), batch=128, lr=1e-3, seed=3, weight_decay=0.1),
        hps=Recipe(steps=steps(300), batch=64, lr=5e-4, seed=4, weight_decay=0.1),
        preference_judge=Recipe(steps=steps(800), batch=64, lr=1e-3, seed=6, weight_decay=0.1),
        teacher=Pretraining(steps=steps(3000, math.inf), batch=128, lr=1e-3, ema=0.998),
        clip_size=(96, 3),
        preference_judge_size=(96, 2),
        network=UNet.Config(width=48),
        form=Form(
            side=side, codec_channels=(24, 48, 64), latent_channels=8, judge_channels=(48, 96, 128), context=24,
            patch=side // 8, shift=side // 16,
        ),
    )  # fmt: skip
