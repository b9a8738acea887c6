"""What the lab's models promise, measured on test images that none of them was trained on.

What takes a whole training to learn is asked of the whole laboratory alone.
"""

import pytest
import torch

from tests.rounding import assert_rounded
from twinrl.backends import build_network, network_key
from twinrl.flow.draws import generator, normal
from twinrl.lab.degrade import Degrade
from twinrl.lab.digits import HELD_OUT_TEMPLATES, all_captions
from twinrl.lab.recipe import NETWORK
from twinrl.sampling import euler, sample

pytestmark = [pytest.mark.slow, pytest.mark.laboratory]


def accuracy(lab, pixels, labels):
    with torch.no_grad():
        return (lab.judge.logits(pixels).argmax(dim=1) == labels).float().mean().item()


WHOLE = pytest.param("whole_lab", 0.97, marks=pytest.mark.campaign)
PROMISED = pytest.mark.parametrize(("lab", "promised"), [("quick_lab", 0.8), WHOLE], indirect=["lab"])
"""Accuracy of the judge; seen: 0.998 of digits and of decoded ones, 0.978 and 0.94 in the quick laboratory."""


@PROMISED
def test_judge_recognises_real_digits(lab, promised):
    assert accuracy(lab, lab.test.pixels, lab.test.labels) >= promised


@pytest.fixture(scope="module")
def decoded(lab):
    """The test digits after the codec."""
    with torch.no_grad():
        return lab.decode(lab.latents("test")).clamp(-1, 1)


@PROMISED
def test_judge_recognises_round_tripped_digits(lab, decoded, promised):
    assert accuracy(lab, decoded, lab.test.labels) >= promised


def test_the_round_trip_error_is_real_but_small(lab, decoded):
    latents = lab.latents("test")[:100]
    with torch.no_grad():
        again = lab.encode(decoded[:100])
    rms = (again - latents).square().mean().sqrt().item()
    assert 0.01 < rms < 0.3


def test_latents_are_normalised(lab):
    latents = lab.latents("train")
    assert latents.shape == (len(lab.train), *lab.latent_shape)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3


def test_stored_latents_are_the_encoded_pixels(lab):
    with torch.no_grad():
        encoded = lab.encode(lab.test.pixels[:16])
    layers = [m for m in lab.models.codec.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert_rounded(encoded, lab.latents("test")[:16], roundings=sum(m.weight[0].numel() for m in layers))


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["lab_clip", "lab_hps", "lab_judge"])
def test_clip_picks_the_right_caption_of_held_out_templates(whole_lab, name):
    clip = whole_lab.scorers[name]
    columns = zip(*all_captions(HELD_OUT_TEMPLATES), strict=True)
    with torch.no_grad():
        images = clip.image_embedding(whole_lab.test.pixels)
    for prompts in columns:
        chosen = (images @ clip.cached_text_embedding(prompts).T).argmax(dim=1)
        assert (chosen == whole_lab.test.labels).float().mean() >= 0.9  # seen: 0.97


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["lab_hps", "lab_judge"])
def test_preference_models_prefer_clean_images(whole_lab, name):
    prompts = whole_lab.prompts(whole_lab.test.labels, 1, 1, held_out=True)
    degrade = Degrade(whole_lab.models.codec)
    worse = degrade(whole_lab.test.pixels, whole_lab.test.labels, generator(0, "test"))
    with torch.no_grad():
        better = whole_lab.scorers[name](whole_lab.test.pixels, prompts) > whole_lab.scorers[name](worse, prompts)
    assert better.float().mean() >= 0.9  # seen: 0.97 and 0.99


@pytest.mark.parametrize("name", ["lab_clip", "lab_hps", "lab_judge"])
def test_scorers_are_differentiable_in_pixels(lab, name):
    pixels = lab.test.pixels[:4].clone().requires_grad_()
    lab.scorers[name](pixels, lab.prompts(lab.test.labels[:4], 0, 0)).sum().backward()
    assert pixels.grad.isfinite().all()
    assert (pixels.grad.flatten(1).norm(dim=1) > 0).all()


def test_the_held_out_scorer_is_another_model(lab):
    assert lab.held_out == {"lab_judge"}
    assert lab.scorers["lab_judge"] is not lab.scorers["lab_hps"]


def test_a_prompt_has_the_same_condition_in_every_batch(lab):
    prompts = lab.prompts(torch.arange(10), 0, 0)
    together = lab.condition(prompts)["text"]
    lab.clip.freeze()  # forgets the embeddings
    alone = torch.cat([lab.condition([prompt])["text"] for prompt in reversed(prompts)]).flip(0)
    assert torch.equal(together, alone)


def test_the_empty_condition_is_no_prompts(lab):
    assert lab.null_condition(3)["text"].shape == (3, 64)
    assert lab.condition(["a handwritten seven"])["text"].norm() == pytest.approx(1, abs=1e-4)
    assert lab.null_condition(1)["text"].norm() == 0


@pytest.mark.campaign
def test_teacher_draws_recognisable_digits_in_50_steps(whole_lab):
    network = build_network(NETWORK, whole_lab, seed=0)
    network.load_state_dict(whole_lab.teacher_weights(network, network_key(NETWORK)))
    labels = whole_lab.test.labels
    z, condition = normal((500, *whole_lab.latent_shape), 0, "q"), whole_lab.condition(whole_lab.prompts(labels, 0, 0))
    with torch.no_grad():
        latents = sample(network, z, condition, euler(50))
        pixels = whole_lab.decode(latents).clamp(-1, 1)
    assert accuracy(whole_lab, pixels, labels) >= 0.95  # seen: 0.992
