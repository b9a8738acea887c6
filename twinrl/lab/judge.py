"""A laboratory's judge: a classifier that training never sees, whose features define the quality metrics."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from twinrl.flow.draws import normal
from twinrl.lab.fitting import Keeper, Recipe, fit
from twinrl.lab.material import Lesson
from twinrl.lab.recipe import Form

FEATURES = 64


class LabJudge(nn.Module):
    """A small convolutional classifier; satisfies ``twinrl.flow.source.Judge``.

    Features are taken before the last nonlinearity: they are then close to Gaussian, as the Fréchet distance
    assumes, and do not have dead dimensions.

    Arguments:
        classes: K.
        form: sizes of pictures and layers.
    """

    def __init__(self, classes: int, form: Form):
        super().__init__()
        fine, middle, coarse = form.judge_channels
        self.trunk = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Conv2d(3, fine, 3, padding=1),
            nn.GroupNorm(4, fine),
            nn.SiLU(),
            nn.Conv2d(fine, middle, 3, stride=2, padding=1),
            nn.GroupNorm(8, middle),
            nn.SiLU(),
            nn.Conv2d(middle, coarse, 3, stride=2, padding=1),
            nn.GroupNorm(8, coarse),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(coarse * (form.side // 8) ** 2, FEATURES),
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(FEATURES, classes))

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, side, side) in [−1, 1] → (B, 64) features."""
        return self.trunk(pixels)

    def logits(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, side, side) in [−1, 1] → (B, K) class logits."""
        return self.logits_of(self.trunk(pixels))

    def logits_of(self, features: Tensor) -> Tensor:
        """(B, 64) features → (B, K) class logits."""
        return self.head(features)


def train_judge(
    judge: LabJudge, data: Lesson, recipe: Recipe, tick: Callable[[], None], keeper: Keeper | None = None
) -> None:
    """Train ``judge`` in place, with label smoothing and noise on pixels and features.

    Smoothing and noise keep its features from separating training images from new ones.
    """

    def loss(step: int) -> Tensor:
        rows = recipe.rows(len(data), step)
        x = data.pixels(rows, recipe.seed, step)
        noisy = x + 0.1 * normal(tuple(x.shape), recipe.seed, "judge pixels", step)
        features = judge.features(noisy)
        features = features + 0.5 * normal(tuple(features.shape), recipe.seed, "judge features", step)
        return cross_entropy(judge.head(features), data.split.labels[rows], label_smoothing=0.1)

    fit(judge.parameters(), loss, recipe, tick, keeper)
    judge.eval().requires_grad_(False)
