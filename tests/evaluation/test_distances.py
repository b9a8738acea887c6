"""Fréchet and kernel distance: closed forms, unbiasedness, a case by hand, torchmetrics."""

import numpy as np
import pytest
import torch
from torch import Tensor

from twinrl.evaluation.distances import frechet_distance, kernel_distance
from twinrl.flow import draws
from twinrl.machine.compat import ensure_torchvision


def exact_gaussian(mean: Tensor, covariance: Tensor, n: int = 50) -> Tensor:
    """(n, D) points whose *sample* mean and covariance are exactly those given."""
    raw = draws.normal((n, len(mean)), 3, "exact gaussian").double()
    centred = raw - raw.mean(0)
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(centred.T @ centred / (n - 1)), centred.T, upper=False
    )
    return mean + (torch.linalg.cholesky(covariance) @ whitened).T


def features(n: int, width: int, key: str, seed: int = 0) -> Tensor:
    return draws.normal((n, width), seed, key).double()


class TestFrechetDistance:
    def test_closed_form_of_commuting_gaussians(self):
        first, second = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 1.0]).double()
        shift = torch.tensor([0.5, -1.0, 2.0]).double()
        a = exact_gaussian(torch.zeros(3).double(), torch.diag(first))
        b = exact_gaussian(shift, torch.diag(second))
        expected = shift.square().sum() + (first.sqrt() - second.sqrt()).square().sum()
        assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-10)

    def test_closed_form_of_general_gaussians(self):
        from scipy.linalg import sqrtm

        factors = [features(4, 4, "factor", seed) + 2 * torch.eye(4).double() for seed in (0, 1)]
        first, second = (m @ m.T for m in factors)
        root = sqrtm(first.numpy() @ second.numpy()).real
        expected = (first + second).trace().item() - 2 * np.trace(root)
        zero = torch.zeros(4).double()
        found = frechet_distance(exact_gaussian(zero, first), exact_gaussian(zero, second))
        assert found == pytest.approx(expected, rel=1e-8)

    def test_symmetric_and_zero_for_equal_sets(self):
        a, b = features(30, 5, "a"), 2 * features(40, 5, "b")
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
        assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)

    def test_fewer_points_than_dimensions(self):
        a = features(10, 64, "a")
        assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
        assert frechet_distance(a, a + 1) == pytest.approx(64, rel=1e-10)

    def test_agrees_with_torchmetrics(self):
        a, b = features(200, 8, "a").float(), (1.3 * features(200, 8, "b") + 0.2).float()
        assert frechet_distance(a, b) == pytest.approx(torchmetrics_frechet(a, b), rel=1e-6)  # float32 result


def test_floor_of_equal_distributions_shrinks_like_one_over_n():
    def mean_floor(n: int) -> float:
        values = [frechet_distance(features(n, 8, "a", s), features(n, 8, "b", s)) for s in range(30)]
        return float(np.mean(values))

    assert mean_floor(100) / mean_floor(400) == pytest.approx(4, rel=0.1)


class TestKernelDistance:
    def test_by_hand(self):
        # D = 1, k(x, y) = (xy + 1)³: within {0, 1}: k(0,1) = 1; within {2, 3}: k(2,3) = 343;
        # across: k(0,2) = k(0,3) = 1, k(1,2) = 27, k(1,3) = 64, mean 23.25; 1 + 343 − 2·23.25 = 297.5
        assert kernel_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])) == pytest.approx(297.5)

    def test_unbiased_at_small_n(self):
        values = [kernel_distance(features(10, 4, "a", s), features(15, 4, "b", s)) for s in range(1000)]
        assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(1000)
        assert np.std(values) > 0.01

    def test_the_mean_does_not_depend_on_n(self):
        def values(n: int) -> np.ndarray:
            pairs = ((features(n, 4, "a", s), features(n, 4, "b", s) + 0.5) for s in range(600))
            return np.array([kernel_distance(a, b) for a, b in pairs])

        few, many = values(6), values(24)
        error = np.hypot(few.std(), many.std()) / np.sqrt(600)
        assert abs(few.mean() - many.mean()) < 3 * error < 0.5 * many.mean()

    def test_strata_remove_the_bias_of_fixed_class_counts(self):
        strata = torch.arange(20) % 4
        centres = 2 * torch.eye(4).double()

        def draw(key: str, seed: int) -> Tensor:
            return centres[strata] + 0.3 * features(20, 4, key, seed)

        pairs = [(draw("a", s), draw("b", s)) for s in range(300)]
        plain = np.array([kernel_distance(a, b) for a, b in pairs])
        stratified = np.array([kernel_distance(a, b, strata, strata) for a, b in pairs])
        assert plain.mean() < -10 * plain.std() / np.sqrt(300)
        assert abs(stratified.mean()) < 3 * stratified.std() / np.sqrt(300)

    def test_one_stratum_is_the_plain_estimate(self):
        a, b, one = features(9, 3, "a"), features(7, 3, "b"), torch.zeros(9, dtype=torch.int64)
        assert kernel_distance(a, b, one, one[:7]) == pytest.approx(kernel_distance(a, b), rel=1e-12)

    def test_a_stratum_of_one_point_is_refused(self):
        a = features(3, 2, "a")
        with pytest.raises(ValueError, match="at least two"):
            kernel_distance(a, a, torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]))

    @pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
    def test_agrees_with_torchmetrics(self):
        a, b = features(60, 8, "a"), 1.3 * features(60, 8, "b") + 0.2
        assert kernel_distance(a, b) == pytest.approx(torchmetrics_kernel(a, b), rel=1e-6)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
class TestInputs:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_non_finite_features_give_nan(self, distance, bad):
        a, b = features(10, 3, "a"), features(10, 3, "b")
        b[4, 1] = bad
        assert np.isnan(distance(a, b))
        assert np.isnan(distance(b, a))

    def test_arrays_and_float32_are_taken_in_float64(self, distance):
        a, b = features(10, 3, "a").float(), features(10, 3, "b").float()
        assert distance(a.numpy(), b) == distance(a.double(), b.double())

    def test_shapes_are_checked(self, distance):
        with pytest.raises(ValueError, match="widths"):
            distance(torch.zeros(4, 2), torch.zeros(4, 3))
        with pytest.raises(ValueError, match="features must be"):
            distance(torch.zeros(1, 2), torch.zeros(4, 2))


# --- torchmetrics, given features as "images" of one pixel ----------------------------------------------


class Identity(torch.nn.Module):
    num_features = 8

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def torchmetrics_frechet(a: Tensor, b: Tensor) -> float:
    ensure_torchvision()
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=Identity(), input_img_size=(8, 1, 1), normalize=True)
    return _computed(metric.set_dtype(torch.float64), a, b)


def torchmetrics_kernel(a: Tensor, b: Tensor) -> float:
    ensure_torchvision()
    from torchmetrics.image.kid import KernelInceptionDistance

    metric = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=len(a), normalize=True)
    return _computed(metric, a, b)


def _computed(metric, a: Tensor, b: Tensor) -> float:
    metric.update(a[:, :, None, None], real=True)
    metric.update(b[:, :, None, None], real=False)
    value = metric.compute()
    return float(value[0] if isinstance(value, tuple) else value)
