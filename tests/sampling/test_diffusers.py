"""What diffusers expects of every scheduler: saved and read, swapped, stepped, walked from the middle, copied."""

import copy
import inspect
import json
import logging
import pickle

import numpy as np
import pytest
import torch

from tests.rounding import assert_rounded
from tests.sampling.gaussian import GaussianFlow
from twinrl.config.errors import InputError
from twinrl.machine.compat import ensure_torchvision
from twinrl.sampling import few_step, time_grid

ensure_torchvision()

from diffusers import (  # noqa: E402 (diffusers may import torchvision)
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from twinrl.sampling.scheduler import TwinFlowScheduler, TwinFlowSchedulerOutput  # noqa: E402
from twinrl.sampling.stock import stock_scheduler  # noqa: E402

SETTINGS = [
    {},
    {"num_train_timesteps": 500},
    {"shift": 3.0},
    {"style": "any", "gap_start": 0.01, "gap_end": 0.4},
    {"style": "mul", "extrapolation": 0.4, "kumaraswamy": [1.1, 0.9, 1.0]},
    {"style": "few", "order": 2, "stochastic_ratio": 0.5},
    {"stochastic_ratio": "sde", "seed": None},
    {"gap_end": 0.0, "simpletuner_gap_end": True},
]


def image(seed=0, dtype=torch.float32):
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def network(x, timestep):
    """A velocity that depends on place and time."""
    return torch.sin(3 * x) + timestep.to(x) / 1000 * x


def walk(scheduler, steps=4, x=None, **told):
    """What a pipeline does, with numbers of torch's global generator that are always the same."""
    scheduler.set_timesteps(steps)
    x = image() if x is None else x
    torch.manual_seed(0)
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, timestep), timestep, x, **told)[0]
    return x


def public(settings):
    """Without diffusers' bookkeeping."""
    return {name: value for name, value in settings.items() if not name.startswith("_")}


def settings_of(scheduler):
    return public(scheduler.config)


# --- configuration --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_saved_scheduler_comes_back_with_settings_and_samples(settings, tmp_path):
    scheduler = TwinFlowScheduler(**settings)
    scheduler.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["scheduler_config.json"]
    again, unused = TwinFlowScheduler.from_pretrained(tmp_path, return_unused_kwargs=True)
    assert public(unused) == {}
    assert settings_of(again) == settings_of(scheduler)
    assert torch.equal(walk(again), walk(scheduler))
    assert torch.equal(walk(TwinFlowScheduler.from_config(scheduler.config)), walk(scheduler))


def test_settings_may_be_given_when_read(tmp_path):
    TwinFlowScheduler(style="any").save_pretrained(tmp_path)
    scheduler, unused = TwinFlowScheduler.from_pretrained(tmp_path, shift=2.0, colour="red", return_unused_kwargs=True)
    assert (scheduler.config["style"], scheduler.config["shift"]) == ("any", 2.0)
    assert public(unused) == {"colour": "red"}


def test_unknown_settings_of_a_file_are_named_and_kept_apart(tmp_path, capfd):
    TwinFlowScheduler().save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trained_betas": [0.1, 0.2]}))
    scheduler, unused = TwinFlowScheduler.from_pretrained(tmp_path, return_unused_kwargs=True)
    assert public(unused) == {"trained_betas": [0.1, 0.2]}
    assert torch.equal(walk(scheduler), walk(TwinFlowScheduler()))


def test_betas_are_refused_for_a_flow_has_none():
    with pytest.raises(TypeError, match="trained_betas"):
        TwinFlowScheduler(trained_betas=[0.1, 0.2])


def test_the_scheduler_lies_in_a_subfolder_as_in_a_pipeline(tmp_path):
    TwinFlowScheduler(style="mul").save_pretrained(tmp_path / "scheduler")
    assert TwinFlowScheduler.from_pretrained(tmp_path, subfolder="scheduler").config["style"] == "mul"


def test_settings_by_place_are_those_by_name():
    assert settings_of(TwinFlowScheduler(500, "flow_prediction", 2.0)) == settings_of(
        TwinFlowScheduler(num_train_timesteps=500, shift=2.0)
    )


def test_settings_are_read_from_the_configuration():
    scheduler = TwinFlowScheduler(shift=2.0)
    assert scheduler.config.shift == 2.0
    with pytest.raises(AttributeError):
        _ = scheduler.no_such_setting


def test_it_is_a_scheduler_for_pipelines_and_itself_alone_is_compatible():
    scheduler = TwinFlowScheduler()
    assert isinstance(scheduler, SchedulerMixin)
    assert scheduler.compatibles == []
    assert TwinFlowScheduler.config_name == "scheduler_config.json"


@pytest.mark.parametrize("name", ["set_timesteps", "scale_model_input", "step", "add_noise", "scale_noise"])
def test_methods_take_what_pipelines_and_training_scripts_pass(name):
    stock = inspect.signature(getattr(FlowMatchEulerDiscreteScheduler, name, DDIMScheduler.add_noise)).parameters
    if name in ("add_noise", "scale_model_input"):
        stock = inspect.signature(getattr(DDIMScheduler, name)).parameters
    ours = inspect.signature(getattr(TwinFlowScheduler, name)).parameters
    wanted = [key for key in stock if not key.startswith("s_") and key != "per_token_timesteps"]
    assert set(wanted) <= set(ours)


# --- other schedulers' configurations ---------------------------------------------------------------------


FOREIGN = {
    "shift": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "use_dynamic_shifting": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.7),
    "flow_shift": lambda: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("through", ["config", "file"])
def test_a_foreign_shift_is_left_out_with_a_warning(name, through, tmp_path, caplog):
    foreign = FOREIGN[name]()
    with caplog.at_level(logging.WARNING, "twinrl"):
        if through == "file":
            foreign.save_pretrained(tmp_path)
            scheduler = TwinFlowScheduler.from_pretrained(tmp_path)
        else:
            scheduler = TwinFlowScheduler.from_config(foreign.config)
    [message] = [record.getMessage() for record in caplog.records if record.name.startswith("twinrl")]
    assert f"{name}={foreign.config[name]}" in message
    scheduler.set_timesteps(2, mu=1.0)
    torch.testing.assert_close(scheduler.timesteps, 1000 * time_grid(few_step(2))[:-1].float())


def test_a_foreign_shift_that_is_asked_for_is_kept_in_silence(caplog):
    scheduler = TwinFlowScheduler.from_config(FOREIGN["shift"]().config, shift=3.0)
    assert scheduler.config["shift"] == 3.0
    assert "left out" not in caplog.text


def test_a_foreign_scale_of_the_timesteps_is_kept():
    foreign = FlowMatchEulerDiscreteScheduler(num_train_timesteps=500)
    assert TwinFlowScheduler.from_config(foreign.config).config["num_train_timesteps"] == 500


def test_there_and_back_the_own_settings_are_kept():
    own = TwinFlowScheduler(style="mul", seed=7)
    there = FlowMatchEulerDiscreteScheduler.from_config(own.config)
    back = TwinFlowScheduler.from_config(there.config)
    assert (back.config["style"], back.config["seed"]) == ("mul", 7)


@pytest.mark.parametrize(
    ("foreign", "word"),
    [
        (EulerDiscreteScheduler(prediction_type="epsilon"), "prediction_type"),
        (EulerDiscreteScheduler(), "got epsilon"),
        (DDIMScheduler(prediction_type="v_prediction"), "got v_prediction"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
    ],
)
def test_a_scheduler_of_another_path_is_refused_in_one_line(foreign, word):
    with pytest.raises(InputError, match=word) as caught:
        TwinFlowScheduler.from_config(foreign.config)
    assert "\n" not in str(caught.value)


def test_a_file_that_leaves_its_prediction_open_means_noise(tmp_path):
    DDIMScheduler().save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    described = json.loads(file.read_text())
    del described["prediction_type"]
    file.write_text(json.dumps(described))
    with pytest.raises(InputError, match="prediction_type of DDIMScheduler; got epsilon"):
        TwinFlowScheduler.from_pretrained(tmp_path)
    asked = TwinFlowScheduler.from_pretrained(tmp_path, prediction_type="flow_prediction")
    assert asked.config["prediction_type"] == "flow_prediction"


# --- steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("steps", [2, 3, 8])
def test_a_step_keeps_shape_and_dtype_and_takes_the_times_in_order(settings, steps):
    scheduler = TwinFlowScheduler(**settings)
    scheduler.set_timesteps(num_inference_steps=steps)
    assert scheduler.num_inference_steps == steps
    assert scheduler.timesteps.shape == (steps,)
    assert scheduler.sigmas.shape == (steps + 1,)
    assert bool((scheduler.timesteps.diff() <= 0).all())
    assert scheduler.timesteps.min() > 0
    assert scheduler.timesteps.max() <= scheduler.config["num_train_timesteps"]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert walk(scheduler, steps, image(dtype=dtype)).dtype == dtype
        assert walk(scheduler, steps).shape == image().shape


def test_a_step_counts_and_a_new_schedule_starts_again():
    scheduler = TwinFlowScheduler()
    assert (scheduler.step_index, scheduler.begin_index) == (None, None)
    scheduler.set_timesteps(4)
    scheduler.step(image(), scheduler.timesteps[0], image())
    assert scheduler.step_index == 1
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None
    assert torch.equal(walk(scheduler), walk(scheduler))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_plain_tuple_and_an_output_say_the_same(settings):
    scheduler = TwinFlowScheduler(**settings)
    assert torch.equal(walk(scheduler, return_dict=False), walk(scheduler, return_dict=True))
    scheduler.set_timesteps(4)
    output = scheduler.step(image(), scheduler.timesteps[0], image())
    assert isinstance(output, TwinFlowSchedulerOutput)
    assert torch.equal(output["prev_sample"], output.prev_sample)


def test_the_input_of_the_network_and_the_starting_noise_are_not_scaled():
    scheduler = TwinFlowScheduler()
    scheduler.set_timesteps(2)
    assert torch.equal(scheduler.scale_model_input(image(), scheduler.timesteps[0]), image())
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.order == 1


def test_timesteps_may_be_numbers():
    scheduler = TwinFlowScheduler()
    scheduler.set_timesteps(2)
    by_tensor = scheduler.step(image(1), scheduler.timesteps[1], image())[0]
    scheduler.set_timesteps(2)
    assert torch.equal(scheduler.step(image(1), scheduler.timesteps[1].item(), image())[0], by_tensor)


def test_a_generator_for_each_row_gives_each_its_own_noise():
    def first(*seeds):
        scheduler = TwinFlowScheduler()
        scheduler.set_timesteps(2)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return scheduler.step(image(), scheduler.timesteps[0], image(), generator=generators)[0]

    assert torch.equal(first(1, 2)[1], first(3, 2)[1])
    assert not torch.equal(first(1, 2)[0], first(3, 2)[0])


def test_from_the_middle_of_a_schedule_noise_is_added_and_taken_away():
    """On a flow that is known, from each time of a long schedule: noise added there leads to the flow's end."""
    flow, scheduler = GaussianFlow(), TwinFlowScheduler(style="mul")
    data, noise = torch.full((1, 1), 0.7, dtype=torch.float64), torch.full((1, 1), 0.5, dtype=torch.float64)
    scheduler.set_timesteps(400)
    for begin in (100, 250, 399):
        scheduler.set_timesteps(400)
        scheduler.set_begin_index(begin)
        times = scheduler.timesteps[begin:]
        start = x = scheduler.add_noise(data, noise, times[:1])
        for time in times:
            x = scheduler.step(flow.velocity(x, time.double().view(1) / 1000), time, x, return_dict=False)[0]
        expected = flow.move(start, times[:1].double() / 1000, torch.zeros(1))
        torch.testing.assert_close(x, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_noise_is_added_where_the_image_is(device):
    scheduler = TwinFlowScheduler()
    scheduler.set_timesteps(4, device=device)
    assert scheduler.timesteps.device.type == device
    for where in ("cpu", device):
        noisy = scheduler.add_noise(image().to(device), image(1).to(device), scheduler.timesteps[:1].to(where))
        assert noisy.device.type == device


def test_a_training_script_adds_noise_before_any_schedule_is_set():
    scheduler, rng = TwinFlowScheduler(), np.random.default_rng(0)
    indices = torch.as_tensor(rng.integers(0, len(scheduler), 2))
    timesteps = scheduler.timesteps[indices]
    noisy = scheduler.add_noise(image(), image(1), timesteps)
    t = scheduler.sigmas[indices].view(2, 1, 1, 1)
    assert_rounded(noisy, t * image(1) + (1 - t) * image(), 4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_a_copy_goes_on_from_the_same_place(copied):
    scheduler = TwinFlowScheduler(style="mul", extrapolation=0.4)
    scheduler.set_timesteps(4)
    x = image()
    for time in scheduler.timesteps[:2]:
        x = scheduler.step(network(x, time), time, x)[0]
    other = copied(scheduler)
    for time in scheduler.timesteps[2:]:
        first, second = (each.step(network(x, time), time, x)[0] for each in (scheduler, other))
        assert torch.equal(first, second)
        x = first


# --- without twinrl ---------------------------------------------------------------------------------------


STOCK = {
    "1 step": ({}, 1),
    "2 steps": ({}, 2),
    "3 steps": ({}, 3),
    "4 steps from t = 1": ({"gap_start": 0.0}, 4),
    "any-step": ({"style": "any"}, 2),
    "any-step from t = 1": ({"style": "any", "gap_start": 0.0}, 6),
    "Euler": ({"style": "mul", "gap_start": 0.0, "kumaraswamy": [1.0, 1.0, 1.0]}, 25),
    "own sigmas' scale": ({"num_train_timesteps": 500}, 2),
}


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_scheduler_from_its_file_gives_our_samples(name, tmp_path):
    settings, steps = STOCK[name]
    ours = TwinFlowScheduler(**settings, seed=None)
    stock_scheduler(ours, steps).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert written["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert "twinrl" not in json.dumps(written).lower()
    stock = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    theirs = walk(stock, steps)
    assert_rounded(theirs, walk(ours, steps), 50 * steps)
    stock.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))  # as FLUX' pipeline and others do
    torch.testing.assert_close(stock.timesteps, ours.timesteps)


@pytest.mark.parametrize(
    ("settings", "steps", "word"),
    [
        ({}, 4, "sigmas=.0.999, 0.832667, 0.666333, 0.5."),
        ({"style": "mul"}, 8, "grid"),
        ({"order": 2}, 4, "order 2"),
        ({"style": "mul", "extrapolation": 0.4}, 8, "extrapolation"),
        ({"stochastic_ratio": 0.5}, 2, "stochastic_ratio"),
        ({"use_dynamic_shifting": True}, 2, "use_dynamic_shifting"),
        ({"shift": 3.0, "gap_start": 0.0, "gap_end": 0.0}, 4, "grid"),
    ],
)
def test_what_a_stock_scheduler_cannot_do_is_refused_in_one_line(settings, steps, word):
    with pytest.raises(InputError, match=word) as caught:
        stock_scheduler(TwinFlowScheduler(**settings), steps)
    assert "\n" not in str(caught.value)


def test_sigmas_of_the_refusal_serve_a_stock_scheduler():
    ours, stock = TwinFlowScheduler(seed=None), FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    stock.set_timesteps(sigmas=[0.999, 0.832667, 0.666333, 0.5])
    ours.set_timesteps(4)
    torch.testing.assert_close(stock.sigmas, ours.sigmas, rtol=0, atol=1e-6)
