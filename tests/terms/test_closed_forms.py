"""Closed forms: Gaussian and point-mass data, whose velocities, flows and scores are known, as the network.

Data N(μ, s²) per element with independent noise: x_t is N((1−t)μ, σ_t²) with σ_t² = t² + (1−t)²s², and

    v(x_t, t) = E[z − x | x_t] = −μ + (t − (1−t)s²)/σ_t² · (x_t − (1−t)μ)
    x_r = (1−r)μ + (σ_r/σ_t)·(x_t − (1−t)μ),   F(x_t, t, r) = (x_t − x_r)/(t − r)
    score(x_t, t) = −(x_t − (1−t)μ)/σ_t²

s = 0 is a point mass: a straight flow, v = F = (x_t − μ)/t for every r.

The fixed points: with the exact networks (real branch of the data, fake branch of the one-step samples) and no
guidance, every formulation rests: `tutorial`, `rcgm`, `twinflow`, `flow_matching`. `simpletuner` does not: its
base term pulls F to (1 + (t − r))·v, and with its two regressions on v the whole rests at (1 + (t − r)/3)·v.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.objectives import GivenDraws, batch_of, gradient, losses_of, objective_of
from twinrl.flow.branches import Rows
from twinrl.flow.conditions import Condition
from twinrl.flow.transport import interpolate, like
from twinrl.terms import TERMS, Query, Target
from twinrl.terms.rcgm import residual
from twinrl.terms.rectify import Rectify

B, SHAPE = 24, (2, 3, 3)
D = 18
Field = Callable[[Tensor, Tensor], Tensor]


def noise(seed: int, rows: int = B) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *SHAPE, generator=generator, dtype=torch.float64)


def uniform(seed: int, rows: int = B) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(t: Tensor, s: float) -> Tensor:
    """σ_t."""
    return (t**2 + (1 - t) ** 2 * s**2).sqrt()


def gaussian_velocity(x_t: Tensor, t: Tensor, mu: float, s: float) -> Tensor:
    t = like(t, x_t)
    return -mu + (t - (1 - t) * s**2) / spread(t, s) ** 2 * (x_t - (1 - t) * mu)


def gaussian_score(x_t: Tensor, t: Tensor, mu: float, s: float) -> Tensor:
    t = like(t, x_t)
    return -(x_t - (1 - t) * mu) / spread(t, s) ** 2


def gaussian_flow(x_t: Tensor, t: Tensor, r: Tensor, mu: float, s: float) -> Tensor:
    """x_r from x_t."""
    t, r = like(t, x_t), like(r, x_t)
    return (1 - r) * mu + spread(r, s) / spread(t, s) * (x_t - (1 - t) * mu)


class Gaussian:
    """The exact average velocity of N(μ, s²)."""

    def __init__(self, mu: float, s: float):
        self.mu, self.s = mu, s

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        average = (x - gaussian_flow(x, t, r, self.mu, self.s)) / like(t - r, x)
        return average.where(like(t != r, x), gaussian_velocity(x, t, self.mu, self.s))


def point_mass(x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
    """The exact F for data that are all 0.7, on either branch."""
    return (x - 0.7) / like(t.abs(), x)


def translation(x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
    """x = z − 0.4: every row has the same velocity."""
    return torch.full_like(x, 0.4)


class Given:
    """A context with an exact teacher and target velocity."""

    def __init__(self, teacher: Any, v_star: Tensor):
        self.teacher, self.v_star = teacher, v_star

    def target_velocity(self, rows: Rows) -> Tensor:
        return self.v_star


def rows_of(x: Tensor, z: Tensor, t: Tensor, r: Tensor) -> Rows:
    index = torch.arange(len(x))
    return Rows(index, x, z, t, r, {}, {}, GivenDraws({}), len(x))


TIMES = {
    "long": (0.3 + 0.7 * uniform(1), 0.25 * uniform(2)),
    "to data": (torch.ones(B).double(), torch.zeros(B).double()),
    "short": (0.5 + 0.4 * uniform(1), 0.5 + 0.4 * uniform(1) - 0.008 * uniform(2)),
    "exactly Δ": (torch.full((B,), 0.5).double(), torch.full((B,), 0.49).double()),
    "none": (0.1 + 0.9 * uniform(1), 0.1 + 0.9 * uniform(1)),
    "none at the ends": (torch.tensor([1.0, 0.5] * (B // 2)).double(), torch.tensor([1.0, 0.5] * (B // 2)).double()),
}


# --- base ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("flow", [point_mass, translation])
def test_residual_vanishes_on_straight_flows(flow: Any, order: int, times: str) -> None:
    """R = 0 for every order, t and r, at t = r without a NaN."""
    t, r = TIMES[times]
    z = noise(0)
    x = torch.full_like(z, 0.7) if flow is point_mass else z - 0.4
    x_t = interpolate(x, z, t)
    F = flow(x_t, t, r, {})
    R = residual(F, x_t, t, r, {}, z - x, flow, order, delta=0.01)
    assert R.abs().max() < 1e-9
    wrong = residual(F + 0.1, x_t, t, r, {}, z - x, flow, order, delta=0.01)
    assert (wrong.abs() > 0.05).all()


@pytest.mark.parametrize("order", [1, 2, 5])
def test_equal_times_are_guarded_against_nan(order: int) -> None:
    """Public code computes 0·∞ at t = r. Even a teacher that is NaN there must not reach R = F − v*."""
    t = uniform(1)

    def nan_teacher(x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        return torch.full_like(x, torch.nan)

    F, v = noise(0), noise(1)
    assert torch.equal(residual(F, noise(2), t, t, {}, v, nan_teacher, order, 0.01), F - v)


def test_residual_of_a_gaussian_vanishes_with_the_step() -> None:
    """A curved flow: with exact average velocities R is the error of one Euler step over Δ, hence O(Δ)."""
    exact, (t, r) = Gaussian(0.7, 0.4), TIMES["long"]
    x_t = (1 - like(t, noise(0))) * 0.7 + noise(0)
    v, F = gaussian_velocity(x_t, t, 0.7, 0.4), exact(x_t, t, r, {})
    errors = [residual(F, x_t, t, r, {}, v, exact, 2, delta).abs().max().item() for delta in (0.01, 0.005, 0.0025)]
    assert 0 < errors[2] < 0.05
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([2, 2], rel=0.05)


def test_order_does_not_matter_to_a_teacher_that_is_exact() -> None:
    """Jumps of the exact average velocity compose, so every N gives the same residual; an inexact one does not."""
    exact, (t, r) = Gaussian(0.7, 0.4), TIMES["long"]
    x_t = (1 - like(t, noise(0))) * 0.7 + noise(0)
    v, F = gaussian_velocity(x_t, t, 0.7, 0.4), exact(x_t, t, r, {})

    def euler(x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        return gaussian_velocity(x, t, 0.7, 0.4)

    for teacher, agree in ((exact, True), (euler, False)):
        first, *others = (residual(F, x_t, t, r, {}, v, teacher, order, 0.01) for order in (1, 2, 4))
        assert all(((first - other).abs().max() < 1e-10) == agree for other in others)


@pytest.mark.parametrize("order", [1, 3])
def test_teacher_is_never_asked_to_jump_backwards(order: int) -> None:
    """Also where t < r + Δ, whose value is not used: F̄ is defined for 0 ≤ r ≤ t only, and jumps end at r."""
    for t, r in TIMES.values():
        jumps: list[tuple[Tensor, Tensor]] = []

        def teacher(x: Tensor, t: Tensor, r: Tensor, c: Condition, jumps: list = jumps) -> Tensor:
            jumps.append((t, r))
            return x

        residual(noise(0), noise(1), t, r, {}, noise(2), teacher, order, 0.01)
        assert len(jumps) == order
        assert all((start >= end - 1e-12).all() and (end >= 0).all() for start, end in jumps)
        torch.testing.assert_close(jumps[-1][1], r)


@pytest.mark.parametrize("kappa", [0.25, 1.0])
def test_base_target_is_clamped_and_the_fraction_logged(kappa: float) -> None:
    """At t = r the target is F − clamp(F − v): v where they are near, κ closer where not."""
    t, z = uniform(1), noise(0)
    rows = rows_of(torch.full_like(z, 0.7), z, t, t)
    term = TERMS["base"](TERMS["base"].Config(clamp=kappa))
    F = rows.v + noise(1)
    target = term.target(rows, term.query(rows, None), F, Given(point_mass, rows.v))
    far = noise(1).abs() > kappa
    torch.testing.assert_close(target.value, torch.where(far, F - kappa * noise(1).sign(), rows.v))
    torch.testing.assert_close(target.aux["clamp/rcgm_frac"], far.double().flatten(1).mean(1))


@pytest.mark.parametrize("kind", ["base", "one_step_consistency"])
def test_straight_flow_is_the_fixed_point_of_the_recursive_terms(kind: str) -> None:
    z, (t, r) = noise(0), TIMES["long"]
    rows = rows_of(torch.full_like(z, 0.7), z, t, r)
    term = TERMS[kind](TERMS[kind].Config())
    query = term.query(rows, None)
    F = point_mass(query.x, query.t, query.r, {})
    target = term.target(rows, query, F, Given(point_mass, rows.v))
    torch.testing.assert_close(target.value, F, rtol=0, atol=1e-9)


# --- SimpleTuner's base ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("times", ["long", "to data", "none"])
@pytest.mark.parametrize("flow", [point_mass, translation])
def test_fixed_point_of_simpletuner_is_biased(flow: Any, times: str, order: int) -> None:
    """On a straight flow the target moves F = v by (t − r)·v and rests at F = (1 + (t − r))·v."""
    t, r = TIMES[times]
    z = noise(0)
    rows = rows_of(torch.full_like(z, 0.7) if flow is point_mass else z - 0.4, z, t, r)
    term = TERMS["simpletuner_base"](TERMS["simpletuner_base"].Config(order=order, clamp=100))
    query, context = term.query(rows, None), Given(flow, rows.v)
    v, gap = rows.v, like(t - r, z)
    resting = term.target(rows, query, (1 + gap) * v, context).value
    torch.testing.assert_close(resting, (1 + gap) * v, rtol=1e-10, atol=1e-10)
    from_exact = term.target(rows, query, v, context).value
    torch.testing.assert_close(from_exact, v + gap * v, rtol=1e-10, atol=1e-10)


def test_simpletuner_and_base_agree_only_where_there_is_no_jump() -> None:
    z, (t, r) = noise(0), TIMES["long"]
    for target_time, agree in ((t, True), (r, False)):
        rows = rows_of(torch.full_like(z, 0.7), z, t, target_time)
        targets = []
        for kind in ("base", "simpletuner_base"):
            term = TERMS[kind](TERMS[kind].Config(clamp=100))
            targets.append(term.target(rows, term.query(rows, None), rows.v, Given(point_mass, rows.v)).value)
        assert torch.allclose(*targets, atol=1e-10) == agree


# --- rectify ------------------------------------------------------------------------------------------------

REAL, FAKE = (0.8, 0.3), (-0.5, 0.6)  # (μ, s)


class Twins(nn.Module):
    """Real branch: velocity of N(μ1, s1²); fake branch: of N(μ2, s2²); at (1, 0) one free number per element."""

    def __init__(self, jump: Tensor):
        super().__init__()
        self.jump = nn.Parameter(jump)

    def forward(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        real, fake = gaussian_velocity(x, t.abs(), *REAL), gaussian_velocity(x, t.abs(), *FAKE)
        return torch.where(like((t == 1) & (r == 0), x), self.jump, torch.where(like(t < 0, x), fake, real))


def rectify_descent(term: Rectify) -> dict[str, Tensor]:
    """How one step of descent on the term moves x̂, beside the analytic fields at (x_τ, τ)."""
    z, z_renoise, tau = noise(0), noise(1), 0.05 + 0.9 * uniform(2)
    jump = z - (FAKE[0] + FAKE[1] * noise(3))  # x̂ is a sample of the fake distribution
    rows = rows_of(torch.zeros_like(z), z, torch.ones(B).double(), torch.zeros(B).double())
    network = Twins(jump)
    drawn = {"renoise noise": z_renoise, "renoise time": tau}
    rows = Rows(*(getattr(rows, f) for f in ("index", "x", "z", "t", "r", "c", "null")), GivenDraws(drawn), B)

    class Context:
        def both_branches(self, x: Tensor, tau: Tensor, c: Condition) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                return network(x, -tau, -tau, c), network(x, tau, tau, c)

    query = term.query(rows, Context())  # type: ignore[arg-type]
    F = network(query.x, query.t, query.r, {})
    target = term.target(rows, query, F.detach(), Context())  # type: ignore[arg-type]
    loss = term.loss(rows, query, F, target.value)
    loss.mean().backward()
    x_tau = interpolate(z - jump, z_renoise, tau)
    return {
        "loss": loss.detach(), "gradient": network.jump.grad, "moved": network.jump.grad,  # x̂ = z − jump: minus twice
        "delta_v": gaussian_velocity(x_tau, tau, *FAKE) - gaussian_velocity(x_tau, tau, *REAL),
        "scores": gaussian_score(x_tau, tau, *REAL) - gaussian_score(x_tau, tau, *FAKE),
        "tau": like(tau, z), "rms": target.aux["delta_v/rms"], "clamped": target.aux["clamp/delta_v_frac"],
    }  # fmt: skip


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / a.norm() / b.norm())


def rectify(**settings: Any) -> Rectify:
    return Rectify(Rectify.Config(**settings))


def test_rectify_gradient_is_the_analytic_velocity_difference() -> None:
    """∂/∂F of mean_B ‖F − sg(F − Δv)‖²/D is 2Δv/(B·D); descent therefore moves x̂ = z − F along +Δv."""
    found = rectify_descent(rectify())
    torch.testing.assert_close(found["gradient"], 2 * found["delta_v"] / (B * D), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(found["loss"], found["delta_v"].square().flatten(1).mean(1))
    torch.testing.assert_close(found["rms"], found["delta_v"].square().flatten(1).mean(1).sqrt())


def test_rectify_descends_from_the_fake_to_the_real_distribution() -> None:
    """Along s_real − s_fake = ((1−τ)/τ)·Δv, and on average towards the real mean."""
    found = rectify_descent(rectify())
    scaled = (1 - found["tau"]) / found["tau"] * found["delta_v"]
    torch.testing.assert_close(scaled, found["scores"], rtol=1e-9, atol=1e-9)
    assert cosine(found["moved"], found["delta_v"]) == pytest.approx(1)
    assert (found["moved"] * found["scores"]).flatten(1).sum(1).min() > 0
    assert found["moved"].mean() * (REAL[0] - FAKE[0]) > 0


class Flipped(Rectify):
    """The sign error that the loss value cannot show."""

    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Any) -> Target:
        right = super().target(rows, query, F, ctx)
        return Target(2 * F - right.value, right.aux)


def test_flipped_sign_is_seen_in_the_gradient_and_not_in_the_loss() -> None:
    right, flipped = rectify_descent(rectify()), rectify_descent(Flipped(Flipped.Config()))
    torch.testing.assert_close(flipped["loss"], right["loss"])
    assert cosine(flipped["moved"], right["delta_v"]) == pytest.approx(-1)


def test_score_weight_makes_it_the_difference_of_scores() -> None:
    found = rectify_descent(rectify(score_weight=True))
    torch.testing.assert_close(found["gradient"], 2 * found["scores"] / (B * D), rtol=1e-9, atol=1e-12)


def test_clamp_of_delta_v() -> None:
    found = rectify_descent(rectify(clamp=1.5))
    delta_v = found["delta_v"]
    torch.testing.assert_close(found["gradient"], 2 * delta_v.clamp(-1.5, 1.5) / (B * D), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(found["clamped"], (delta_v.abs() > 1.5).double().flatten(1).mean(1))
    assert 0.1 < found["clamped"].mean() < 0.99


def test_rectify_rests_where_both_branches_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "FAKE", REAL)
    assert rectify_descent(rectify())["gradient"].abs().max() < 1e-10


# --- regressions ----------------------------------------------------------------------------------------------


class Perturbed(nn.Module):
    """A velocity field plus a + b·x with a = b = 0: the gradient of a and b is zero where the field is right."""

    def __init__(self, velocity: Field, jump: Field | None = None):
        super().__init__()
        self.velocity, self.jump = velocity, jump or (lambda x, t: torch.zeros_like(x))
        self.a, self.b = (nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        inside = self.velocity(x, t) + self.a + self.b * x
        return inside.where(like((t != 1) | (r != 0), x), self.jump(x, t))


def deviations(preset: str, overrides: list[str], network: Perturbed, x: Tensor) -> Tensor:
    """The gradients of a and b over 40 batches, in standard errors of their means."""
    made, config = objective_of(preset, network, [*overrides, "guidance.strength=0", f"train.batch={len(x) // 40}"])
    gradients = []
    for i, part in enumerate(x.chunk(40)):
        batch = batch_of(config, part, {}, {}, seed=i)
        sum(part.loss for part in losses_of(made, batch).values()).backward()
        gradients.append(gradient(network))
    stacked = torch.stack(gradients)
    return stacked.mean(0) / stacked.std(0) * 40**0.5


GAUSSIAN_DATA = REAL[0] + REAL[1] * noise(5, 8000)


def real(x: Tensor, t: Tensor) -> Tensor:
    return gaussian_velocity(x, t.abs(), *REAL)


def fake(x: Tensor, t: Tensor) -> Tensor:
    return gaussian_velocity(x, t.abs(), *FAKE)


def only(term: str) -> list[str]:
    """Overrides that leave the tutorial one term."""
    names = ("base", "real_velocity", "adversarial", "rectify", "one_step_consistency")
    return [f"terms.{name}=null" for name in names if name != term]


@pytest.mark.parametrize(("preset", "overrides"), [("tutorial", only("real_velocity")), ("flow_matching", [])])
def test_marginal_velocity_is_the_fixed_point_of_flow_matching(preset: str, overrides: list[str]) -> None:
    """Gradient zero within 4.5 standard errors at v(x_t, t) of the data, far from it at another velocity.

    The flow-matching preset clamps F − v at ±1; the residual is symmetric about its mean, so that the clamp
    does not move the fixed point.
    """
    assert deviations(preset, overrides, Perturbed(real), GAUSSIAN_DATA).abs().max() < 4.5
    assert deviations(preset, overrides, Perturbed(fake), GAUSSIAN_DATA).abs().max() > 20


def one_step_sampler(z: Tensor, t: Tensor) -> Tensor:
    """F(z, 1, 0) of a generator whose samples are x̂ = μ2 + s2·z."""
    return z - (FAKE[0] + FAKE[1] * z)


@pytest.mark.parametrize("settings", ["{sample: fresh}", "{sample: fresh, time: uniform}"])
def test_velocity_of_the_samples_is_the_fixed_point_of_adversarial(settings: str) -> None:
    """The one-step samples are N(μ2, s2²), so the fake branch rests at *their* velocity, not the data's."""
    overrides = [*only("adversarial"), f"terms.adversarial={settings}"]
    assert deviations("tutorial", overrides, Perturbed(fake, one_step_sampler), GAUSSIAN_DATA).abs().max() < 4.5
    assert deviations("tutorial", overrides, Perturbed(real, one_step_sampler), GAUSSIAN_DATA).abs().max() > 20


@pytest.mark.parametrize("settings", ["{sample: shared}", "{sample: fresh, path_noise: sample}"])
def test_adversarial_on_the_path_of_its_own_noise_rests_at_the_coupled_velocity(settings: str) -> None:
    """Where the path ends in the noise that made the sample, x_t gives z and x̂ away: the loss itself is zero.

    z = (x_t − (1−t)μ2)/(t + (1−t)s2), as x_t = t·z + (1−t)·(μ2 + s2·z).
    """

    def coupled(x_t: Tensor, t: Tensor) -> Tensor:
        t = like(t.abs(), x_t)
        z = (x_t - (1 - t) * FAKE[0]) / (t + (1 - t) * FAKE[1])
        return z - (FAKE[0] + FAKE[1] * z)

    for field, rests in ((coupled, True), (fake, False)):
        overrides = [*only("adversarial"), f"terms.adversarial={settings}"]
        made, config = objective_of("tutorial", Perturbed(field, one_step_sampler), overrides)
        losses = losses_of(made, batch_of(config, GAUSSIAN_DATA[:100], {}, {}))
        assert (losses["adversarial"].per_row.max() < 1e-20) == rests


@pytest.mark.parametrize("sample", ["shared", "fresh"])
def test_adversarial_does_not_train_the_one_step_jump(sample: str) -> None:
    """x_f = sg(z − F(z, 1, 0)): the fake branch learns from samples, samples learn nothing from it."""

    class Branches(Perturbed):
        def forward(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
            return torch.where(like((t == 1) & (r == 0), x), (1 + self.a) * x, (1 + self.b) * x)

    network = Branches(real)
    overrides = [*only("adversarial"), f"terms.adversarial.sample={sample}"]
    made, config = objective_of("tutorial", network, overrides)
    losses_of(made, batch_of(config, GAUSSIAN_DATA[:50], {}, {}))["adversarial"].loss.backward()
    assert network.a.grad is None or network.a.grad == 0
    assert network.b.grad.abs() > 1e-3


# --- whole formulations ---------------------------------------------------------------------------------------


class PointMass(nn.Module):
    """The exact network of data that are all 0.7, on both branches, plus a + b·x with a = b = 0."""

    def __init__(self, scale: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2))
        self.scale = scale or torch.ones_like

    def forward(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        return point_mass(x, t, r, c) * like(self.scale(t - r), x) + self.a + self.b * x


@pytest.mark.parametrize("preset", ["tutorial", "rcgm", "twinflow", "flow_matching"])
@pytest.mark.parametrize("strength", [0.0, 0.8])
def test_formulations_rest_at_the_exact_point_mass(preset: str, strength: float) -> None:
    """Every loss and gradient is zero there; guidance adds nothing as the network does not use its condition."""
    network = PointMass()
    made, config = objective_of(preset, network, [f"guidance.strength={strength}"])
    losses = losses_of(made, batch_of(config, torch.full((B, *SHAPE), 0.7, dtype=torch.float64), {}, {}))
    assert set(losses) == set(config.terms)
    for name, part in losses.items():
        assert part.per_row.abs().max() < 1e-7, name  # Barron near zero is m/c
    sum(part.loss for part in losses.values()).backward()
    assert gradient(network).abs().max() < 1e-5


def simpletuner_gradient(scale: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, …) gradient of the non-adversarial losses with respect to F = scale(t − r)·v at (x_t, t, r)."""
    z, (t, r) = noise(0), TIMES["long"]
    rows = rows_of(torch.full_like(z, 0.7), z, t, r)
    _, config = objective_of("simpletuner", PointMass())
    F = (like(scale(t - r), z) * rows.v).requires_grad_()
    for name in ("flow_matching", "base", "real_velocity"):
        settings = config.terms[name]
        term = TERMS[settings.kind](settings.model_copy(update={"clamp": 1e3} if name == "base" else {}))
        query = term.query(rows, None)
        target = term.target(rows, query, F.detach(), Given(point_mass, rows.v))
        (settings.weight * term.loss(rows, query, F, target.value).sum()).backward()
    return F.grad


def test_simpletuner_as_a_whole_rests_off_the_exact_network() -> None:
    """Two regressions on v and one target (1 + (t − r))·v with equal weights balance at (1 + (t − r)/3)·v."""
    assert simpletuner_gradient(lambda gap: 1 + gap / 3).abs().max() < 1e-10
    assert simpletuner_gradient(torch.ones_like).abs().mean() > 1e-2
    assert simpletuner_gradient(lambda gap: 1 + gap).abs().mean() > 1e-2


def test_simpletuner_differs_from_the_others_at_the_exact_network() -> None:
    """Its base loss there is the square of the bias, min((t − r)·|v|, κ); its other losses are zero."""
    made, config = objective_of("simpletuner", PointMass(), ["model.target_time=true"])
    batch = batch_of(config, torch.full((B, *SHAPE), 0.7, dtype=torch.float64), {}, {})
    losses = losses_of(made, batch)
    bias = (like(batch.rows.t - batch.rows.r, batch.rows.x) * batch.rows.v).clamp(-1, 1)
    torch.testing.assert_close(losses["base"].per_row, bias.square().flatten(1).mean(1), rtol=1e-9, atol=1e-12)
    assert all(losses[name].per_row.abs().max() < 1e-10 for name in losses if name != "base")
