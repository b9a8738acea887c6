"""The lab's CLIP: a tiny open_clip model for captions of digits, and the preference models made from it.

``lab_clip`` (plain CLIP) also provides the text embedding that conditions the flow. ``lab_hps`` is the same
model fine-tuned on preferences, as HPSv2 was (arXiv:2306.09341); ``lab_judge`` is trained apart, with another
seed and width, and kept out of training. All score by the plain cosine, which is differentiable in the pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, one_hot, softplus

from twinrl.flow.draws import generator
from twinrl.flow.source import Split
from twinrl.lab.degrade import Degrade
from twinrl.lab.digits import CLASSES, HELD_OUT_TEMPLATES, TEMPLATES, captions
from twinrl.lab.fitting import Recipe, fit

CONTEXT = 16
EMBEDDING = 64


class WordTokenizer:
    """Words of the lab's captions as tokens, everything else as one unknown word.

    Tokens are 0 padding, 1 start, 2 unknown, then the vocabulary, then the end token: open_clip's ``argmax``
    pooling reads the text's embedding at the highest token. The bundled 49408-word tokenizer would put 95 % of
    the model's parameters into rows that no caption uses.
    """

    def __init__(self) -> None:
        words = {word for template in TEMPLATES + HELD_OUT_TEMPLATES for word in template.split()} - {"{}"}
        vocabulary = sorted(words | set(CLASSES))
        self.unknown = 2
        self._token = {word: 3 + number for number, word in enumerate(vocabulary)}
        self.end = 3 + len(vocabulary)
        self.size = self.end + 1

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """B prompts → (B, 16) tokens; longer prompts are cut."""
        tokens = torch.zeros(len(prompts), CONTEXT, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            words = [self._token.get(word, self.unknown) for word in prompt.lower().split()]
            sentence = [1, *words[: CONTEXT - 2], self.end]
            tokens[row, : len(sentence)] = torch.tensor(sentence)
        return tokens


class ClipModel(nn.Module):
    """An open_clip model with its tokenizer; satisfies ``twinrl.flow.source.Scorer``.

    Arguments:
        width: of both towers, a multiple of 32.
        layers: of the image tower; the text tower has two.
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        self.tokenizer = WordTokenizer()
        self.clip = _open_clip(width, layers, self.tokenizer.size)
        self._text_cache: dict[str, Tensor] = {}

    def image_embedding(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, 32, 32) in [−1, 1] → unit vectors (B, 64)."""
        return self.clip.encode_image(pixels, normalize=True)

    def text_embedding(self, prompts: Sequence[str]) -> Tensor:
        """B prompts → unit vectors (B, 64), differentiable in the parameters."""
        tokens = self.tokenizer(prompts).to(self.clip.token_embedding.weight.device)
        return self.clip.encode_text(tokens, normalize=True)

    @torch.no_grad()
    def cached_text_embedding(self, prompts: Sequence[str]) -> Tensor:
        """``text_embedding`` of a frozen model, each prompt embedded once and by itself.

        By itself, because rows of a batched product depend in their last bits on the batch: a resumed run meets
        prompts in another grouping and must see the same condition.
        """
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._text_cache:
                self._text_cache[prompt] = self.text_embedding([prompt])[0]
        return torch.stack([self._text_cache[prompt] for prompt in prompts])

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines of pixels (B, 3, 32, 32) in [−1, 1] and B prompts → (B,) in [−1, 1]."""
        return (self.image_embedding(pixels) * self.cached_text_embedding(prompts)).sum(dim=-1)

    def freeze(self) -> "ClipModel":
        """Evaluation mode, no gradients for parameters, an empty text cache."""
        self._text_cache.clear()
        return self.eval().requires_grad_(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "ClipModel":
        self._text_cache.clear()  # another device or dtype
        return super()._apply(fn, recurse)


def train_clip(clip: ClipModel, data: Split, recipe: Recipe, tick: Callable[[], None]) -> None:
    """Train ``clip`` in place on image–caption pairs, contrastively between classes."""

    def loss(step: int) -> Tensor:
        rows = recipe.rows(len(data), step)
        images = clip.image_embedding(_noisy(data.pixels[rows], recipe.seed, step))
        return _contrastive(_scale(clip) * images @ _class_texts(clip, recipe.seed, step).T, data.labels[rows])

    fit(clip.parameters(), loss, recipe, tick)
    clip.freeze()


def train_preference(clip: ClipModel, data: Split, degrade: Degrade, recipe: Recipe, tick: Callable[[], None]) -> None:
    """Fine-tune ``clip`` in place to prefer clean over degraded images of the same prompt (Bradley–Terry).

    The contrastive loss stays, so that the score still says whether image and prompt agree.
    """
    clip.requires_grad_(True).train()

    def loss(step: int) -> Tensor:
        rows = recipe.rows(len(data), step)
        x, labels = data.pixels[rows], data.labels[rows]
        worse = degrade(x, labels, generator(recipe.seed, "degradation", step))
        images = clip.image_embedding(torch.cat([x, worse]))
        logits = _scale(clip) * images @ _class_texts(clip, recipe.seed, step).T  # (2B, 10)
        clean, degraded = logits.chunk(2)
        margin = (clean - degraded).gather(1, labels[:, None])
        return softplus(-margin).mean() + _contrastive(clean, labels)

    fit(clip.parameters(), loss, recipe, tick)
    clip.freeze()


def _class_texts(clip: ClipModel, seed: int, step: int) -> Tensor:
    """Unit embeddings (10, 64) of one keyed caption of each class."""
    prompts = captions(torch.arange(len(CLASSES)), seed, step)
    return clip.clip.encode_text(_hide_words(clip.tokenizer, prompts, seed, step), normalize=True)


def _scale(clip: ClipModel) -> Tensor:
    """The learnt inverse temperature, at most 100 as in CLIP."""
    return clip.clip.logit_scale.exp().clamp(max=100)


def _contrastive(logits: Tensor, labels: Tensor) -> Tensor:
    """Scaled cosines (B, 10) of images and one caption of each class against labels (B,), in both directions.

    All images of a class are positives of its caption, as a batch holds several of each class.
    """
    positive = one_hot(labels, len(CLASSES)).float()
    of_caption = (log_softmax(logits, dim=0) * positive).sum(dim=0) / positive.sum(dim=0).clamp(min=1)
    return (cross_entropy(logits, labels) - of_caption.mean() / 4) / 2


def _hide_words(tokenizer: WordTokenizer, prompts: Sequence[str], seed: int, step: int) -> Tensor:
    """Tokens with 10 % of the words that do not name the digit replaced by the unknown word."""
    tokens = tokenizer(prompts)
    names = torch.tensor([tokenizer([word])[0, 1] for word in CLASSES])
    hideable = (tokens > tokenizer.unknown) & (tokens < tokenizer.end) & ~torch.isin(tokens, names)
    chosen = torch.rand(tokens.shape, generator=generator(seed, "hidden words", step)) < 0.1
    return tokens.masked_fill(hideable & chosen, tokenizer.unknown)


def _noisy(x: Tensor, seed: int, step: int) -> Tensor:
    """Weak keyed pixel noise, of another strength for each image, against learning scans by heart."""
    draw = generator(seed, "noise", step)
    return x + 0.15 * torch.rand((len(x), 1, 1, 1), generator=draw) * torch.randn(x.shape, generator=draw)


def _open_clip(width: int, layers: int, vocabulary: int) -> Any:
    from twinrl.lab.libraries import CLIP, CLIPTextCfg, CLIPVisionCfg

    return CLIP(
        embed_dim=EMBEDDING,
        vision_cfg=CLIPVisionCfg(layers=layers, width=width, head_width=32, patch_size=8, image_size=32),
        text_cfg=CLIPTextCfg(context_length=CONTEXT, vocab_size=vocabulary, width=width, heads=width // 32, layers=2),
    )
