"""Distribution matching with a second network: closed forms of Gaussian data, the paper's algorithm beside it, its
fixed point, and which network each loss moves."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.objectives import GivenDraws, batch_of, counts_of, gradient, objective_of
from tests.terms.test_closed_forms import GAUSSIAN_DATA, REAL, SHAPE, B, Gaussian, noise, uniform
from tests.terms.test_closed_forms import gaussian_velocity as velocity
from tests.terms.test_mean_flow import Average
from twinrl.flow.branches import Rows
from twinrl.flow.transport import like
from twinrl.terms import Target
from twinrl.terms.dmd import DMD

FAKE = (-0.4, 0.9)
"""Of the samples."""
TAU = 0.02 + 0.96 * uniform(4)


class Networks:
    """A context: the real velocity is that of :data:`REAL`, the own one and the student are given."""

    def __init__(self, own: Any, student: Any = None):
        self.teacher, self.student = Gaussian(*REAL), student
        self.asked = own

    def own(self, term: Any, *asked: Any) -> Tensor:
        return self.asked(*asked)  # type: ignore[no-any-return]


def jumps(n: int = B) -> Rows:
    """Rows of the one-step jump with the draws that the term asks for."""
    drawn = GivenDraws({"dmd time": TAU, "dmd noise": noise(5, n)})
    return Rows(torch.arange(n), noise(1, n), noise(2, n), torch.ones(n).double(), torch.zeros(n).double(), {}, {},
                drawn, n, jump=True)  # fmt: skip


def target_of(own: Any, F: Tensor, **config: Any) -> Target:
    term, rows, ctx = DMD(DMD.Config(**config)), jumps(), Networks(own)
    return term.target(rows, term.query(rows, ctx), F, ctx)  # type: ignore[arg-type]


def estimate(x: Tensor, tau: Tensor, mu: float, s: float) -> Tensor:
    """E[x₀ | x_τ] of N(μ, s²)."""
    tau = like(tau, x)
    gain = (1 - tau) * s**2 / (tau**2 + (1 - tau) ** 2 * s**2)
    return mu + gain * (x - (1 - tau) * mu)


@pytest.mark.parametrize("normalise", [False, True])
def test_the_direction_is_the_difference_of_the_estimates(normalise: bool) -> None:
    """g = (x₀,fake − x₀,real)/w with the posterior means of two Gaussians."""
    F = noise(3)
    samples = noise(2) - F
    x_tau = like(TAU, F) * noise(5) + (1 - like(TAU, F)) * samples
    real, fake = estimate(x_tau, TAU, *REAL), estimate(x_tau, TAU, *FAKE)
    found = target_of(Gaussian(*FAKE), F, normalise=normalise).value - F
    expected = fake - real
    if normalise:
        expected = expected / (samples - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_gradient_is_that_of_the_papers_algorithm() -> None:
    """Written from algorithm 1 of DMD for x₀ predictions: loss ½·mse(x, sg(x − grad)), here at F = z − x."""
    F = noise(3).requires_grad_()
    x = noise(2) - F
    x_tau = like(TAU, F) * noise(5) + (1 - like(TAU, F)) * x.detach()
    p_real = x.detach() - estimate(x_tau, TAU, *REAL)
    p_fake = x.detach() - estimate(x_tau, TAU, *FAKE)
    grad = (p_real - p_fake) / p_real.abs().mean(dim=[1, 2, 3], keepdim=True)
    (expected,) = torch.autograd.grad(0.5 * nn.functional.mse_loss(x, (x - grad).detach()), F)
    term, rows = DMD(DMD.Config(weight=0.5)), jumps()
    target = target_of(Gaussian(*FAKE), F.detach())
    loss = term.loss(rows, term.query(rows, Networks(None)), F, target.value)  # type: ignore[arg-type]
    (found,) = torch.autograd.grad(term.config.weight * loss.mean(), F)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_samples_move_towards_the_data_and_rest_there() -> None:
    """In the mean over samples of N(μ', s'²), x̂ = z − F moves from μ' towards μ; nothing moves where both are alike."""
    samples = FAKE[0] + FAKE[1] * noise(7)
    F = noise(2) - samples
    moved = F - target_of(Gaussian(*FAKE), F).value  # of the sample
    assert moved.mean() * (REAL[0] - FAKE[0]) > 0
    assert moved.mean().abs() > 4.5 * moved.std() / moved.numel() ** 0.5
    assert torch.equal(target_of(Gaussian(*REAL), F).value, F)


def test_a_sample_that_is_its_own_estimate_divides_by_nothing() -> None:
    point = noise(1)
    drawn = jumps()
    x_tau = like(TAU, point) * noise(5) + (1 - like(TAU, point)) * point
    ctx = Networks(Gaussian(*FAKE))
    ctx.teacher = lambda *asked: (x_tau - point) / like(TAU, point)  # type: ignore[assignment]
    term = DMD(DMD.Config())
    value = term.target(drawn, term.query(drawn, ctx), noise(2) - point, ctx).value  # type: ignore[arg-type]
    assert not value.isnan().any()


@pytest.mark.parametrize(("exact", "rests"), [(FAKE, True), (REAL, False)])
def test_the_own_network_rests_at_the_flow_of_the_samples(exact: tuple[float, float], rests: bool) -> None:
    """Gradients of a and b over 40 draws: zero within 4.5 standard errors at the samples' own flow, far off else."""
    made, config = objective_of("dmd2", Average(*FAKE), ["train.batch=200"])
    own, term = Average(*exact), made.terms["dmd"]
    made.own["dmd"] = own  # type: ignore[index]
    assert isinstance(term, DMD)
    gradients = []
    for seed in range(40):
        batch = batch_of(config, GAUSSIAN_DATA[:200], {}, {}, seed)
        term.own_losses(batch.rows, made.evaluate(batch, counts_of(batch)), seed).mean().backward()
        gradients.append(gradient(own))
        assert all(p.grad is None for p in made.teacher.student.parameters())
    stacked = torch.stack(gradients)
    off = (stacked.mean(0) / stacked.std(0) * 40**0.5).abs().max()
    assert off < 4.5 if rests else off > 20


def test_the_students_loss_moves_the_student_alone() -> None:
    made, config = objective_of("dmd2", Average(*FAKE), ["train.batch=8"])
    batch = batch_of(config, noise(0, 8), {}, {})
    made.evaluate(batch, counts_of(batch)).losses()["dmd"].loss.backward()
    assert all(p.grad is not None for p in made.teacher.student.parameters())
    assert all(p.grad is None for p in made.own["dmd"].parameters())


def test_each_own_step_has_noise_of_its_own() -> None:
    made, config = objective_of("dmd2", Average(*FAKE), ["train.batch=8"])
    batch, term = batch_of(config, noise(0, 8), {}, {}), made.terms["dmd"]
    assert isinstance(term, DMD)
    first, second, again = (
        term.own_losses(batch.rows, made.evaluate(batch, counts_of(batch)), update) for update in (0, 1, 0)
    )
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_velocities_are_those_of_the_estimates() -> None:
    """v = (x_τ − E[x₀ | x_τ])/τ, which the comparison above rests on."""
    x = noise(0)
    torch.testing.assert_close((x - estimate(x, TAU, *REAL)) / like(TAU, x), velocity(x, TAU, *REAL))
    assert x.shape == (B, *SHAPE)
