"""The inference bench: which lines it has, what it calls, and both ways to start it. No assertion about time."""

import json

import pytest
import torch
from rich.console import Console

from tests.benchmarks.scripts import script
from tests.fake_source import FakeSource, register, small
from twinrl.commands import bench
from twinrl.run import names
from twinrl.sampling import timing
from twinrl.training import assembly
from twinrl.training.runs import RunDirectory
from twinrl.training.trainer import Trainer

inference = script("inference")
TINY = ("model.network={kind: unet, width: 8}", "data.source=mnist", "train.init=random", "evaluation.teacher_steps=3")


def test_lines_and_network_calls(tmp_path):
    source = FakeSource()
    provider = assembly.provider_of(small(tmp_path), source, torch.device("cpu"))
    network = provider.network().eval()
    rows = []
    network.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    lines = timing.measure(network, source, provider.example_prompts(0), (1, 2), teacher_steps=5, rounds=2)
    assert [(line.name, line.nfe) for line in lines] == [
        ("1 NFE", 1), ("2 NFE", 2), ("teacher, Euler", 5), (timing.DECODE, 0),
    ]  # fmt: skip
    calls = 3 * (1 + 2 + 5)  # an untimed round and two timed ones
    assert rows.count(1) == rows.count(10) == calls
    assert all(0 < line.latency.median <= line.latency.p95 for line in lines)
    assert lines[0].throughput == 10 / lines[0].batch.median


@pytest.mark.campaign
def test_the_script_on_a_fresh_network(tmp_path, without_digits):
    out = tmp_path / "inference"
    inference.main(["tutorial", *TINY, "--rounds", "2", "--out", str(out)])
    result = json.loads(out.with_suffix(".json").read_text())
    assert list(result["lines"]) == ["1 NFE", "2 NFE", "4 NFE", "teacher, Euler", timing.DECODE]
    assert result["lines"]["teacher, Euler"]["nfe"] == 3
    assert out.with_suffix(".md").read_text().count("\n|") == 7


@pytest.mark.parametrize("way", ["command", pytest.param("script", marks=pytest.mark.campaign)])
def test_both_ways_on_a_run(way, tmp_path, monkeypatch):
    register(monkeypatch)
    settings = small(tmp_path, "train.steps=2", "train.init=random")
    run = RunDirectory(settings.directory)
    run.start(settings, fresh=False)
    quality = {names.VAL_QUALITY: 0.0}
    Trainer(settings, run, FakeSource(), torch.device("cpu"), lambda network, step: quality).train()
    if way == "command":
        console = Console(record=True, width=200)
        assert bench.bench(settings.directory, 2, None, console) == 0
        assert "latency, batch 1" in console.export_text()
        lines = json.loads((settings.directory / "bench.json").read_text())
    else:
        inference.main([str(settings.directory), "--rounds", "2", "--out", str(tmp_path / "out")])
        lines = json.loads((tmp_path / "out.json").read_text())["lines"]
    assert list(lines) == ["1 NFE", "teacher, Euler", timing.DECODE]
    assert all(line["throughput"] > 0 for line in lines.values())
