"""Rows and FLOPs that the script states are those of its steps; from end to end at a tiny size, without times."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.benchmarks.scripts import script
from twinrl.machine.simulated.memory import Peak

large_model = script("large_model")
TINY = script("random_model").TINY
CPU = torch.device("cpu")


@pytest.fixture
def described(tmp_path: Path) -> Path:
    large_model.describe(TINY, tmp_path)
    return tmp_path


@pytest.mark.slow
def test_flops_are_those_of_the_products(described: Path) -> None:
    """Every linear layer costs 2·tokens·weights; what is left is attention and the patches' convolution, a part."""
    flops = large_model.flops_of_a_row(TINY)
    with torch.device("meta"):
        transformer = large_model.SD3.TRANSFORMER(**TINY)
    linear = {name: m.weight.numel() for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    blocks = sum(size for name, size in linear.items() if name.startswith("transformer_blocks."))
    tokens = (TINY["sample_size"] // 2) ** 2
    assert 2 * tokens * blocks * 0.3 < flops < 2 * (large_model.TEXT + tokens) * sum(linear.values()) * 4
    assert large_model.flops_of_a_row(TINY | {"num_layers": 4}) > 1.5 * flops


@pytest.mark.slow
def test_three_networks_make_the_rows_that_they_state(described: Path) -> None:
    settings = large_model.settings_of(4, 2, described, "cpu")
    step = large_model.ThreeNetworks(settings, large_model.RandomLatents(TINY, CPU), CPU)
    seen = {True: 0, False: 0}

    def count(_: object, inputs: tuple) -> None:
        seen[torch.is_grad_enabled()] += len(inputs[0])

    for network in (step.student, step.fake, step.teacher):
        network.register_forward_pre_hook(count)
    networks = (step.student, step.fake, step.teacher)
    with torch.no_grad():  # they start alike, so that the student would have no gradient
        for parameter in step.fake.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    before = [[p.clone() for p in network.parameters()] for network in networks]
    step()
    assert (seen[True], seen[False]) == step.rows(settings)
    pairs = [zip(old, network.parameters(), strict=True) for old, network in zip(before, networks, strict=True)]
    assert [all(torch.equal(a, b) for a, b in pair) for pair in pairs] == [False, False, True]


@pytest.mark.campaign
def test_the_script_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "result"
    tiny = ["--tiny", "--device", "cpu", "--batch", "4", "--micro-batch", "4", "--steps", "1", "--peak-tflops", "1"]
    large_model.main([*tiny, "--out", str(out)])
    result = json.loads(out.with_suffix(".json").read_text())
    twinflow, three = result["ways"]
    assert (twinflow["name"], three["name"]) == ("TwinFlow", "three networks")
    assert twinflow["flops"] == (3 * 4 + 15) * result["flops_of_a_row"]
    assert three["flops"] == (3 * 8 + 16) * result["flops_of_a_row"]
    assert twinflow["utilisation"] > 0
    assert "peak memory (GB)" in capsys.readouterr().out


def test_the_largest_that_has_room_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the simulated peak, of which some is spared."""
    peaks = iter([60, 30, 8])

    class Simulator:
        def __enter__(self) -> "Simulator":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def report(self, *_: object) -> SimpleNamespace:
            return SimpleNamespace(peak=Peak(next(peaks) * 10**9))

    monkeypatch.setattr(large_model, "Simulator", Simulator)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30 * 10**9, 0))
    assert large_model.fitting(torch.device("cuda")) == large_model.FITTING[2]
    assert large_model.fitting(CPU) == large_model.FITTING[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_what_it_needs() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device of about 80 GB; fix: --tiny --device cpu"):
        large_model.main([])
