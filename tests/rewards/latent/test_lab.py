"""On the digits' laboratory: its source is a codec, its preference reward rises, and the benchmark runs."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.rewards.latent.toys import latent_reward
from twinrl.flow.transport import like
from twinrl.rewards import REWARDS, build_reward
from twinrl.rewards.latent import KeyedRows
from twinrl.run import names

pytestmark = [pytest.mark.slow, pytest.mark.laboratory]

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.mark.parametrize("kind", ["autograd", "vae_backprop"])
def test_the_preference_rises(lab, kind: str) -> None:
    z = lab.latents("validation")[:8]
    prompts = lab.prompts(lab.validation.labels[:8], 0, 0)
    reward, chosen = build_reward(REWARDS["lab_hps"].Config(), lab), latent_reward(kind)
    found = chosen.gradient(z, prompts, lab, reward, KeyedRows(0, 0, tuple(range(8))))
    moved = z + 0.3 * found.g / like(found.g.flatten(1).norm(dim=1), z)
    assert (reward(lab.decode(moved), prompts) > found.scores).all()
    measured = chosen.compare(found, z, prompts, lab, reward)
    assert measured[names.REWARD_GRAD_COSINE].min() > 0.25
    assert 0.01 < measured[names.REWARD_ROUNDTRIP].mean() < 0.3  # a true autoencoder, with a true error


ESTIMATES = {  # enough directions for a cosine that eight images show
    "autograd": {},
    "vae_backprop": {},
    "random_direction": {"directions": 48},
    "antithetic": {"directions": 24},
    "orthogonal": {"directions": 48},
    "spsa": {"directions": 16},
}


@pytest.mark.parametrize(
    ("lab", "model"),
    [
        ("quick_lab", "lab_hps"),
        *(pytest.param("whole_lab", m, marks=pytest.mark.campaign) for m in ("lab_hps", "lab_clip")),
    ],
    indirect=["lab"],
)
@pytest.mark.parametrize("kind", ESTIMATES)
def test_every_reward_rises_along_every_estimate(lab, kind: str, model: str) -> None:
    """A small step along g raises the mean score, one against it lowers it, through the real decoder."""
    z = lab.latents("validation")[:8]
    prompts = lab.prompts(lab.validation.labels[:8], 0, 0)
    reward = build_reward(REWARDS[model].Config(), lab)
    found = latent_reward({"kind": kind, **ESTIMATES[kind]}).gradient(
        z, prompts, lab, reward, KeyedRows(0, 0, tuple(range(8)))
    )
    step = 0.3 * found.g / like(found.g.flatten(1).norm(dim=1), z)
    up, down = (reward(lab.decode(moved), prompts).mean() for moved in (z + step, z - step))
    assert down < found.scores.mean() < up


@pytest.fixture
def benchmark(monkeypatch) -> ModuleType:
    """``benchmarks/reward_gradients.py`` as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("reward_gradients", BENCHMARKS / "reward_gradients.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "reward_gradients", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_the_benchmark_measures(lab, benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinrl.lab.load_lab", lambda: lab)
    small = benchmark.load(4)
    exact, few = (
        benchmark.measure(small, case, 1)
        for case in benchmark.cases([3])
        if case.label in ("vae_backprop", "spsa, K = 3")
    )
    assert exact.cosine.value == pytest.approx(1, abs=1e-5)
    assert exact.gain == pytest.approx(1, abs=1e-4)
    assert (exact.evaluations, few.evaluations) == (1, 7)
    assert abs(few.cosine.value) < 0.9
    assert min(exact.peak_mb, few.peak_mb) >= 0
