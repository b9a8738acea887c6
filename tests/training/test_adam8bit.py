"""AdamW with moments in 8 bits: it moves as AdamW does, and a checkpoint of it goes on to the last bit."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.fake_source import small
from tests.training.trainers import assert_same, finish, kill
from twinrl.config.errors import InputError
from twinrl.machine import float8
from twinrl.training import assembly, optim, schema

KIND = "optim.kind=adamw8bit"
WIDE = "model.network={kind: mlp, width: 64, depth: 1, condition_width: 64}"
"""Some matrices have 4096 numbers, from which on torchao keeps moments in 8 bits."""
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def test_without_torchao_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    settings = schema.load("twinflow", [KIND])
    with pytest.raises(InputError, match=r"optim\.kind=adamw8bit needs torchao; fix: pip install torchao"):
        assembly.check_options(settings, torch.device("cpu"))


@needs_torchao
def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="is for one process; got 2"):
        assembly.check_options(schema.load("twinflow", [KIND]), torch.device("cpu"))


@needs_torchao
@pytest.mark.slow
def test_a_resumed_run_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    with torch.compiler.set_stance("force_eager"):  # its step, which would be compiled for every shape
        settings = [small(tmp_path / name, WIDE, KIND) for name in ("straight", "killed")]
        straight = finish(settings[0])
        kill(settings[1], 7)
        assert_same(finish(settings[1]), straight)
    kept = [held["exp_avg"] for held in straight.optimizer.state.values()]
    assert any(hasattr(moment, "codes") for moment in kept)


@needs_torchao
@pytest.mark.slow
def test_it_moves_as_adamw_does() -> None:
    """Each moment is off by at most 1/128 of a block's largest; a quadratic is gone down by both."""
    ends = {}
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(0)
        target, weight = torch.randn(64, 64), torch.nn.Parameter(torch.zeros(64, 64))
        config = optim.OPTIMIZERS.find(name).Config(lr=0.02)
        made = optim.OPTIMIZERS.find(name).build(config, [weight])
        with torch.compiler.set_stance("force_eager"):
            for _ in range(100):
                weight.grad = weight.detach() - target
                optim.update(made, 0.02, [weight], measure=False)
        ends[name] = float((weight.detach() - target).norm() / target.norm())
    assert ends["adamw"] < 0.6
    assert ends["adamw8bit"] == pytest.approx(ends["adamw"], rel=0.1)


@needs_torchao
@pytest.mark.campaign
def test_its_own_compiled_step() -> None:
    weight = torch.nn.Parameter(torch.ones(64, 64))
    made = optim.AdamW8bit.make([weight], optim.AdamW8bit.Config(lr=0.1, eps=1e-12))
    weight.grad = torch.ones_like(weight)
    optim.update(made, 0.1, [weight], measure=False)
    torch.testing.assert_close(weight.detach(), torch.full((64, 64), 0.9), atol=1e-3, rtol=0)
