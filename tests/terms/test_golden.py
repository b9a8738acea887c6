"""Every term of every preset on fixed inputs, as a golden number; one per preset is worked out by hand below.

How the numbers of ``GOLDEN`` were made: by a transcription of the papers' formulas into plain
Python floats, row by row and element by element, without torch and without this package. The inputs are the
tables below: four rows of two elements and affine networks,

    student  F(x, t, r, c) = 0.5·x + 0.25·t − 0.75·r + 0.5·c + 0.1·sign(t)·x
    teacher  F̄(x, t, r, c) = 0.4·x + 0.30·t − 0.50·r + 0.6·c + 0.2·sign(t)·x

so that on the real branch F = 0.6·x + … and on the fake branch 0.4·x + …. Settings are the preset's own but
for Δ = 0.25: at 0.01 every residual of so coarse a network is clamped to ±1 and its number would say nothing.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from tests.objectives import GivenDraws, losses_of, objective_of
from twinrl import config as configuration
from twinrl.flow.branches import divide
from twinrl.flow.conditions import Condition
from twinrl.terms.objective import TermLoss

X = [[0.4, -0.2], [1.0, 0.6], [-0.5, 0.3], [0.2, -0.8]]
Z = [[-0.6, 0.8], [0.5, -1.0], [1.2, 0.1], [-0.3, 0.9]]
CONDITION, NULL = [0.5, -0.5, 1.0, 0.0], [1.0, 0.5, 0.0, -0.5]
DRAWS = {
    "t": [0.8, 0.5, 0.9, 0.4],
    "r e2e": [0.0, 0.0, 0.0, 0.0],
    "r mul": [0.3, 0.6, 0.2, 0.5],
    "r any": [0.5, 0.4, 0.7, 0.9],
    "r adv": [0.0, 0.0, 0.0, 0.0],
    "noise": Z,
    "fake sample": [[0.7, -0.4], [-0.9, 0.2], [0.3, 1.1], [-0.5, 0.6]],
    "fake time": [0.25, 0.995, 0.6, 0.005],
    "renoise noise": [[-0.2, 0.5], [0.9, -0.7], [0.1, 0.4], [-1.0, 0.3]],
    "renoise time": [0.3, 0.6, 0.5, 0.7],
}
GOLDEN = {
    "rcgm": {"base": 0.539500839362143},
    "tutorial": {
        "base": 0.539500839362143,
        "real_velocity": 1.186024,
        "adversarial": 0.0513062,
        "rectify": 0.3395074,
        "one_step_consistency": 0.811770472900391,
    },
    "twinflow": {
        "base": 1.289818674613626,
        "adversarial": 0.102721660540196,
        "rectify": 0.362258901764925,
    },
    "flow_matching": {"base": 0.544098},
    "simpletuner": {
        "flow_matching": 1.0367365,
        "base": 0.667155408892414,
        "real_velocity": 1.2869365,
        "adversarial": 0.3120425087,
        "rectify": 0.162861,
    },
}
TOTAL_WEIGHTS = {"twinflow": {"rectify": 0.5}}


class Affine(nn.Module):
    """``a·x + b·t − d·r + e·c + g·sign(t)·x``."""

    def __init__(self, *coefficients: float):
        super().__init__()
        self.coefficients = nn.Parameter(torch.tensor(coefficients, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        a, b, d, e, g = self.coefficients
        return a * x + (b * t - d * r + e * condition["c"])[:, None] + g * t.sign()[:, None] * x


def tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def losses(preset: str) -> dict[str, TermLoss]:
    student, teacher = Affine(0.5, 0.25, 0.75, 0.5, 0.1), Affine(0.4, 0.3, 0.5, 0.6, 0.2)
    _, config = objective_of(preset, student)
    steps = [f"terms.{name}.delta=0.25" for name, term in config.terms.items() if hasattr(term, "delta")]
    made, config = objective_of(preset, student, steps, teacher=teacher)
    drawn = GivenDraws({purpose: tensor(values) for purpose, values in DRAWS.items()})
    batch = divide(config.branches, config.time, tensor(X), {"c": tensor(CONDITION)}, {"c": tensor(NULL)}, drawn)
    return losses_of(made, batch)


@pytest.mark.parametrize("preset", GOLDEN)
def test_terms(preset: str) -> None:
    found = losses(preset)
    assert {name: part.unweighted.item() for name, part in found.items()} == pytest.approx(GOLDEN[preset], rel=1e-10)


@pytest.mark.parametrize("preset", GOLDEN)
def test_weights_of_the_total(preset: str) -> None:
    weights = dict.fromkeys(GOLDEN[preset], 1.0) | TOTAL_WEIGHTS.get(preset, {})
    total = sum(part.loss for part in losses(preset).values()).item()
    assert total == pytest.approx(sum(weights[name] * value for name, value in GOLDEN[preset].items()), rel=1e-10)


def test_every_public_formulation_has_golden_numbers() -> None:
    assert (
        {"tutorial", "rcgm", "twinflow", "simpletuner", "flow_matching"} == set(GOLDEN) <= set(configuration.presets())
    )


# --- by hand ------------------------------------------------------------------------------------------------


def test_rcgm_base_by_hand() -> None:
    """Row 0: t = 0.8, r = 0.8 − 0.5·0.8 = 0.4, x_t = 0.8·z + 0.2·x = (−0.4, 0.6), v = z − x = (−1, 1).

    Guidance adds 0.5·(F̄(c) − F̄(∅)) = 0.5·0.6·(0.5 − 1) = −0.15 to v. F = 0.6·x_t + 0.2 − 0.3 + 0.25.
    t_m = max(0.8 − 0.25, 0.4) = 0.55, jumps 0.55 → 0.475 → 0.4, F̄ = 0.6·x + 0.3·t − 0.5·r + 0.3.
    """
    R = []
    for x_t, v in ((-0.4, -1.0), (0.6, 1.0)):
        v_star = v - 0.15
        F = 0.6 * x_t + 0.15
        x_0 = x_t - 0.25 * v_star
        F_0 = 0.6 * x_0 + 0.3 * 0.55 - 0.5 * 0.475 + 0.3
        x_1 = x_0 - 0.075 * F_0
        F_1 = 0.6 * x_1 + 0.3 * 0.475 - 0.5 * 0.4 + 0.3
        S = 0.075 * F_0 + 0.075 * F_1
        R.append((0.4 * F - S) / 0.25 - v_star)
    assert pytest.approx([0.90766, -0.30829]) == R  # inside the clamp
    assert losses("rcgm")["base"].per_row[0].item() == pytest.approx((0.90766**2 + 0.30829**2) / 2, rel=1e-10)


def test_tutorial_rectify_by_hand() -> None:
    """Row 0: F(z, 1, 0) = 0.6·z + 0.25 + 0.25 = (0.14, 0.98), x̂ = z − F = (−0.74, −0.18).

    τ = 0.3: x_τ = 0.3·z' + 0.7·x̂ = (−0.06 − 0.518, 0.15 − 0.126) = (−0.578, 0.024).
    Δv = F(x_τ, −τ, −τ) − F(x_τ, τ, τ) = (0.4 − 0.6)·x_τ + (−0.25 + 0.75 − 0.25 + 0.75)·τ = −0.2·x_τ + τ.
    """
    delta_v = [-0.2 * -0.578 + 0.3, -0.2 * 0.024 + 0.3]
    assert delta_v == pytest.approx([0.4156, 0.2952])
    found = losses("tutorial")["rectify"]
    mean_square = (0.4156**2 + 0.2952**2) / 2
    assert found.per_row[0].item() == pytest.approx(mean_square, rel=1e-10)
    assert found.aux["delta_v/rms"][0].item() == pytest.approx(math.sqrt(mean_square), rel=1e-10)


def test_twinflow_adversarial_by_hand() -> None:
    """Row 3, the only adv row: z_f = (−0.5, 0.6), c = 0, F(z_f, 1, 0) = 0.6·z_f + 0.25 = (−0.05, 0.61).

    x_f = (−0.45, −0.01); t = 0.4: x_t = 0.4·z + 0.6·x_f = (−0.12 − 0.27, 0.36 − 0.006) = (−0.39, 0.354).
    F(x_t, −t, −t) = 0.4·x_t − 0.1 + 0.3 = (0.044, 0.3416) against z − x_f = (0.15, 0.91).
    Barron at α = 1, c = 1e-3, without time weight on fake rows, over the batch's 4 rows.
    """
    m = ((0.044 - 0.15) ** 2 + (0.3416 - 0.91) ** 2) / 2
    assert m == pytest.approx(0.16715728)
    barron = m / math.sqrt(m / (1e-6 + 1e-8) + 1) / 1e-3
    found = losses("twinflow")["adversarial"]
    assert found.per_row.tolist() == pytest.approx([barron], rel=1e-10)
    assert found.loss.item() == pytest.approx(barron / 4, rel=1e-10)


def test_twinflow_base_of_the_one_step_row_by_hand() -> None:
    """Row 0 is e2e, (t, r) = (1, 0): x_t = z, v* = z − x = (−1, 1), not enhanced at t = 1; time weight 1.

    F = 0.6·z + 0.25 + 0.25; t_m = 0.75, jumps 0.75 → 0.375 → 0, F̄ = 0.6·x + 0.3·t − 0.5·r + 0.3.
    R is beyond ±1 in both elements and is clamped there, so m = 1 and the loss is Barron's at 1.
    """
    for z, v in ((-0.6, -1.0), (0.8, 1.0)):
        x_0 = z - 0.25 * v
        F_0 = 0.6 * x_0 + 0.3 * 0.75 - 0.5 * 0.375 + 0.3
        F_1 = 0.6 * (x_0 - 0.375 * F_0) + 0.3 * 0.375 + 0.3
        assert ((0.6 * z + 0.5) - 0.375 * (F_0 + F_1)) / 0.25 - v > 1
    found = losses("twinflow")["base"]
    assert found.per_row[0].item() == pytest.approx(1 / math.sqrt(1 / 1.01e-6 + 1) / 1e-3, rel=1e-10)
    assert found.aux["clamp/rcgm_frac"][0].item() == 1


def test_simpletuner_base_by_hand() -> None:
    """Row 0: t = 0.8, r = 0.4, the network is told r = 0: F = 0.6·x_t + 0.2 + 0.25, F̄ = 0.6·x + 0.3·t + 0.3.

    Grid 0.8, halfway to max(0.4, 0.8 − 0.25) = 0.55, i.e. 0.675, then 0.4; recursion from x_t itself.
    """
    R = []
    for x_t, v_star in ((-0.4, -1.15), (0.6, 0.85)):
        F_0 = 0.6 * x_t + 0.3 * 0.8 + 0.3
        x_1 = x_t - 0.125 * F_0
        F_1 = 0.6 * x_1 + 0.3 * 0.675 + 0.3
        R.append((0.6 * x_t + 0.45) - (0.125 * F_0 + 0.275 * F_1) - v_star)
    assert pytest.approx([1.2565, -0.371125]) == R  # the first is clamped to 1
    assert losses("simpletuner")["base"].per_row[0].item() == pytest.approx((1 + 0.371125**2) / 2, rel=1e-10)


def test_flow_matching_by_hand() -> None:
    """Row 2: t = r = 0.9, c = 1, x_t = 0.9·z + 0.1·x = (1.03, 0.12), F = 0.6·x_t + 0.225 − 0.675 + 0.5.

    F − v = (0.668 − 1.7, 0.122 + 0.2) = (−1.032, 0.322), the first clamped to −1.
    """
    assert losses("flow_matching")["base"].per_row[2].item() == pytest.approx((1 + 0.322**2) / 2, rel=1e-10)
