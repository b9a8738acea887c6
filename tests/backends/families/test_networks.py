"""Every family's network: equal to its own pipeline, told two times and a sign, a citizen of twinrl's conventions."""

import copy

import pytest
import torch

from tests.backends.families import tiny
from tests.backends.families.conftest import assert_gradients_alike, disturbed, gradients_of
from tests.backends.families.forward import T, at
from tests.backends.families.held import from_pipeline
from tests.backends.families.made import assert_alike
from twinrl.backends import tells_trajectories_apart
from twinrl.backends.families.family import FrozenTeacher
from twinrl.flow import conditions
from twinrl.sampling import euler, sample


def test_multi_step_sampling_equals_the_familys_own_pipeline(flow):
    """Packing, time scale, direction of the velocity, prompts, masks and guidance embedding, all at once."""
    z, steps = flow.noise(), 4
    pipeline = flow.pipeline
    pipeline.scheduler = tiny.euler()
    theirs = flow.call(pipeline, z, num_inference_steps=steps, sigmas=[1.0, 0.75, 0.5, 0.25], output_type="latent")
    ours = sample(flow.network(), z, flow.condition, euler(steps))
    assert (ours - z).abs().mean() > 0.1
    assert_alike(flow.name, from_pipeline(flow.family, theirs, flow.shape), ours)


def test_a_new_student_is_its_teacher_on_both_branches_and_for_every_target(case):
    network = case.network()
    teacher = at(network, case)
    for t, r in ((T, 0 * T), (-T, -T), (-T, 0 * T)):
        assert torch.equal(at(network, case, t, r), teacher)


def test_second_time_and_sign_leave_equal_times_alone(case):
    """At r = t ≥ 0 the output is bitwise the teacher's, whatever e₂ and the sign learnt; elsewhere it is not."""
    network = case.network()
    teacher = at(network, case)
    with torch.no_grad():
        for parameter in network.transformer.twin_parameters().values():
            parameter.add_(torch.randn_like(parameter))
    assert torch.equal(at(network, case), teacher)
    assert not torch.allclose(at(network, case, T, 0 * T), teacher, atol=1e-3)
    assert not torch.allclose(at(network, case, -T, -T), teacher, atol=1e-3)


def test_branches_can_be_told_apart(case):
    assert tells_trajectories_apart(case.network(), case.shape, case.condition)


def test_without_the_sign_they_could_not(case):
    """The factor (|t| − |r|) alone is zero on both branches: the check is one that can fail."""
    network = disturbed(case.network())
    with torch.no_grad():
        network.transformer.twin_sign.zero_()
    assert torch.equal(at(network, case, T, T), at(network, case, -T, -T))


def test_every_trained_embedding_gets_a_gradient(case):
    network = disturbed(case.network())
    told = case.condition
    outputs = [network(case.noise(), t, r, told) for t, r in ((T, 0.3 * T), (-T, -T))]
    sum(output.square().mean() for output in outputs).backward()
    twin = network.transformer.twin_parameters()
    assert [n for n, p in twin.items() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_conditions_of_any_prompts_join_and_rows_do_not_mix(case):
    """Prompts of other lengths, and the empty condition, beside a row change nothing in it."""
    network = disturbed(case.network())
    more = case.family.encode_prompts(["a much longer prompt than those"])
    joined = conditions.concatenate([case.condition, more, case.family.null_condition(2)])
    joined = conditions.to(joined, "cpu", torch.float32)
    assert conditions.size(joined) == 5
    x, t = torch.randn(5, *case.shape), torch.linspace(-0.9, 0.9, 5)
    with torch.no_grad():
        together = network(x, t, t, joined)
        for row in range(5):
            alone = network(
                x[row : row + 1], t[row : row + 1], t[row : row + 1], conditions.rows(joined, slice(row, row + 1))
            )
            assert_alike(case.name, together[row : row + 1], alone)


def test_prompts_matter_and_the_empty_one_is_not_them(case):
    network = case.network()
    swapped = conditions.rows(case.condition, torch.tensor([1, 0]))
    assert not torch.allclose(at(network, case), at(network, case, condition=swapped), atol=1e-4)
    empty = case.family.null_condition(2)
    assert not torch.allclose(at(network, case), at(network, case, condition=empty), atol=1e-4)


def test_times_reach_the_time_module_exactly_under_bf16(case):
    """0.999 and 1 are one number in bfloat16, as are 0.799 and 0.8."""
    network = case.network(dtype="bf16")
    seen = []
    transformer = network.transformer
    getattr(transformer, transformer.TIME).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    t = torch.tensor([0.799, 0.8] if case.name == "stable_diffusion" else [0.999, 1.0])  # its schedule ends at 0.936
    output = at(network, case, t)
    assert output.dtype == torch.float32
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(transformer.level(seen[0]), t, atol=1e-7, rtol=0)


def test_gradient_checkpointing_changes_no_gradient(case):
    def gradients(**settings):
        network = disturbed(case.network(**settings)).train()
        network(case.noise(), T, 0.5 * T, case.condition).square().mean().backward()
        return gradients_of(network)

    plain, checkpointed = gradients(), gradients(gradient_checkpointing=True)
    assert len(plain) > 10
    assert_gradients_alike(checkpointed, plain)


def test_checkpointing_recomputes_the_blocks(sd3):
    network = sd3.network(gradient_checkpointing=True).train()
    calls = []
    network.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    network(sd3.noise(), T, T, sd3.condition).square().mean().backward()
    assert len(calls) == 2


def test_a_copy_has_its_own_embeddings(case):
    """An EMA or a frozen teacher is a deep copy; its hooks must not lead back to the student."""
    network = disturbed(case.network())
    twin = copy.deepcopy(network)
    before = at(twin, case, -T, 0 * T)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(at(twin, case, -T, 0 * T), before)
    assert set(network.state_dict()) == set(twin.state_dict())


def test_names_are_the_stock_transformers_and_twinflows(case):
    network = case.network()
    stock, ours = set(getattr(case.pipeline, case.family.PART).state_dict()), set(network.transformer.state_dict())
    others = {"sana": "time_embed_2.", "z_image": "t_embedder_2.", "stable_diffusion": "time_embedding_2."}
    others |= dict.fromkeys(("flux2", "flux2_klein"), "time_guidance_embed_2.")
    second = others.get(case.name, "time_text_embed_2.")
    assert stock < ours
    assert {name for name in ours - stock if not name.startswith(second)} == {"twin_sign"}


@pytest.mark.slow
def test_blocks_to_shard(case):
    network = case.network()
    classes = case.family.block_classes(network)
    assert {c.__name__ for c in classes} == set(case.family.BLOCKS)
    held = sum(p.numel() for m in network.modules() if type(m) in classes for p in m.parameters())
    assert held > 0


@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_the_guidance_that_flux_is_told_is_ours(cases, name):
    flux = cases(name)
    told, other = flux.network(embedded_guidance=3.5), flux.network(embedded_guidance=1.0)
    assert not torch.allclose(at(told, flux), at(other, flux), atol=1e-4)
    assert other.transformer.config["embedded_guidance"] == 1.0


def test_sd3_without_t5_as_diffusers_allows(sd3, tmp_path):
    from twinrl.backends.families import load_family

    pipeline = copy.copy(sd3.pipeline)
    pipeline = type(pipeline)(**pipeline.components | {"text_encoder_3": None, "tokenizer_3": None})
    pipeline.save_pretrained(tmp_path / "small")
    family = load_family("sd3", sd3.config.model_copy(update={"path": str(tmp_path / "small")}))
    expected, _, pooled, _ = pipeline.encode_prompt(["a"], None, None, do_classifier_free_guidance=False)
    told = family.encode_prompts(["a"])
    assert torch.equal(told["text"], expected)
    assert torch.equal(told["pooled"], pooled)
    assert at(family.to("cpu").network(sd3.config), sd3).shape == (2, *sd3.shape)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_frozen_teacher_is_the_pretrained_model(case, lora):
    """Without adapters only e₂ and the sign are hidden; the other weights are the student's own."""
    from twinrl.backends.families.lora import LoraSettings

    settings = LoraSettings(**lora) if lora else None
    teacher = at(case.network(), case)
    network = case.network(lora=settings)
    with torch.no_grad():
        changed = network.transformer.twin_parameters() if lora is None else dict(network.named_parameters())
        for parameter in changed.values():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    frozen = FrozenTeacher(network)
    assert list(frozen.parameters()) == []
    student = at(network, case, -T, 0 * T)
    assert_alike(case.name, frozen(case.noise(), -T, 0 * T, case.condition), teacher)
    assert torch.equal(at(network, case, -T, 0 * T), student)
    assert not torch.allclose(student, teacher, atol=1e-3)
