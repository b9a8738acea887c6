"""A watched loop from outside: its run directory, events, policies, resumption, and what it refuses."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import twinrl
from tests.training.watching import loops
from tests.training.watching.loops import Network, batch, events, follow, losses, rows, sgd
from twinrl.config.errors import InputError
from twinrl.run import layout, names
from twinrl.stability.events import Event
from twinrl.training.runs import RunDirectory
from twinrl.training.watching import Watch

FAULT = 30
STEPS = 34


def watched(run: Path, network: nn.Module | None = None, **options: Any) -> tuple[Watch, nn.Module, Any]:
    network = network or Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    return twinrl.watch(network, optimizer, run=run, **options), network, optimizer


# --- what it writes ---------------------------------------------------------------------------------------------


def test_a_run_directory_with_the_event_that_names_the_loss(tmp_path: Path) -> None:
    with watched(tmp_path / "mine", settings={"width": 11}, seed=3)[0] as watch:
        network, optimizer = watch._model, watch._optimizer
        for _ in follow(watch, network, optimizer, STEPS, FAULT):
            pass
    (event,) = events(tmp_path / "mine")
    assert (event["kind"], event["terms"][0], event["step"]) == ("spike", "reward", FAULT + 1)
    assert set(event["shares"]) == {"flow", "adversarial", "reward"}
    log = rows(tmp_path / "mine")
    assert [row["step"] for row in log] == list(range(1, STEPS + 1))
    assert log[FAULT][names.event("spike")] == 1
    parts = [log[0][names.loss(name)] for name in ("flow", "adversarial", "reward")]
    assert log[0][names.LOSS_TOTAL] == pytest.approx(sum(parts))
    config = layout.read_config(tmp_path / "mine")
    assert (config["name"], config["seed"], config["settings"]) == ("mine", 3, {"width": 11})
    assert layout.read_result(tmp_path / "mine") == {"status": "finished", "step": STEPS}
    assert "packages" in json.loads((tmp_path / "mine" / layout.ENVIRONMENT).read_text())


def test_events_name_the_samples_the_largest_loss_first(tmp_path: Path) -> None:
    watch, network, optimizer = watched(tmp_path / "run")
    for step in range(STEPS):
        x, numbers = batch(step), torch.arange(100 * step, 100 * step + loops.SIZE)
        found: dict[str, Tensor] = losses(network(x), x)
        per_sample = -network(x)[:, 6]
        if step == FAULT:
            per_sample = per_sample * torch.linspace(1, 5e3, loops.SIZE)
        found["reward"] = per_sample
        watch.backward(found, rows=numbers)
        optimizer.step()
        watch.step()
    watch.close()
    (event,) = events(tmp_path / "run")
    assert sorted(event["rows"]) == list(range(100 * FAULT, 100 * FAULT + loops.SIZE))


def test_the_rate_and_further_numbers_are_logged(tmp_path: Path) -> None:
    watch, network, optimizer = watched(tmp_path / "run")
    x = batch(0)
    watch.backward(losses(network(x), x))
    optimizer.step()
    watch.step(values={names.VAL_QUALITY: 0.25})
    watch.backward(losses(network(x), x))
    optimizer.step()
    watch.step(lr=0.5)
    watch.close()
    first, second = rows(tmp_path / "run")
    assert (first[names.LR], first[names.VAL_QUALITY], second[names.LR]) == (1e-3, 0.25, 0.5)
    assert 0 < first[names.UPDATE_RATIO] < 1
    assert names.SKIPPED not in first


def test_a_last_step_that_is_missing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, steps in (("whole", 3), ("cut", 2)):
        watch, network, optimizer = watched(tmp_path / name)
        for step in range(3):
            x = batch(step)
            watch.backward(losses(network(x), x))
            optimizer.step()
            if step < steps:
                watch.step()
        watch.close()
        assert len(rows(tmp_path / name)) == steps
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"{tmp_path}/cut: step 3 is not in the log: watch.step() is missing" in said


def test_other_commands_say_what_the_run_is(tmp_path: Path) -> None:
    watch, network, optimizer = watched(tmp_path / "run")
    for _ in follow(watch, network, optimizer, 2):
        pass
    watch.close()
    with pytest.raises(InputError, match=r"written by twinrl\.watch"):
        RunDirectory(tmp_path / "run").settings()


# --- policies ---------------------------------------------------------------------------------------------------


def states(watch: Watch, network: nn.Module, optimizer: Any, fault: float = 1e3) -> list[list[Tensor]]:
    """The parameters after each step."""
    found = []
    for _ in follow(watch, network, optimizer, STEPS, FAULT, fault):
        found.append([p.detach().clone() for p in network.parameters()])
    found.append([p.detach().clone() for p in network.parameters()])
    return found


def moved(found: list[list[Tensor]], step: int) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(found[step], found[step + 1], strict=True))


def test_skip_moves_nothing(tmp_path: Path) -> None:
    watch, network, optimizer = watched(tmp_path / "run", stability={"spike": "skip"})
    found = states(watch, network, optimizer)
    watch.close()
    assert moved(found, FAULT - 1)
    assert not moved(found, FAULT)
    assert moved(found, FAULT + 1)
    log = rows(tmp_path / "run")
    assert [row["step"] for row in log if names.SKIPPED in row] == [FAULT + 1]


def test_zero_lets_the_moments_decay(tmp_path: Path) -> None:
    watch, network, optimizer = watched(tmp_path / "run", stability={"spike": "zero"})
    found = states(watch, network, optimizer)
    assert moved(found, FAULT)
    assert all(state["step"] == STEPS for state in optimizer.state.values())


def test_a_cut_holds_against_the_loop_s_own_scheduler(tmp_path: Path) -> None:
    watch, network, optimizer = watched(tmp_path / "run", stability={"spike": "cut_lr", "lr_cut": 0.25})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for step in range(STEPS):
        x = batch(step)
        watch.backward(losses(network(x), x, 1e3 if step == FAULT else 1.0))
        optimizer.step()
        scheduler.step()
        watch.step()
        assert optimizer.param_groups[0]["lr"] == 1e-3
    watch.close()
    rates = [row[names.LR] for row in rows(tmp_path / "run")]
    assert rates[FAULT - 1] == 1e-3
    assert rates[FAULT] == rates[-1] == pytest.approx(0.25e-3)


def test_stop_raises_with_the_event_and_ends_the_run(tmp_path: Path) -> None:
    watch, network, optimizer = watched(tmp_path / "run", stability={"policy": "stop"})
    with pytest.raises(twinrl.Stopped, match="non-finite") as stopped:
        states(watch, network, optimizer, math.nan)
    assert stopped.value.event.terms[0] == "reward"
    assert all(p.isfinite().all() for p in network.parameters())
    result = layout.read_result(tmp_path / "run")
    assert result is not None
    assert (result["status"], result["step"]) == ("diverged", FAULT + 1)
    assert math.isnan(rows(tmp_path / "run")[-1][names.loss("reward")])


def test_what_is_not_finite_is_recorded_where_nothing_is_said(tmp_path: Path) -> None:
    watch, network, optimizer = watched(tmp_path / "run")
    for _ in follow(watch, network, optimizer, STEPS, FAULT, math.nan):
        pass
    watch.close()
    found = events(tmp_path / "run")
    assert [event["terms"][:1] for event in found if event["kind"] == "nonfinite"] == [["reward"]]
    assert rows(tmp_path / "run")[-1]["step"] == STEPS


def test_a_rollback_returns_the_loop_and_goes_on(tmp_path: Path) -> None:
    saved: dict[str, Any] = {}
    told: list[Event] = []

    def back(event: Event) -> None:
        told.append(event)
        network.load_state_dict(saved["network"])
        watch.load_state_dict(saved["watch"])

    watch, network, optimizer = watched(tmp_path / "run", stability={"spike": "rollback"}, on_rollback=back)
    for step in range(STEPS):
        x = batch(step)
        watch.backward(losses(network(x), x, 1e3 if step == FAULT else 1.0))
        optimizer.step()
        watch.step()
        if step == 20:
            state = {name: value.clone() for name, value in network.state_dict().items()}
            saved = {"network": state, "watch": watch.state_dict()}
        if step == FAULT:
            assert all(torch.equal(value, saved["network"][name]) for name, value in network.state_dict().items())
    watch.close()
    assert [event.terms[0] for event in told] == ["reward"]
    log = rows(tmp_path / "run")
    assert [row["step"] for row in log] == [*range(1, FAULT + 2), *range(22, 22 + STEPS - FAULT - 1)]
    assert [row["iteration"] for row in log] == list(range(STEPS))


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    rules = {"each": {"zclip": {"warmup": 4, "z": 0.5}}}

    def train(run: Path, network: nn.Module, optimizer: Any, steps: range, state: Any = None) -> Any:
        watch = twinrl.watch(network, optimizer, run=run, rules=rules, resume=state is not None)
        if state is not None:
            watch.load_state_dict(json.loads(json.dumps(state)))
        for step in steps:
            x = batch(step)
            watch.backward(losses(network(x), x))
            optimizer.step()
            watch.step()
            if step == 7:
                state = watch.state_dict()
        watch.close()
        return state

    whole, parts = Network(), Network()
    train(tmp_path / "whole", whole, sgd(whole), range(16))
    state = train(tmp_path / "parts", parts, sgd(parts), range(8))
    train(tmp_path / "parts", parts, sgd(parts), range(8, 16), state)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)
    left, right = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    for one, other in zip(left, right, strict=True):
        one.pop(names.STEP_SECONDS), other.pop(names.STEP_SECONDS)
        assert one == other


# --- what is refused ----------------------------------------------------------------------------------------------


def give(change: Callable[[dict[str, Any], Tensor], Any], **named: Any) -> Callable[[Watch, nn.Module], Any]:
    """A third step whose losses are changed."""

    def act(watch: Watch, network: nn.Module) -> Any:
        x = batch(9)
        y = network(x)
        found = dict(losses(y, x))
        return watch.backward(change(found, y) or found, **named)

    return act


def twice(watch: Watch, network: nn.Module) -> None:
    for _ in range(2):
        x = batch(9)
        watch.backward(losses(network(x), x))


def without_step(watch: Watch, network: nn.Module) -> None:
    x = batch(9)
    watch.backward(losses(network(x), x))
    watch._optimizer.step()
    watch.backward(losses(network(x), x))


def own_backward(watch: Watch, network: nn.Module) -> None:
    x = batch(9)
    network(x).square().sum().backward()
    watch.backward(losses(network(x), x))


WRONG: dict[str, tuple[Callable[[Watch, nn.Module], Any], str]] = {
    "no scalar": (give(lambda f, y: f.update(flow=y)), r"'flow' is no scalar; got Tensor of shape"),
    "no graph": (give(lambda f, y: f.update(flow=f["flow"].detach())), "'flow' has no graph"),
    "a number": (give(lambda f, y: f.update(flow=0.5)), "'flow' is no tensor"),
    "not of the model": (
        give(lambda f, y: f.update(flow=torch.ones((), dtype=y.dtype, requires_grad=True))),
        "'flow' does not depend on the model",
    ),
    "a slash": (give(lambda f, y: {"a/b": f["flow"]}), "'a/b' cannot be a loss's name"),
    "each": (give(lambda f, y: {"each": f["flow"]}), "'each' cannot be a loss's name"),
    "a new name": (give(lambda f, y: f.update(more=f["flow"])), "names have changed .* got new more"),
    "a name less": (give(lambda f, y: {"reward": f["reward"]}), "names have changed .* got without adversarial, flow"),
    "no mapping": (give(lambda f, y: [f["flow"]]), "takes losses by name"),
    "twice": (twice, r"watch\.backward\(\) was called twice"),
    "no step": (without_step, r"watch\.step\(\) is missing"),
    "no backward": (lambda watch, network: watch.step(), r"without watch\.backward\(\)"),
    "a gradient of its own": (own_backward, "there is a gradient already"),
    "outputs at once": (give(lambda f, y: None, outputs=[torch.ones(1, requires_grad=True)]), "outputs= is given at"),
    "odd rows": (give(lambda f, y: None, rows=["a"]), "rows= takes the samples' numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_clear_error_and_a_run_up_to_there(case: str, tmp_path: Path) -> None:
    act, message = WRONG[case]
    watch, network, optimizer = watched(tmp_path / "run")
    for _ in follow(watch, network, optimizer, 3):
        pass
    with pytest.raises(InputError, match=message) as error:
        act(watch, network)
    assert "\n" not in str(error.value)
    assert len(rows(tmp_path / "run")) == 3  # on disk, without close


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, y, network: f.update(flow=f["flow"] + network.enter.weight.square().sum()), "beside the outputs"),
        (lambda f, y, network: f.update(flow=network.spare.weight.sum()), "beside the outputs"),
        (lambda f, y, network: f.update(flow=torch.ones((), requires_grad=True)), "does not depend on the model"),
    ],
)
def test_a_loss_that_passes_the_outputs_by(change: Any, message: str, tmp_path: Path) -> None:
    watch, network, _ = watched(tmp_path / "run")
    x = batch(0)
    y = network(x)
    found: dict[str, Tensor] = dict(losses(y, x))
    change(found, y, network)
    with pytest.raises(InputError, match=message):
        watch.backward(found, outputs=[y])


def test_outputs_of_each_other(tmp_path: Path) -> None:
    watch, network, _ = watched(tmp_path / "run")
    x = batch(0)
    y = network(x)
    z = y * 2
    with pytest.raises(InputError, match="computed from another one"):
        watch.backward({"flow": y.mean() + z.mean()}, outputs=[y, z])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": {"flow": {"clip": {"max_nrm": 1}}}}, "max_nrm; did you mean max_norm"),
        ({"rules": {"flow": {"match": {"ratio": {"kind": "linear", "initial": 0, "final": 1}}}}}, "match is scheduled"),
        ({"stability": {"spike": "rollback"}}, "needs on_rollback="),
        ({"telemetry": {"shares": 1}}, "unknown key"),
        ({"resume": True}, "there is no run to resume"),
    ],
)
def test_options_are_refused_at_once(options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        watched(tmp_path / "run", **options)
    assert not (tmp_path / "run" / layout.CONFIG).exists()


def test_a_rule_for_no_loss(tmp_path: Path) -> None:
    watch, network, _ = watched(tmp_path / "run", rules={"rewards": {"clip": {}}})
    x = batch(0)
    with pytest.raises(InputError, match="rewards: there is no such term"):
        watch.backward(losses(network(x), x))
    assert not (tmp_path / "run" / layout.CONFIG).exists()


def test_a_model_without_trainable_parameters(tmp_path: Path) -> None:
    network = Network().requires_grad_(False)
    with pytest.raises(InputError, match="no trainable parameters"):
        watched(tmp_path / "run", network)


def test_a_run_that_exists(tmp_path: Path) -> None:
    watch, network, optimizer = watched(tmp_path / "run")
    for _ in follow(watch, network, optimizer, 2):
        pass
    watch.close()
    with pytest.raises(InputError, match="this run exists"):
        watched(tmp_path / "run")
    again, network, optimizer = watched(tmp_path / "run", fresh=True)
    for _ in follow(again, network, optimizer, 1):
        pass
    again.close()
    assert len(rows(tmp_path / "run")) == 1
