"""The UNet: shapes at awkward sizes, what it can tell apart, and that all of it learns."""

import pytest
import torch
from pydantic import ValidationError

from tests.rounding import assert_rounded
from twinrl.backends import NETWORKS, tells_trajectories_apart
from twinrl.backends.embedding import Spec, gaussian_velocity
from twinrl.backends.unet import UNet

MNIST = Spec((1, 28, 28), classes=10)


def network(spec=MNIST, **settings):
    torch.manual_seed(0)
    return UNet(UNet.Config(**{"width": 8, "condition_width": 16, **settings}), spec)


def opened(net):
    """``net`` with its zero-initialised parameters moved, as after some training."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def batch(shape=(1, 28, 28), rows=4):
    torch.manual_seed(1)
    t = torch.linspace(0.1, 1, rows)
    return torch.randn(rows, *shape), t, t / 2, {"label": torch.arange(rows)}


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 7, 7), (4, 8, 8), (2, 9, 13)])
def test_output_has_the_shape_of_the_input_at_any_size(shape):
    x, t, r, condition = batch(shape)
    assert opened(network(Spec(shape, classes=10)))(x, t, r, condition).shape == x.shape


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (2, 1, 3), (1, 1, 1, 1)])
def test_any_number_of_resolutions(multipliers):
    x, t, r, condition = batch()
    net = opened(network(multipliers=multipliers))
    assert len(net.down) == len(net.up) == len(multipliers)
    assert net(x, t, r, condition).isfinite().all()


def test_bottleneck_of_28_pixels_is_7_by_7():
    seen = []
    net = network()
    net.attention.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    net(*batch())
    assert seen == [(4, 32, 7, 7)]


def test_default_has_the_size_of_the_public_tutorial_network():
    assert sum(p.numel() for p in UNet(UNet.Config(), MNIST).parameters()) == pytest.approx(1.9e6, rel=0.1)


def test_starts_at_the_velocity_of_gaussian_data():
    x, t, r, condition = batch()
    net = network()
    with torch.no_grad():
        net.leave.bias.zero_()
        torch.testing.assert_close(net(x, t, r, condition), gaussian_velocity(x, t))


def test_branches_can_be_told_apart():
    assert tells_trajectories_apart(network(), (1, 28, 28), {"label": torch.tensor([3])})


def test_label_and_both_times_change_the_output():
    x, t, r, condition = batch()
    net = opened(network())
    base = net(x, t, r, condition)
    others = {
        "label": net(x, t, r, {"label": condition["label"] + 1}),
        "empty": net(x, t, r, {"label": torch.full((4,), 10)}),
        "t": net(x, t * 0.9, r, condition),
        "r": net(x, t, r * 0.5, condition),
        "sign": net(x, -t, -r, condition),
    }
    for name, other in others.items():
        assert ((base - other).flatten(1).norm(dim=1) > 1e-5).all(), name


@torch.no_grad()
def test_rows_do_not_mix():
    x, t, r, condition = batch()
    net = opened(network())
    alone = net(x[1:2], t[1:2], r[1:2], {"label": condition["label"][1:2]})
    assert_rounded(net(x, t, r, condition)[1:2], alone, 3000)  # some 20 layers of up to 9 × 32 products


@pytest.mark.parametrize("attention", [True, False])
def test_gradient_reaches_every_parameter(attention):
    x, t, r, condition = batch()
    t = t * torch.tensor([1, -1, 1, -1])
    net = opened(network(attention=attention))
    net(x, t, r, condition).square().mean().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_dropout_acts_in_training_alone():
    net, inputs = opened(network(dropout=0.5)), batch()
    assert not torch.equal(net(*inputs), net(*inputs))
    net.eval()
    assert torch.equal(net(*inputs), net(*inputs))


def test_parameters_are_contiguous_as_sharding_wants_them():
    assert all(p.is_contiguous() for p in network().parameters())


def test_output_is_contiguous_for_several_channels():
    x, t, r, condition = batch((4, 8, 8))
    assert opened(network(Spec((4, 8, 8), classes=10)))(x, t, r, condition).is_contiguous()


@pytest.mark.parametrize(
    "wrong",
    [{"width": 12}, {"width": 0}, {"heads": 3}, {"multipliers": ()}, {"multipliers": (1, 0)}, {"depth": 2}],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        UNet.Config(**wrong)


def test_is_registered_under_its_kind():
    assert NETWORKS[UNet.Config().kind] is UNet
