"""The fixed protocol: the same numbers whatever surrounds it, no trace left, divergence recorded."""

import math
from collections.abc import Mapping

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tests.evaluation.toy import CLASSES, SHAPE, Exact, ToySource
from tests.rounding import assert_rounded
from twinrl.evaluation import EvaluationConfig, LabelProtocol
from twinrl.evaluation.isolation import undisturbed
from twinrl.evaluation.protocol import VELOCITY_TIMES, balanced_rows
from twinrl.flow import draws
from twinrl.run import names
from twinrl.sampling import euler, few_step


class Broken(Exact):
    """A diverged student: the first ``bad`` of each chunk's samples are not finite."""

    def __init__(self, bad: int, value: float = math.nan):
        super().__init__()
        self.bad, self.value = bad, value

    def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        F = super().forward(x, t, r, condition)
        F[: self.bad, 0, 0, 0] = self.value
        return F


class TestConfig:
    def test_unknown_keys_are_refused(self):
        with pytest.raises(ValidationError, match="did you mean"):
            EvaluationConfig.model_validate({"evry": 3})

    def test_every_field_is_described(self):
        assert all(field.description for field in EvaluationConfig.model_fields.values())


class TestBalancedRows:
    @pytest.mark.parametrize("n", [8, 10, 37])
    def test_classes_differ_by_one_at_most(self, n: int):
        labels = torch.cat([torch.full((count,), label) for label, count in enumerate((30, 12, 50))])
        rows = balanced_rows(labels, n, 0, "test")
        counts = labels[rows].bincount(minlength=3)
        assert len(rows.unique()) == n
        assert counts.max() - counts.min() <= 1 or counts[1] == 12

    def test_a_scarce_class_is_used_up(self):
        labels = torch.tensor([0] * 20 + [1] * 3)
        assert labels[balanced_rows(labels, 16, 0, "test")].bincount().tolist() == [13, 3]

    def test_keyed(self):
        labels = torch.arange(40) % 4
        assert torch.equal(balanced_rows(labels, 8, 0, "a"), balanced_rows(labels, 8, 0, "a"))
        assert not torch.equal(balanced_rows(labels, 8, 0, "a"), balanced_rows(labels, 8, 1, "a"))


class TestWhatIsFixed:
    def test_all_sets_have_n_images(self, source: ToySource):
        # 120 validation and 160 test images: two sets of at most 140 real images
        sizes = [LabelProtocol(source, EvaluationConfig(n=500), split).n for split in ("validation", "test")]
        assert sizes == [120, 140]

    def test_reference_and_floor_images_are_disjoint(self, source: ToySource, config: EvaluationConfig):
        protocol = LabelProtocol(source, config, "test")
        together = torch.cat([protocol.reference.features, protocol.other.features])
        assert len(together.unique(dim=0)) == 2 * protocol.n

    def test_labels_are_balanced_and_prompts_follow(self, protocol: LabelProtocol):
        assert protocol.labels.bincount().tolist() == [25] * 4
        assert protocol.prompts == [CLASSES[label] for label in protocol.labels]

    def test_validation_judges_no_test_reference(self, protocol: LabelProtocol, source: ToySource):
        pixels = source.validation.pixels[protocol.rows]
        assert torch.equal(protocol.reference.features, source.judge.features(pixels).double())

    def test_the_run_decides_nothing(
        self, source: ToySource, config: EvaluationConfig, protocol: LabelProtocol, network: Exact
    ):
        torch.manual_seed(99)
        again = LabelProtocol(source, config)
        assert again.evaluate(network) == protocol.evaluate(network)

    def test_the_protocol_seed_decides(self, source: ToySource, config: EvaluationConfig, protocol: LabelProtocol):
        other = LabelProtocol(source, config.model_copy(update={"seed": 1}))
        assert not torch.equal(other.noise(4, "x"), protocol.noise(4, "x"))
        assert other.floor != protocol.floor

    def test_draws_of_noise_differ(self, protocol: LabelProtocol, network: Exact):
        first, again, second = (protocol.samples(network, few_step(1), draw) for draw in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.isclose(first, second).flatten(1).all(1).any()

    def test_no_step_noise_is_shared_between_chunks(self, protocol: LabelProtocol, config: EvaluationConfig):
        def data_is_zero(x: Tensor, t: Tensor, r: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
            return x if float(t[0]) > 0.9 else torch.zeros_like(x)

        pixels = protocol.samples(data_is_zero, few_step(2)).flatten(1)
        first, second = pixels[: config.batch], pixels[config.batch : 2 * config.batch]
        # What is left is the second step's noise, of size 0.3, and 0.0002 of the start noise (t begins at 0.999).
        assert not torch.isclose(first, second, rtol=0, atol=0.02).all(1).any()


class TestQuality:
    def test_a_perfect_generator_reaches_the_floor(self, protocol: LabelProtocol, network: Exact):
        metrics = protocol.quality(network, few_step(1))
        assert metrics["val/fd_1nfe"] < 3 * protocol.floor["fd"]
        assert abs(metrics["val/kid_1nfe"]) < 1e-3
        assert metrics["val/accuracy_1nfe"] == 1
        assert metrics["val/recall_1nfe"] > 0.8
        assert metrics["val/nonfinite_frac_1nfe"] == 0

    def test_the_wrong_class_is_seen_by_accuracy_alone(self, protocol: LabelProtocol):
        class Confused(Exact):
            def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
                label = condition["label"]
                swapped = torch.where(label == 0, 1, torch.where(label == 1, 0, label))
                return super().forward(x, t, r, {"label": swapped})

        metrics = protocol.quality(Confused(), few_step(1))
        assert metrics["val/accuracy_1nfe"] == 0.5
        assert [metrics[names.accuracy(name, 1)] for name in CLASSES] == [0, 0, 1, 1]
        assert abs(metrics["val/kid_1nfe"]) < 1e-3

    def test_a_shift_worsens_the_distances_only_by_degrees(self, protocol: LabelProtocol, network: Exact):
        values = []
        for shift in (0.0, 0.1, 0.2):
            nn.init.constant_(network.shift, shift)
            values.append(protocol.quality(network, few_step(1))["val/kid_1nfe"])
        assert values == sorted(values)
        assert values[2] > 4 * abs(values[1]) / 2 > 0

    def test_names(self, protocol: LabelProtocol, network: Exact):
        metrics = protocol.quality(network, euler(3))
        assert {"val/kid_3nfe", "val/score/bright_3nfe", "val/held_out_score/other_3nfe"} <= set(metrics)

    def test_evaluate_puts_quality_first(self, protocol: LabelProtocol, network: Exact):
        metrics = protocol.evaluate(network)
        assert metrics[names.VAL_QUALITY] == metrics["val/kid_1nfe"]
        assert metrics[names.VAL_VELOCITY_MSE] == protocol.velocity_mse(network)
        assert {"val/fd_1nfe", "val/fd_2nfe"} <= set(metrics)

    def test_other_samplers_for_other_networks(self, protocol: LabelProtocol, network: Exact):
        metrics = protocol.evaluate(network, [euler(3)])
        assert metrics[names.VAL_QUALITY] == metrics["val/kid_3nfe"]
        assert "val/kid_1nfe" not in metrics

    def test_guidance_reaches_the_sampler(self, protocol: LabelProtocol, network: Exact):
        plain = protocol.samples(network, euler(1))
        grey = protocol.samples(network, euler(1), guidance=-1.0)  # F(c) − (F(c) − F(∅)) = F(∅)
        assert protocol.judge(plain).correct.mean() == 1
        assert protocol.judge(grey).correct.mean() == 0.25


class TestVelocity:
    def test_the_exact_velocity_at_known_data_has_no_error(self, protocol: LabelProtocol, source: ToySource):
        x, z, _, _ = protocol._velocity_batch

        def exact(x_t: Tensor, t_b: Tensor, r: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
            assert torch.equal(t_b, r)
            where = exact.seen
            exact.seen += len(x_t)
            return z[where : exact.seen] - x[where : exact.seen]

        exact.seen = 0
        assert protocol.velocity_mse(exact) == 0
        assert exact.seen == len(x) == 20 * len(VELOCITY_TIMES)
        assert torch.equal(x[:20], source.latents("validation")[protocol.rows[:20]])

    def test_a_constant_error_is_its_square(self, protocol: LabelProtocol):
        x, z, _, _ = protocol._velocity_batch
        mse = protocol.velocity_mse(lambda x_t, t, r, c: torch.zeros_like(x_t))
        assert mse == pytest.approx((z - x).double().square().mean().item(), rel=1e-9)


class TestNoTrace:
    def test_the_global_stream_is_where_it_was(self, protocol: LabelProtocol, network: Exact):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        protocol.evaluate(network)
        protocol.grid(network, few_step(1))
        protocol.round_trip()
        assert torch.equal(torch.get_rng_state(), before)

    def test_modes_return_to_what_each_part_had(self, protocol: LabelProtocol, network: Exact):
        modes = [module.training for module in network.modules()]
        assert len(set(modes)) == 2
        protocol.evaluate(network)
        assert [module.training for module in network.modules()] == modes

    def test_modes_and_stream_return_after_an_error(self, network: Exact):
        before = torch.get_rng_state()

        def fail() -> None:
            with undisturbed(network, seed=0):
                raise KeyError(torch.randn(3))

        with pytest.raises(KeyError):
            fail()
        assert network.training
        assert torch.equal(torch.get_rng_state(), before)

    def test_training_is_unchanged_by_evaluating(self, protocol: LabelProtocol):
        def train(evaluate: bool) -> Tensor:
            torch.manual_seed(0)
            network = nn.Sequential(nn.Flatten(), nn.Linear(48, 48), nn.Dropout(0.3), nn.Unflatten(1, SHAPE))
            optimizer = torch.optim.Adam(network.parameters())
            for step in range(4):
                loss = network(draws.normal((8, *SHAPE), 0, "data", step)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                if evaluate:
                    protocol.evaluate(_Wrapped(network))
                optimizer.step()
            return network[1].weight.detach()

        assert torch.equal(train(True), train(False))


class _Wrapped(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        return self.inner(x)


class TestDivergence:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_some_samples_not_finite(self, protocol: LabelProtocol, value: float):
        metrics = protocol.quality(Broken(2, value), few_step(1))  # 4 chunks of at most 32
        assert metrics["val/nonfinite_frac_1nfe"] == pytest.approx(8 / 100)
        for quantity in ("kid", "fd", "precision", "recall", "density", "coverage", "accuracy"):
            assert math.isnan(metrics[names.val(quantity, 1)])
        assert math.isnan(metrics["val/score/bright_1nfe"])

    def test_classes_without_bad_samples_keep_their_accuracy(self, protocol: LabelProtocol):
        metrics = protocol.quality(Broken(1), few_step(1))
        affected = {CLASSES[protocol.labels[start]] for start in range(0, 100, 32)}
        for name in CLASSES:
            assert math.isnan(metrics[names.accuracy(name, 1)]) == (name in affected)

    def test_all_samples_not_finite(self, protocol: LabelProtocol):
        metrics = protocol.evaluate(Broken(100))
        assert metrics["val/nonfinite_frac_1nfe"] == 1
        assert math.isnan(metrics[names.VAL_QUALITY])
        assert math.isnan(metrics[names.VAL_VELOCITY_MSE])

    def test_huge_but_finite_samples_are_judged_as_clamped(self, protocol: LabelProtocol):
        metrics = protocol.quality(Broken(100, 1e30), few_step(1))
        assert metrics["val/nonfinite_frac_1nfe"] == 0
        assert math.isfinite(metrics["val/kid_1nfe"])


class TestGrid:
    def test_rows_are_classes_and_columns_share_noise(self, protocol: LabelProtocol, network: Exact):
        pixels = protocol.grid(network, few_step(2))  # with injected noise
        assert pixels.shape == (4, 3, *SHAPE)
        offset = pixels - pixels.mean((3, 4), keepdim=True)
        assert_rounded(offset[0], offset[1], roundings=32, scale=8)  # noise up to 4, latents of twice the pixels
        assert (offset[0, 0] - offset[0, 1]).abs().max() > 0.1
        assert protocol.grid_prompts() == list(CLASSES)
