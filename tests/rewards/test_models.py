"""Published reward models, tiny, loaded from files as the real ones: values, gradients, chunks, precision."""

import pytest
import torch
from torch.nn.functional import normalize

from tests.rewards.blip_reference import Blip
from tests.rewards.tiny import PROMPTS, SIDE, hf_clip, images, open_clip_model, reward
from tests.rounding import bound
from twinrl.rewards.imagereward import MEAN, STD
from twinrl.rewards.preprocess import centre_crop, letterbox

KINDS = ["hpsv2", "pickscore", "clipscore", "aesthetic", "imagereward"]
DOUBLE = {"rtol": 1e-9, "atol": 1e-9}
"""For scores around 1 and their gradients in float64: six digits above the rounding of a few layers."""


def gradient(model, x, prompts=PROMPTS):
    x = x.clone().requires_grad_(True)
    scores = model(x, prompts)
    scores.sum().backward()
    return scores.detach(), x.grad


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_agrees_with_finite_differences(saved, kind):
    model = reward({"kind": kind, **saved[kind], "dtype": "float64"})
    x = images(dtype=torch.float64)
    _, grad = gradient(model, x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-5
    difference = (model(x + step * direction, PROMPTS) - model(x - step * direction, PROMPTS)) / (2 * step)
    assert grad.abs().max() > 0
    torch.testing.assert_close((grad * direction).flatten(1).sum(1), difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_chunks_change_neither_values_nor_gradients(saved, kind, recompute):
    settings = {"kind": kind, **saved[kind], "dtype": "float64"}
    x = images(dtype=torch.float64)
    whole = gradient(reward(settings), x)
    chunked = gradient(reward({**settings, "chunk": 2, "recompute": recompute}), x)
    torch.testing.assert_close(chunked, whole, **DOUBLE)


def test_recomputing_keeps_the_pixels_alone(saved):
    def kept(recompute):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t)
        model = reward({"kind": "hpsv2", **saved["hpsv2"], "chunk": 1, "recompute": recompute})
        with hooks:
            model(images().requires_grad_(True), PROMPTS)
        return sum(sizes)

    assert kept(recompute=True) == images().numel() < kept(recompute=False) / 40


@pytest.mark.parametrize("kind", KINDS)
def test_networks_are_frozen(saved, kind):
    model = reward({"kind": kind, **saved[kind]})
    gradient(model, images())
    for network in model.modules().values():
        assert not any(module.training for module in network.modules())
        assert all(not p.requires_grad and p.grad is None for p in network.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_score_is_float32_whatever_the_tower_computes_in(saved, kind):
    exact = reward({"kind": kind, **saved[kind]})(images(), PROMPTS)
    model = reward({"kind": kind, **saved[kind], "dtype": "bf16"})
    rough, grad = gradient(model, images())
    assert {p.dtype for network in model.modules().values() for p in network.parameters()} == {torch.bfloat16}
    assert rough.dtype == exact.dtype == grad.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_one_channel_is_three_equal_channels(saved, kind):
    model = reward({"kind": kind, **saved[kind]})
    grey = images()[:, :1]
    torch.testing.assert_close(model(grey, PROMPTS), model(grey.repeat(1, 3, 1, 1), PROMPTS))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_depend_on_the_prompt_if_declared(saved, kind):
    model = reward({"kind": kind, **saved[kind]})
    scores = model(images(1).expand(2, -1, -1, -1), ["a red cat", "two dogs on the beach"])
    rounded = bound(200, float(scores.abs().max()), scores.dtype)  # rows of a batch may go through different kernels
    assert bool((scores[0] - scores[1]).abs() > rounded) is model.needs_prompts


def test_wrong_number_of_prompts_is_refused(saved):
    with pytest.raises(ValueError, match="3 images and 2 prompts"):
        reward({"kind": "hpsv2", **saved["hpsv2"]})(images(), PROMPTS[:2])


def test_nan_in_one_image_stays_in_its_score(saved):
    x = images()
    x[1, 0, 3, 3] = torch.nan
    scores = reward({"kind": "hpsv2", **saved["hpsv2"]})(x, PROMPTS)
    assert scores.isnan().tolist() == [False, True, False]


def test_moving_the_model_keeps_its_scores(saved):
    model = reward({"kind": "hpsv2", **saved["hpsv2"]})
    before = model(images(), PROMPTS)
    model.to("meta")
    assert all(p.is_meta for p in model.modules()["model"].parameters())
    fresh = reward({"kind": "hpsv2", **saved["hpsv2"]}).to("cpu")
    torch.testing.assert_close(fresh(images(), PROMPTS), before)


def test_a_prompt_scores_alike_in_every_batch(saved):
    model = reward({"kind": "pickscore", **saved["pickscore"]})
    model(images(), ["one", "two", "three"])
    again = reward({"kind": "pickscore", **saved["pickscore"]})
    assert torch.equal(model(images(1), ["two"]), again(images(1), ["two"]))


# --- definitions, against the original classes ---------------------------------------------------------------


def test_hpsv2_is_the_plain_cosine_of_letterboxed_images(saved):
    import open_clip

    torch.manual_seed(0)
    clip, x = open_clip_model().double(), images(dtype=torch.float64)
    tokens = open_clip.tokenize(PROMPTS)
    with torch.no_grad():
        image, text, _ = clip(letterbox(x, SIDE), tokens)
    ours = reward({"kind": "hpsv2", **saved["hpsv2"], "dtype": "float64"})(x, PROMPTS)
    torch.testing.assert_close(ours, (image * text).sum(-1), **DOUBLE)


@pytest.fixture(scope="module")
def reference(saved):
    """Logits of transformers' own CLIPModel in float64, with tokens of the open_clip vocabulary."""
    import open_clip
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(saved["pickscore"]["checkpoint"]).double().eval()

    def logits(prompts):
        pixels = centre_crop(images(dtype=torch.float64), SIDE)
        with torch.no_grad():
            output = clip(input_ids=open_clip.tokenize(prompts), pixel_values=pixels)
        return output.logits_per_image.diag(), clip.logit_scale.exp(), output.image_embeds

    return logits


def test_pickscore_has_clips_temperature(saved, reference):
    expected, *_ = reference(PROMPTS)
    ours = reward({"kind": "pickscore", **saved["pickscore"], "dtype": "float64"})(images(dtype=torch.float64), PROMPTS)
    torch.testing.assert_close(ours, expected.detach(), **DOUBLE)


@pytest.mark.slow
def test_clipscore_definitions(saved, reference):
    logits, scale, _ = reference(PROMPTS)
    prefixed, _, _ = reference([f"A photo depicts {prompt}" for prompt in PROMPTS])
    expected = {
        "cosine": logits / scale,
        "percent": 100 * (logits / scale).clamp(min=0),
        "paper": 2.5 * (prefixed / scale).clamp(min=0),
    }
    for definition, value in expected.items():
        model = reward({"kind": "clipscore", **saved["clipscore"], "definition": definition, "dtype": "float64"})
        torch.testing.assert_close(model(images(dtype=torch.float64), PROMPTS), value.detach(), **DOUBLE)


def test_aesthetic_head_is_linear_in_the_unit_embedding(saved, reference):
    """Dropout aside there is nothing between the layers, so their product is the whole head."""
    weights = {name: value.double() for name, value in torch.load(saved["aesthetic"]["checkpoint"]).items()}
    matrix, bias = torch.eye(24).double(), torch.zeros(24).double()
    for layer in (0, 2, 4, 6, 7):
        matrix = weights[f"layers.{layer}.weight"] @ matrix
        bias = weights[f"layers.{layer}.weight"] @ bias + weights[f"layers.{layer}.bias"]
    _, _, embedding = reference(PROMPTS)
    ours = reward({"kind": "aesthetic", **saved["aesthetic"], "dtype": "float64"})(images(dtype=torch.float64), [])
    torch.testing.assert_close(ours, (normalize(embedding, dim=-1) @ matrix.T + bias)[:, 0], **DOUBLE)


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [("a red cat", [2, 5, 6, 7, 3]), ("a red red " + "dogs " * 60, [2, 5, 6, 6, *[9] * 30, 3])],
)
def test_imagereward_is_the_published_network(saved, prompt, tokens):
    """Padded and cut prompts, against a forward pass in the file's own names on the prompt without padding."""
    settings = saved["imagereward"]
    weights = {name: value.double() for name, value in torch.load(settings["checkpoint"]).items()}
    sizes = settings["sizes"]
    blip = Blip(weights, sizes["vision_heads"], sizes["text_heads"], sizes["patch"])
    x = images(1, dtype=torch.float64)
    raw = blip(centre_crop(x, SIDE), torch.tensor([tokens]))
    ours = reward({"kind": "imagereward", **settings, "dtype": "float64"})(x, [prompt])
    torch.testing.assert_close(ours, (raw - MEAN) / STD, **DOUBLE)


def test_clip_tokens_agree_with_transformers_own_tokenizer(tmp_path):
    """Same vocabulary, so that a CLIPModel's folder needs no tokenizer; padding does not matter."""
    import gzip
    import json
    from pathlib import Path

    import open_clip
    from transformers import CLIPTokenizer

    from twinrl.rewards.hpsv2 import clip_tokens

    bundled = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in bundled.encoder.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    merges = gzip.decompress((Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges.split("\n")[1 : 49152 - 256 - 2 + 1]]))
    theirs = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    for prompt in [*PROMPTS, "A Café at 7:30pm, 4k — ultra-detailed!", "word " * 200]:
        expected = theirs(prompt, truncation=True, max_length=77)["input_ids"]
        assert clip_tokens([prompt], 77)[0, : len(expected)].tolist() == expected


def test_scores_of_the_tower_ignore_what_pads_the_prompt(saved):
    clip = hf_clip()
    tokens = torch.tensor([[49406, 320, 736, 2368, 49407, 0, 0, 0]])
    padded = tokens.clone()
    padded[0, 5:] = 49407
    with torch.no_grad():
        first, second = (clip.text_model(input_ids=value).pooler_output for value in (tokens, padded))
    torch.testing.assert_close(first, second)
