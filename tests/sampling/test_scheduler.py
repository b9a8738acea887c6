import math

import numpy as np
import pytest
import torch

from tests import reference
from tests.rounding import assert_rounded
from tests.sampling.gaussian import GaussianFlow
from twinrl.config.errors import InputError
from twinrl.machine.compat import ensure_torchvision
from twinrl.sampling import SamplerConfig, any_step, euler, few_step, multi_step, nfe, sample, time_grid

ensure_torchvision()

from twinrl.sampling.scheduler import TwinFlowScheduler  # noqa: E402 (diffusers may import torchvision)

CONFIGS = {
    "few 1": few_step(1),
    "few 2": few_step(2),
    "few 4": few_step(4),
    "any 4": any_step(4),
    "mul 12": multi_step(12, extrapolation=0.4),
    "euler 5": euler(5),
    "few order 2": SamplerConfig(steps=5, order=2, style="few", stochastic_ratio=0.5),
    "any order 2": SamplerConfig(steps=6, order=2, style="any", stochastic_ratio=0.0),
    "mul order 2": SamplerConfig(steps=9, order=2, style="mul", extrapolation=0.3, gap_end=0.0),
    "sde": SamplerConfig(steps=7, style="mul", stochastic_ratio="sde", gap_end=0.0),
    "sde order 2": SamplerConfig(steps=7, order=2, style="any", stochastic_ratio="sde"),
}


def scheduler_of(config: SamplerConfig, **settings) -> TwinFlowScheduler:
    """The scheduler with a sampler's settings."""
    return TwinFlowScheduler(**config.model_dump(exclude={"steps"}), **settings)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def walk(scheduler, network, z, condition, steps):
    """What a pipeline does, with a network that knows the target time; t and r are exact."""
    scheduler.set_timesteps(steps)
    x, predictions = z, [z]
    for index, timestep in enumerate(scheduler.timesteps):
        t = torch.full((len(z),), scheduler._plan[index].time, dtype=torch.float64)
        r = torch.full((len(z),), scheduler.target_time(), dtype=torch.float64)
        output = scheduler.step(network(x, t, r, condition), timestep, x)
        x = output.prev_sample
        predictions.append(output.pred_original_sample)
    return x, predictions


# --- equal to the sampler -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_scheduler_gives_the_sampler_s_samples(name, tmp_path):
    """Bit for bit, also after a round trip through a file."""
    config, values, network = CONFIGS[name], reference.case("sample_few_2"), reference.network("net_sampler")
    z, condition = values["z"], {"c": values["c"]}
    expected = sample(network, z, condition, config, seed=4)
    scheduler = scheduler_of(config, seed=4)
    scheduler.save_pretrained(tmp_path)
    for each in (scheduler, TwinFlowScheduler.from_pretrained(tmp_path)):
        with torch.no_grad():
            result, _ = walk(each, network, z, condition, config.steps)
        assert torch.equal(result, expected)


@pytest.mark.parametrize("name", ["sample_few_2", "sample_few_4", "sample_any_4", "sample_mul_12"])
def test_the_scheduler_reproduces_the_public_trajectories(name):
    values = reference.case(name)
    style, steps = name.split("_")[1], int(name.split("_")[2])
    scheduler = TwinFlowScheduler(style=style, extrapolation=0.4 if style == "mul" else 0.0)
    scheduler._draw = lambda step, *_: values["noise"][step]
    with torch.no_grad():
        _, predictions = walk(scheduler, reference.network("net_sampler"), values["z"], {"c": values["c"]}, steps)
    assert reference.relative_error(torch.stack(predictions), values["traj"]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_samples_do_not_round_the_state(dtype):
    """A float32 or bfloat16 pipeline gets the sampler's float64 state: the same sample to the last bit."""
    config, z = euler(50), normal(2, 1, 2, 2).to(dtype)

    def network(x, t, r, condition):
        return torch.sin(3 * x)

    result, _ = walk(scheduler_of(config), network, z, {}, 50)
    assert result.dtype == dtype
    assert torch.equal(result, sample(network, z, {}, config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_sample_changed_in_between_is_taken_as_it_is(dtype, in_place):
    scheduler, z = TwinFlowScheduler(style="any"), normal(2, 1, 2, 2).to(dtype)
    scheduler.set_timesteps(2)
    first = scheduler.step(z, scheduler.timesteps[0], z).prev_sample
    changed = first.fill_(5.0) if in_place else torch.full_like(first, 5.0)
    result = scheduler.step(torch.ones_like(z), scheduler.timesteps[1], changed).prev_sample
    torch.testing.assert_close(result, 5.0 - 0.5 * torch.ones_like(z))


def test_noise_is_keyed_given_generated_or_global():
    z = normal(2, 1, 2, 2)

    def first(seed=0, **given):
        scheduler = TwinFlowScheduler(seed=seed)
        scheduler.set_timesteps(2)
        return scheduler.step(z, scheduler.timesteps[0], z, return_dict=False, **given)[0]

    assert torch.equal(first(), first())
    assert not torch.equal(first(), first(seed=1))
    assert torch.equal(first(noise=torch.zeros_like(z)), first(seed=None, noise=torch.zeros_like(z)))
    drawn = [first(generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(first(seed=None), first(seed=None))


# --- times ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("style", "preset"), [("few", few_step), ("any", any_step), ("mul", multi_step)])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_settings_left_open_are_the_style_s_own(style, preset, steps):
    assert TwinFlowScheduler(style=style).sampler_config(steps) == preset(steps)


def test_timesteps_are_times_in_training_units():
    scheduler = TwinFlowScheduler(num_train_timesteps=500)
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == pytest.approx([499.5, 300.0])
    assert scheduler.sigmas.tolist() == pytest.approx([0.999, 0.6, 0.0])
    assert scheduler.timesteps.dtype == torch.float32


def test_order_2_lists_the_times_between_twice():
    scheduler = scheduler_of(CONFIGS["mul order 2"])
    scheduler.set_timesteps(9)
    times = time_grid(CONFIGS["mul order 2"])[:-1]
    expected = torch.cat([times[:1], times[1:].repeat_interleave(2)]) * 1000
    torch.testing.assert_close(scheduler.timesteps, expected.float())
    assert len(scheduler.timesteps) == nfe(CONFIGS["mul order 2"])


@pytest.mark.parametrize("steps", [2, 3, 4, 5])
@pytest.mark.parametrize("order", [1, 2])
def test_there_is_an_entry_for_every_step(order, steps):
    """Pipelines cut a schedule by the number of steps that they asked for, in numbers or by the usual ramp."""
    scheduler = TwinFlowScheduler(order=order)
    for told in ({"num_inference_steps": steps}, {"sigmas": np.linspace(1.0, 1 / steps, steps)}):
        scheduler.set_timesteps(**told)
        assert len(scheduler.timesteps) == len(scheduler.target_timesteps) == steps * scheduler.order


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_ramp_that_pipelines_pass_by_default_only_counts_the_steps(steps):
    scheduler = TwinFlowScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=0.9, device="cpu")
    torch.testing.assert_close(scheduler.timesteps, (1000 * time_grid(few_step(steps))[:-1]).float())


def test_own_sigmas_and_timesteps_are_followed():
    scheduler = TwinFlowScheduler()
    scheduler.set_timesteps(sigmas=[0.9, 0.25])
    assert scheduler.timesteps.tolist() == [900, 250]
    scheduler.set_timesteps(timesteps=[800, 100])
    assert scheduler.sigmas.tolist() == pytest.approx([0.8, 0.1, 0.0])


def test_shift_and_mu_move_the_grid_as_flow_matching_does():
    t = time_grid(few_step(4))[:-1]
    scheduler = TwinFlowScheduler(shift=3.0)
    scheduler.set_timesteps(4, mu=5.0)
    torch.testing.assert_close(scheduler.timesteps, (1000 * 3 * t / (1 + 2 * t)).float())
    dynamic = TwinFlowScheduler(use_dynamic_shifting=True)
    dynamic.set_timesteps(4, mu=0.8)
    e = np.exp(0.8)
    torch.testing.assert_close(dynamic.timesteps, (1000 * e / (e + (1 / t - 1))).float())


@pytest.mark.parametrize(("steps", "gap"), [(1, 0.6), (2, 0.6), (3, 0.5), (4, 0.5), (8, 0.3)])
def test_simpletuner_s_reading_of_a_zero_gap(steps, gap):
    assert TwinFlowScheduler(gap_end=0.0, simpletuner_gap_end=True).sampler_config(steps).gap_end == gap
    assert TwinFlowScheduler(gap_end=0.0).sampler_config(steps).gap_end == 0


@pytest.mark.parametrize("name", ["few 4", "any 4", "mul 12", "any order 2"])
def test_target_times_can_be_read_by_index_tensor_and_timestep(name):
    scheduler = scheduler_of(CONFIGS[name])
    scheduler.set_timesteps(CONFIGS[name].steps)
    targets = torch.tensor([scheduler.target_time(i) for i in range(len(scheduler.timesteps))])
    torch.testing.assert_close(scheduler.target_timesteps, 1000 * targets)
    assert torch.equal(scheduler.target_for(scheduler.timesteps), scheduler.target_timesteps)
    rounded = scheduler.timesteps.to(torch.bfloat16)
    assert torch.equal(scheduler.target_for(rounded), scheduler.target_timesteps)
    assert torch.equal(scheduler.target_for(scheduler.timesteps.tolist()), scheduler.target_timesteps)
    assert torch.equal(scheduler.target_for(float(scheduler.timesteps[0])), scheduler.target_timesteps[:1])


@pytest.mark.parametrize("shape", [(3, 1, 2, 2), (3, 5, 4), (3, 2, 2, 2, 2)])
@pytest.mark.parametrize("times", [[250.0], [250.0, 500.0, 1000.0], [250, 500, 0]])
def test_noise_is_added_along_the_transport(shape, times):
    """For one time or one a row, also integers; ``scale_noise`` and ``add_noise`` differ in their order alone."""
    scheduler, x, z = TwinFlowScheduler(), normal(*shape), normal(*shape, seed=1)
    t = (torch.tensor(times, dtype=torch.float64) / 1000).view(-1, *[1] * (len(shape) - 1))
    for noisy in (scheduler.scale_noise(x, torch.tensor(times), z), scheduler.add_noise(x, z, torch.tensor(times))):
        torch.testing.assert_close(noisy, t * z + (1 - t) * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_added_noise_keeps_the_dtype_and_is_rounded_once(dtype):
    """In float16 a time of 999 of 1000 alone would be off by more."""
    scheduler, x, z = TwinFlowScheduler(), normal(2, 1, 2, 2).to(dtype), normal(2, 1, 2, 2, seed=1).to(dtype)
    noisy = scheduler.add_noise(x, z, torch.tensor([999.0, 333.0]))
    t = torch.tensor([0.999, 0.333], dtype=torch.float64).view(2, 1, 1, 1)
    assert noisy.dtype == dtype
    assert_rounded(noisy, (t * z.double() + (1 - t) * x.double()).to(dtype), 2)


def test_timesteps_of_another_number_than_the_rows_are_refused():
    with pytest.raises(InputError, match="1 or 3 of them"):
        TwinFlowScheduler().add_noise(normal(3, 2), normal(3, 2), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("steps", [2, 3, 6, 9])
@pytest.mark.parametrize("style", ["few", "any", "mul"])
def test_order_2_ends_at_the_data_from_every_start(style, steps):
    """All data lie at 0. At a correction there is nothing to correct yet: the sample stays, the next one predicts."""
    for begin in range(steps):
        scheduler, x = TwinFlowScheduler(style=style, order=2), normal(2, 1, 2, 2)
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(begin)
        for time in scheduler.timesteps[begin:]:
            x = scheduler.step(x / (time.double() / 1000), time, x, return_dict=False)[0]
        torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("by", ["index", "timestep"])
@pytest.mark.parametrize("order", [1, 2])
def test_starting_late_ends_where_the_flow_ends(by, order):
    """From the flow's own point at the second time, the rest of the schedule leads to the flow's end."""
    flow, scheduler = GaussianFlow(), TwinFlowScheduler(style="mul", order=order)
    scheduler.set_timesteps(401)
    t = scheduler.timesteps[2 * order :].double() / 1000
    start = flow.move(normal(3, 1), torch.ones(3), t[0].expand(3))
    if by == "index":
        scheduler.set_begin_index(2 * order)
    x = start
    for each in t:
        velocity = flow.velocity(x, each.expand(3))
        x = scheduler.step(velocity, (each * 1000).float(), x, return_dict=False)[0]
    expected = flow.move(start, t[0].expand(3), torch.zeros(3))
    torch.testing.assert_close(x, expected, rtol=0, atol=0.02 if order == 1 else 1e-3)


def test_starting_late_has_nothing_to_extrapolate_from():
    scheduler, z = TwinFlowScheduler(style="mul", extrapolation=0.4), normal(2, 1, 2, 2)
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(4)
    result = scheduler.step(z, scheduler.timesteps[4], z, return_dict=False)[0]
    torch.testing.assert_close(result, (1 - float(scheduler.sigmas[4] - scheduler.sigmas[5])) * z)


# --- wrong use ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type"),
        ({"style": "multi"}, "style"),
        ({"order": 3}, "order"),
        ({"order": 2, "gap_start": 0.0}, "undefined"),
        ({"shift": 0.0}, "shift"),
        ({"shift": math.inf}, "shift"),
        ({"shift": "3"}, "shift"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"num_train_timesteps": 2.5}, "num_train_timesteps"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ({"stochastic_ratio": 2.0}, "stochastic_ratio"),
        ({"kumaraswamy": [1.0, 1.0]}, "kumaraswamy"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, word):
    with pytest.raises(InputError, match=word) as caught:
        TwinFlowScheduler(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({}, "number of steps"),
        ({"num_inference_steps": 0}, "number of steps"),
        ({"num_inference_steps": "3"}, "number of steps"),
        ({"num_inference_steps": 10**12}, "number of steps"),
        ({"sigmas": 5.0}, "no list of times"),
        ({"timesteps": []}, "no list of times"),
        ({"sigmas": ["a"]}, "no numbers"),
        ({"sigmas": [0.9, 0.5], "timesteps": [900, 500]}, "one of them"),
        ({"num_inference_steps": 3, "sigmas": [0.9, 0.5]}, "another length"),
        ({"sigmas": [0.5, 0.9]}, "sampling times"),
        ({"sigmas": [0.9, 0.0]}, "sampling times"),
    ],
)
def test_wrong_schedules_are_refused_in_one_line(arguments, word):
    with pytest.raises(InputError, match=word):
        TwinFlowScheduler().set_timesteps(**arguments)


@pytest.mark.parametrize("mu", [None, 1000, math.nan, "1"])
def test_dynamic_shifting_needs_mu(mu):
    with pytest.raises(InputError, match="mu"):
        TwinFlowScheduler(use_dynamic_shifting=True).set_timesteps(4, mu=mu)


def test_stepping_without_or_beyond_a_schedule_is_refused():
    scheduler, z = TwinFlowScheduler(), normal(2, 1, 2, 2)
    with pytest.raises(InputError, match="set_timesteps"):
        scheduler.step(z, torch.tensor(999.0), z)
    scheduler.set_timesteps(1)
    with pytest.raises(InputError, match="no such timestep"):
        scheduler.step(z, 3.0, z)
    scheduler.step(z, scheduler.timesteps[0], z)
    with pytest.raises(InputError, match="set_timesteps"):
        scheduler.step(z, scheduler.timesteps[0], z)


# --- in a pipeline --------------------------------------------------------------------------------------


TEXT_PARTS = ["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"]
NO_TEXT = dict.fromkeys(TEXT_PARTS)


@pytest.fixture(scope="module")
def transformer():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    return model.double().eval()


@pytest.fixture(scope="module")
def pipeline(transformer):
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline

    vae = AutoencoderKL(block_out_channels=(4, 4), latent_channels=4, norm_num_groups=2)
    result = StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=TwinFlowScheduler(), **NO_TEXT)
    result.set_progress_bar_config(disable=True)
    return result


@pytest.mark.parametrize("name", ["few 2", "any 4", "mul 12", "mul order 2"])
def test_a_stock_pipeline_gives_the_sampler_s_samples(pipeline, transformer, name):
    """SD3's pipeline on a network without a target time; times pass through float32 timesteps on the way."""
    config, z = CONFIGS[name], normal(2, 4, 8, 8)
    condition = {"text": normal(2, 3, 16, seed=1), "pooled": normal(2, 16, seed=2)}

    def network(x, t, r, c):
        return transformer(x, c["text"], c["pooled"], timestep=t * 1000, return_dict=False)[0]

    pipeline.scheduler = scheduler_of(config)
    latents = pipeline(
        prompt_embeds=condition["text"],
        pooled_prompt_embeds=condition["pooled"],
        num_inference_steps=config.steps,
        guidance_scale=1.0,
        latents=z,
        output_type="latent",
    ).images
    expected = sample(network, z, condition, config)
    assert reference.relative_error(latents, expected) < 1e-6


def test_a_saved_pipeline_loads_with_its_scheduler(pipeline, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    pipeline.scheduler = TwinFlowScheduler(style="any", seed=7)
    pipeline.save_pretrained(tmp_path)
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path, **NO_TEXT)
    assert isinstance(loaded.scheduler, TwinFlowScheduler)
    assert public(loaded.scheduler.config) == public(pipeline.scheduler.config)
    assert loaded.scheduler.config["style"] == "any"


def public(config):
    """A scheduler's own settings, without diffusers' bookkeeping."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
