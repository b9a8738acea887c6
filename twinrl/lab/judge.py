"""The lab's judge: a digit classifier that training never sees, whose features define the quality metrics."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from twinrl.flow.draws import normal
from twinrl.flow.source import Split
from twinrl.lab.fitting import Recipe, fit

FEATURES = 64
_CLASSES = 10


class DigitJudge(nn.Module):
    """A small convolutional classifier; satisfies ``twinrl.flow.source.Judge``.

    Features are taken before the last nonlinearity: they are then close to Gaussian, as the Fréchet distance
    assumes, and do not have dead dimensions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Conv2d(3, 24, 3, padding=1),
            nn.GroupNorm(4, 24),
            nn.SiLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.GroupNorm(8, 48),
            nn.SiLU(),
            nn.Conv2d(48, 64, 3, stride=2, padding=1),
            nn.GroupNorm(8, 64),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, FEATURES),
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(FEATURES, _CLASSES))

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, 32, 32) in [−1, 1] → (B, 64) features."""
        return self.trunk(pixels)

    def logits(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, 32, 32) in [−1, 1] → (B, 10) class logits."""
        return self.logits_of(self.trunk(pixels))

    def logits_of(self, features: Tensor) -> Tensor:
        """(B, 64) features → (B, 10) class logits."""
        return self.head(features)


def train_judge(judge: DigitJudge, data: Split, recipe: Recipe, tick: Callable[[], None]) -> None:
    """Train ``judge`` in place, with label smoothing and noise on pixels and features.

    Smoothing and noise keep its features from separating training images from new ones.
    """

    def loss(step: int) -> Tensor:
        rows = recipe.rows(len(data), step)
        x = data.pixels[rows]
        noisy = x + 0.1 * normal(tuple(x.shape), recipe.seed, "judge pixels", step)
        features = judge.features(noisy)
        features = features + 0.5 * normal(tuple(features.shape), recipe.seed, "judge features", step)
        return cross_entropy(judge.head(features), data.labels[rows], label_smoothing=0.1)

    fit(judge.parameters(), loss, recipe, tick)
    judge.eval().requires_grad_(False)
