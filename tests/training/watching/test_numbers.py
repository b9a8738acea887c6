"""The gradient that a watched loop gets: the sum's without rules, the trainer's own engine's with each of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import twinrl
from tests.gradients.steps import Perceptron, Step, flat, step_of
from tests.training.watching import loops
from tests.training.watching.loops import Network, batch, losses, plain, sgd
from twinrl.gradients import TRANSFORMS
from twinrl.run import names

EXACT = {"rtol": 1e-12, "atol": 1e-12}
MEASURED = {"shares_every": 1, "cosines_every": 1}
RULES: dict[str, Mapping[str, Any]] = {
    "clip": {"max_norm": 0.05}, "zclip": {"warmup": 2, "z": 0.01}, "agc": {"ratio": 0.02}, "relative": {"ratio": 0.3},
    "match": {"ratio": 0.3}, "scale": {"factor": 0.5}, "project": {},
}  # fmt: skip


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("by_outputs", [False, True])
def test_without_rules_it_is_the_gradient_of_the_sum(by_outputs: bool, parts: int, tmp_path: Path) -> None:
    network = Network()
    watch = twinrl.watch(network, sgd(network), run=tmp_path / "run", telemetry=MEASURED)
    for step in range(3):
        chunks = batch(step).chunk(parts)
        expected = plain(network, chunks)
        for k, x in enumerate(chunks):
            y = network(x)
            found = {name: loss / parts for name, loss in losses(y, x).items()}
            watch.backward(found, outputs=[y] if by_outputs else None, last=k == parts - 1)
        torch.testing.assert_close(loops.flat(network), expected, **EXACT)
        assert network.idle.weight.grad is None  # no moment of it decays, as without a watch
        watch.step()
    assert loops.rows(tmp_path / "run") == []  # buffered, until
    watch.close()
    assert len(loops.rows(tmp_path / "run")) == 3


@pytest.mark.parametrize("by_outputs", [False, True])
def test_norms_and_shares_of_micro_batches_are_the_whole_batch_s(by_outputs: bool, tmp_path: Path) -> None:
    found = []
    for parts in (1, 3):
        network = Network()
        with twinrl.watch(network, sgd(network), tmp_path / str(parts), telemetry=MEASURED) as watch:
            chunks = batch(0).chunk(parts)
            for k, x in enumerate(chunks):
                y = network(x)
                part = {name: loss / parts for name, loss in losses(y, x).items()}
                watch.backward(part, outputs=[y] if by_outputs else None, last=k == parts - 1)
            watch.step()
        (row,) = loops.rows(tmp_path / str(parts))
        found.append({k: v for k, v in row.items() if k not in (names.STEP_SECONDS,)})
    assert found[1] == pytest.approx(found[0], rel=1e-10, abs=1e-12)


def in_a_loop(step: Step) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The trainer's objective as a loop would have it: named losses, and what the student has returned."""
    (one,) = step.apart()
    one.begin()
    with one.one.evaluated() as found:
        named = {
            name: torch.stack([found.losses[term].parts[name] for term in terms if name in found.losses[term].parts])
            for name, terms in step.config.gradient_owners.items()
        }
        return {name: parts.sum() for name, parts in named.items()}, list(found.outputs)


@pytest.mark.parametrize("space", ["parameter", "output"])
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_gives_the_trainer_s_gradient_and_measures(rule: str, space: str, tmp_path: Path) -> None:
    """On the same losses, over steps enough for a rule with memory."""
    if space == "output" and TRANSFORMS[rule].needs_parameters:
        return
    chain = {rule: dict(RULES[rule])}
    rules: dict[str, Any] = {"rectify": chain} if TRANSFORMS[rule].needs_others else {"each": chain, "total": chain}
    step = step_of("twinflow", student=Perceptron())
    update = {"space": space, "telemetry": MEASURED | {"rms_every": 0}}
    gradients = twinrl_gradients(rules, update)
    step.config = step.config.model_copy(update={"gradients": gradients})
    engine, optimizer = step.engine(), sgd(step.student)
    watch = twinrl.watch(step.student, optimizer, run=tmp_path / "run", rules=rules, telemetry=update["telemetry"])
    for at in range(4):
        expected, _, measures = step.run(engine, at)
        step.student.zero_grad()
        named, outputs = in_a_loop(step)
        watch.backward(named, outputs=outputs if space == "output" else None)
        torch.testing.assert_close(flat(step.student), expected, **EXACT)
        optimizer.step()
        watch.step()
        watch._book.sync()
        row = loops.rows(tmp_path / "run")[-1]
        for name, value in measures.items():
            assert row[name] == pytest.approx(float(value), rel=1e-10, abs=1e-12), name
    clipped = [v for row in loops.rows(tmp_path / "run") for k, v in row.items() if k.endswith("/clip_coef")]
    assert any(value != 1 for value in clipped) or rule == "project"


def twinrl_gradients(rules: Mapping[str, Any], update: Mapping[str, Any]) -> Any:
    """The trainer's configuration of the same rules."""
    from twinrl.gradients import GradientsConfig

    shared = {name: chain for name, chain in rules.items() if name in ("each", "total")}
    terms = {name: chain for name, chain in rules.items() if name not in shared}
    return GradientsConfig.model_validate({**shared, "terms": terms, **update})


def test_every_rule_is_tried() -> None:
    assert set(RULES) == set(TRANSFORMS)


def test_outputs_that_share_one_gradient_tensor_are_scaled_once(tmp_path: Path) -> None:
    """The gradients of a sum's parts are one tensor to autograd."""
    network = Network()
    rules = {"both": {"scale": {"factor": 0.5}}}
    watch = twinrl.watch(network, sgd(network), run=tmp_path / "run", rules=rules)
    x = batch(0)
    first, second = network(x), network(2 * x)
    (first + second).square().mean().backward()
    expected = 0.5 * loops.flat(network)
    network.zero_grad()
    first, second = network(x), network(2 * x)
    watch.backward({"both": (first + second).square().mean()}, outputs=[first, second])
    torch.testing.assert_close(loops.flat(network), expected, **EXACT)


def test_under_a_scaler_the_optimizer_and_the_log_see_what_they_see_without(tmp_path: Path) -> None:
    found = {}
    for name, scaler in (("without", None), ("with", torch.amp.GradScaler("cpu", init_scale=256.0))):
        network = Network(torch.float32)
        optimizer = sgd(network)
        with twinrl.watch(
            network, optimizer, tmp_path / name, {"each": {"clip": {"max_norm": 0.05}}}, scaler=scaler
        ) as watch:
            for step in range(3):
                x = batch(step, torch.float32)
                watch.backward(losses(network(x), x))
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)
                    scaler.update()
                watch.step()
        found[name] = [{k: v for k, v in row.items() if k != names.STEP_SECONDS} for row in loops.rows(tmp_path / name)]
    for one, other in zip(found["without"], found["with"], strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
