"""The lab's judge: a digit classifier that training never sees, whose features define the quality metrics."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from twinrl.draws import generator
from twinrl.lab.training import Recipe, fit

FEATURES = 64
_CLASSES = 10


class DigitJudge(nn.Module):
    """A small convolutional classifier; satisfies ``twinrl.data.source.Judge``.

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
            nn.Dropout(0.2),
            nn.Linear(64 * 4 * 4, FEATURES),
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Dropout(0.2), nn.Linear(FEATURES, _CLASSES))

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, 32, 32) in [−1, 1] → (B, 64) features."""
        return self.trunk(pixels)

    def logits(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, 32, 32) in [−1, 1] → (B, 10) class logits."""
        return self.head(self.trunk(pixels))


def train_judge(pixels: Tensor, labels: Tensor, recipe: Recipe, tick: Callable[[], None]) -> DigitJudge:
    """A judge trained on ``pixels`` (N, 3, 32, 32) with labels (N,), with label smoothing and pixel noise.

    Smoothing and noise keep its features from separating training images from new ones.
    """
    torch.manual_seed(recipe.seed)
    judge = DigitJudge()

    def loss(step: int) -> Tensor:
        rows = recipe.rows(len(pixels), step)
        noise = torch.randn(pixels[rows].shape, generator=generator(recipe.seed, "judge noise", step))
        return cross_entropy(judge.logits(pixels[rows] + 0.1 * noise), labels[rows], label_smoothing=0.1)

    fit(judge.parameters(), loss, recipe, tick)
    return judge.eval().requires_grad_(False)
