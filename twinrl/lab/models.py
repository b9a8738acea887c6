"""The lab's models side by side: built untrained from the recipe, filled from the cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from torch import Tensor, nn

from twinrl.lab.clip import ClipModel
from twinrl.lab.fitting import seeded
from twinrl.lab.judge import LabJudge
from twinrl.lab.recipe import LabRecipe
from twinrl.lab.vae import Autoencoder

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Models:
    """Codec, judge and the three text–image models.

    Attributes:
        codec: autoencoder between pixels and normalised latents.
        judge: classifier that training never sees.
        clip: ``lab_clip``.
        hps: ``lab_hps``, of the same architecture.
        preference_judge: ``lab_judge``.
    """

    codec: Autoencoder
    judge: LabJudge
    clip: ClipModel
    hps: ClipModel
    preference_judge: ClipModel

    @classmethod
    def untrained(cls, recipe: LabRecipe, vocabulary: Sequence[str], classes: int) -> "Models":
        """Initial weights from the recipe's seeds; the global random state is left untouched.

        Arguments:
            recipe: sizes and seeds. vocabulary: words of the captions. classes: that the judge tells apart.
        """
        form = recipe.form
        with seeded(recipe.codec.seed):
            codec = Autoencoder(form)
        with seeded(recipe.judge.seed):
            judge = LabJudge(classes, form)
        with seeded(recipe.clip.seed):
            clip, hps = (ClipModel(vocabulary, form, *recipe.clip_size) for _ in range(2))
        with seeded(recipe.preference_judge.seed):
            preference_judge = ClipModel(vocabulary, form, *recipe.preference_judge_size)
        return cls(codec, judge, clip, hps, preference_judge)

    @classmethod
    def filled(
        cls, recipe: LabRecipe, vocabulary: Sequence[str], classes: int, weights: Mapping[str, Weights]
    ) -> "Models":
        """Models with ``weights`` (state dicts by attribute), frozen and in evaluation mode."""
        models = cls.untrained(recipe, vocabulary, classes)
        for name, model in models.named().items():
            model.load_state_dict(weights[name])
            model.eval().requires_grad_(False)
        return models

    def named(self) -> dict[str, nn.Module]:
        """The models by attribute name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: str) -> "Models":
        """All of them on ``device``, in place."""
        for model in self.named().values():
            model.to(device)
        return self
