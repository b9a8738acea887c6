"""MeanFlow: closed forms of Gaussian data, a few lines of torch.func beside it, and what it does at t = r."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.objectives import batch_of, gradient, losses_of, objective_of
from tests.terms.test_closed_forms import GAUSSIAN_DATA, REAL, TIMES, Gaussian, noise, rows_of
from tests.terms.test_closed_forms import gaussian_flow as flow
from tests.terms.test_closed_forms import gaussian_velocity as velocity
from twinrl.config.errors import InputError
from twinrl.flow.conditions import Condition
from twinrl.flow.transport import interpolate, like
from twinrl.terms import Query
from twinrl.terms.mean_flow import MeanFlow, difference
from twinrl.terms.objective import Pass

PLAIN = ["guidance.strength=0", "branches={mul: 1, any: 1}"]


class Average(nn.Module):
    """The exact average velocity of N(μ, s²) plus a + b·x, with a = b = 0."""

    def __init__(self, mu: float, s: float):
        super().__init__()
        self.exact = Gaussian(mu, s)
        self.a, self.b = (nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        return self.exact(x, t, r, c) + self.a + self.b * x


class Curved(nn.Module):
    """A small network whose prediction depends on everything."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.outside = nn.Linear(20, 32).double(), nn.Linear(32, 18).double()

    def forward(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        hidden = self.inside(torch.cat([x.flatten(1), t[:, None], r[:, None]], 1)).tanh()
        return self.outside(hidden).view_as(x)


def context(network: nn.Module, x: Tensor) -> Pass:
    made, config = objective_of("meanflow", network, [*PLAIN, f"train.batch={len(x)}"])
    batch = batch_of(config, x, {}, {})
    return made.evaluate(batch, {name: len(at) for name, at in batch.branch.items()})


def points(times: str = "long") -> tuple[Query, Tensor]:
    """Points that Gaussian data pass, and the marginal velocity there."""
    t, r = TIMES[times]
    x_t = (1 - like(t, noise(0))) * REAL[0] + noise(0)
    return Query("own", x_t, t, r, {}), velocity(x_t, t, *REAL)


def test_the_exact_average_velocity_is_its_own_target() -> None:
    """(t − r)·F is the way from x_t to x_r, so v − (t − r)·dF/dt = F along the flow."""
    query, v = points()
    F = (query.x - flow(query.x, query.t, query.r, *REAL)) / like(query.t - query.r, v)
    found = v - like(query.t - query.r, v) * context(Average(*REAL), v).derivative(query, v)
    torch.testing.assert_close(found, F, rtol=1e-9, atol=1e-9)


def test_the_difference_converges_to_the_derivative() -> None:
    """Central inside: a quarter of the error at half the width."""
    query, v = points()
    inside = query.t < 0.95
    query, v = query.select(inside), v[inside]
    made = context(Average(*REAL), v)
    exact = made.derivative(query, v)
    errors = [(difference(query, v, made, width) - exact).abs().max().item() for width in (0.02, 0.01, 0.005)]
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([4, 4], rel=0.1)


@pytest.mark.parametrize("derivative", ["forward", "difference"])
@pytest.mark.parametrize("times", ["to data", "none", "none at the ends", "short"])
def test_no_time_leaves_the_unit_interval_and_equal_times_give_the_velocity(times: str, derivative: str) -> None:
    class Checked(Curved):
        def forward(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
            assert (t <= 1).all()
            assert (t >= r).all()
            return super().forward(x, t, r, c)

    t, r = TIMES[times]
    rows = rows_of(noise(1), noise(2), t, r)
    term, made = MeanFlow(MeanFlow.Config(derivative=derivative)), context(Checked(), rows.x)
    query = term.query(rows, made)
    made._velocity[rows.numbers] = rows.v
    value = term.target(rows, query, noise(3), made).value
    assert value.isfinite().all()
    assert torch.equal(value[t == r], rows.v[t == r])


def test_values_are_those_of_a_few_lines_of_torch_func() -> None:
    network, rows = Curved(), rows_of(noise(1), noise(2), *TIMES["long"])
    made, term = context(network, rows.x), MeanFlow(MeanFlow.Config())
    made._velocity[rows.numbers] = rows.v
    target = term.target(rows, term.query(rows, made), noise(3), made)

    def student(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t, rows.r, {})

    z = interpolate(rows.x, rows.z, rows.t)
    _, slope = torch.func.jvp(student, (z, rows.t), (rows.z - rows.x, torch.ones_like(rows.t)))
    gap = (rows.t - rows.r)[:, None, None, None]
    torch.testing.assert_close(target.value, rows.z - rows.x - gap * slope, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(target.aux["curvature/rms"], (gap * slope).square().mean((1, 2, 3)).sqrt())


@pytest.mark.parametrize(("exact", "rests"), [(REAL, True), ((-0.5, 0.6), False)])
def test_the_average_velocity_of_the_data_is_the_fixed_point(exact: Any, rests: bool) -> None:
    """Gradients of a and b over 40 batches: zero within 4.5 standard errors there, far from it elsewhere."""
    network, gradients = Average(*exact), []
    made, config = objective_of("meanflow", network, [*PLAIN, "train.batch=200"])
    for i, part in enumerate(GAUSSIAN_DATA.chunk(40)):
        sum(part.loss for part in losses_of(made, batch_of(config, part, {}, {}, seed=i)).values()).backward()
        gradients.append(gradient(network))
    stacked = torch.stack(gradients)
    off = (stacked.mean(0) / stacked.std(0) * 40**0.5).abs().max()
    assert off < 4.5 if rests else off > 20


def test_what_has_no_forward_derivative_is_one_line() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

    class Odd(Curved):
        def forward(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
            return Once.apply(super().forward(x, t, r, c))

    query, v = points()
    with pytest.raises(InputError, match=r"cannot be differentiated forwards; got .*; fix: use derivative: difference"):
        context(Odd(), v).derivative(query, v)
