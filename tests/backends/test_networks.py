"""What every registered network promises, and the check that refuses those that cannot do TwinFlow."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tests.rounding import assert_rounded
from twinrl.backends import MLP, NETWORKS, DiT, Spec, build_network, network_key, tells_trajectories_apart
from twinrl.backends.dit import patchify, unpatchify

SHAPE = (4, 8, 8)
TEXT = Spec(SHAPE, text_width=6)
LABEL = Spec(SHAPE, classes=10)
SMALL = {
    "mlp": {"width": 32, "depth": 2, "condition_width": 16},
    "dit": {"width": 16, "depth": 2, "heads": 2, "condition_width": 16},
    "unet": {"width": 8, "condition_width": 16},
}


def network(kind, spec=TEXT):
    torch.manual_seed(0)
    return NETWORKS[kind](NETWORKS[kind].Config(**SMALL[kind]), spec)


def perturbed(net):
    """A copy with every parameter moved: gates and embeddings that start at zero are open."""
    net = copy.deepcopy(net)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def batch(n=5):
    torch.manual_seed(2)
    t = torch.linspace(0.1, 1, n)
    return torch.randn(n, *SHAPE), t, {"text": torch.randn(n, 6)}


kinds = pytest.mark.parametrize("kind", sorted(NETWORKS))


@kinds
def test_every_registered_network_is_tested_small(kind):
    assert kind in SMALL


@kinds
def test_output_has_the_shape_of_the_latents(kind):
    x, t, condition = batch()
    assert network(kind)(x, t, t / 2, condition).shape == x.shape


@kinds
def test_output_at_equal_times_does_not_depend_on_the_second_embedding(kind):
    """At r = t ≥ 0 a student equals its teacher whatever the second-time and sign embeddings learnt."""
    x, t, condition = batch()
    teacher = perturbed(network(kind))
    student = copy.deepcopy(teacher)
    time = student.conditioning.time
    with torch.no_grad():
        for parameter in [*time.second.parameters(), time.sign]:
            parameter.add_(torch.randn_like(parameter))
    assert torch.equal(teacher(x, t, t, condition), student(x, t, t, condition))
    assert not torch.allclose(teacher(x, t, 0 * t, condition), student(x, t, 0 * t, condition))
    assert not torch.allclose(teacher(x, -t, -t, condition), student(x, -t, -t, condition))


@kinds
def test_a_new_network_ignores_target_time_and_sign(kind):
    """So the student starts as its teacher on every branch: Δv = 0, one jump = the teacher's prediction."""
    x, t, condition = batch()
    net = perturbed(network(kind))
    time = net.conditioning.time
    fresh = network(kind).conditioning.time
    time.second.load_state_dict(fresh.second.state_dict())
    time.sign.data.copy_(fresh.sign.data)
    assert torch.equal(net(x, t, t, condition), net(x, t, 0 * t, condition))
    assert torch.equal(net(x, t, t, condition), net(x, -t, -t, condition))


@kinds
def test_condition_matters(kind):
    x, t, condition = batch()
    net = perturbed(network(kind))
    other = {"text": condition["text"].flip(0)}
    assert not torch.allclose(net(x, t, t, condition), net(x, t, t, other))


@kinds
def test_text_scale_does_not_matter(kind):
    x, t, condition = batch()
    net = perturbed(network(kind))
    loud = {"text": 10 * condition["text"]}
    torch.testing.assert_close(net(x, t, t, condition), net(x, t, t, loud), atol=1e-3, rtol=1e-3)


@kinds
def test_labels_with_an_empty_one(kind):
    x, t, _ = batch()
    net = perturbed(network(kind, LABEL))
    empty = net(x, t, t, {"label": torch.full((5,), 10)})
    assert not torch.allclose(empty, net(x, t, t, {"label": torch.zeros(5, dtype=torch.long)}))


@kinds
@torch.no_grad()
def test_rows_do_not_mix(kind):
    x, t, condition = batch()
    net = perturbed(network(kind))
    alone = net(x[:1], t[:1], t[:1], {"text": condition["text"][:1]})
    assert_rounded(net(x, t, t, condition)[:1], alone, 1000)


@kinds
def test_every_parameter_can_learn(kind):
    x, t, condition = batch()
    net = perturbed(network(kind))
    real, jump, fake = net(x, t, t, condition), net(x, t, t / 3, condition), net(x, -t, -t, condition)
    (real.square().mean() + jump.square().mean() + fake.square().mean()).backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@kinds
def test_times_stay_exact_under_bf16_autocast(kind):
    """0.999 and 1.0 are one number in bfloat16; the time embedding must still tell them apart."""
    time = perturbed(network(kind)).conditioning.time
    t = torch.tensor([0.999, 1.0])
    with torch.autocast("cpu", torch.bfloat16):
        inside = time(t, t)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, time(t, t))


@kinds
def test_initial_weights_depend_on_the_seed_alone(kind):
    class Source:
        latent_shape, classes = SHAPE, ("a", "b")

        def null_condition(self, n):
            return {"text": torch.zeros(n, 6)}

    config = NETWORKS[kind].Config(**SMALL[kind])
    before = torch.random.get_rng_state()
    first, again, other = (build_network(config, Source(), seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@kinds
def test_configs_are_frozen_strict_and_documented(kind):
    config_class = NETWORKS[kind].Config
    with pytest.raises(ValidationError):
        config_class(unknown=1)
    with pytest.raises(ValidationError):
        config_class().width = 3
    assert config_class().kind == kind
    fields = config_class.model_fields
    assert [name for name, field in fields.items() if name != "kind" and not field.description] == []


def test_keys_tell_settings_apart():
    keys = [network_key(c) for c in (MLP.Config(), MLP.Config(width=128), DiT.Config())]
    assert len(set(keys)) == 3
    assert keys[0] == network_key(MLP.Config())


def test_patches_are_put_back():
    x = torch.randn(2, 4, 8, 6)
    assert torch.equal(unpatchify(patchify(x, 2), x, 2), x)


def test_a_patch_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="patch 3 does not divide"):
        DiT(DiT.Config(patch=3), TEXT)


def test_a_condition_without_text_or_label_is_refused():
    with pytest.raises(ValueError, match="'text' or 'label'"):
        Spec.of(SHAPE, {"mask": torch.zeros(1)}, 10)


class Blind(nn.Module):
    """Told only what ``see`` makes of the times."""

    def __init__(self, see):
        super().__init__()
        self.see = see
        self.layer = nn.Linear(1, SHAPE[0])

    def forward(self, x, t, r, condition):
        return x + self.layer(self.see(t, r)[:, None])[:, :, None, None]


@kinds
def test_registered_networks_tell_branches_apart(kind):
    net = network(kind)
    before = copy.deepcopy(net.state_dict())
    assert tells_trajectories_apart(net, SHAPE, {"text": torch.zeros(1, 6)})
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("see", "answer"),
    [
        (lambda t, r: t.abs(), False),
        (lambda t, r: t - r, False),
        (lambda t, r: t.abs() + (t - r), False),
        (lambda t, r: t, True),
        (lambda t, r: t.abs() + 0.1 * t.sign(), True),
    ],
)
def test_networks_that_cannot_tell_branches_apart_are_found(see, answer):
    assert tells_trajectories_apart(Blind(see), SHAPE, {"text": torch.zeros(1, 6)}) is answer
