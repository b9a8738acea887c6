"""A laboratory's CLIP: a tiny open_clip model for its captions, and the preference models made from it.

``lab_clip`` (plain CLIP) also provides the text embedding that conditions the flow. ``lab_hps`` is the same
model fine-tuned on preferences, as HPSv2 was (arXiv:2306.09341); ``lab_judge`` is trained apart, with another
seed and width, and kept out of training. All score by the plain cosine, which is differentiable in the pixels.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, one_hot, softplus

from twinrl.flow.draws import generator
from twinrl.lab.degrade import Degrade
from twinrl.lab.fitting import Keeper, Recipe, fit
from twinrl.lab.material import Lesson
from twinrl.lab.recipe import Form

EMBEDDING = 64
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")
"""A word, a mark, or a letter of a script that leaves no space between words."""


def words_of(text: str) -> list[str]:
    """The words and marks of a text, in lower case."""
    return _WORDS.findall(text.lower())


class WordTokenizer:
    """Words of a laboratory's captions as tokens, everything else as one unknown word.

    Tokens are 0 padding, 1 start, 2 unknown, then the vocabulary, then the end token: open_clip's ``argmax``
    pooling reads the text's embedding at the highest token. The bundled 49408-word tokenizer would put 95 % of
    the model's parameters into rows that no caption uses.

    Arguments:
        vocabulary: the known words, each once.
        context: tokens of a text, start and end among them.
    """

    def __init__(self, vocabulary: Sequence[str], context: int):
        self.context, self.unknown = context, 2
        self._token = {word: 3 + number for number, word in enumerate(vocabulary)}
        self.end = 3 + len(vocabulary)
        self.size = self.end + 1

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """B prompts → (B, context) tokens; longer prompts are cut."""
        tokens = torch.zeros(len(prompts), self.context, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            words = [self._token.get(word, self.unknown) for word in words_of(prompt)]
            sentence = [1, *words[: self.context - 2], self.end]
            tokens[row, : len(sentence)] = torch.tensor(sentence)
        return tokens


class ClipModel(nn.Module):
    """An open_clip model with its tokenizer; satisfies ``twinrl.flow.source.Scorer``.

    Arguments:
        vocabulary: the words that it knows.
        form: sizes of pictures, patches and texts.
        width: of both towers, a multiple of 32.
        layers: of the image tower; the text tower has two.
    """

    def __init__(self, vocabulary: Sequence[str], form: Form, width: int, layers: int):
        super().__init__()
        self.side = form.side
        self.tokenizer = WordTokenizer(vocabulary, form.context)
        self.clip = _open_clip(width, layers, self.tokenizer.size, form)
        self._text_cache: dict[str, Tensor] = {}

    def image_embedding(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, side, side) in [−1, 1] → unit vectors (B, 64)."""
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
        """Cosines of pixels (B, 3, side, side) in [−1, 1] and B prompts → (B,) in [−1, 1]."""
        return (self.image_embedding(pixels) * self.cached_text_embedding(prompts)).sum(dim=-1)

    def freeze(self) -> "ClipModel":
        """Evaluation mode, no gradients for parameters, an empty text cache."""
        self._text_cache.clear()
        return self.eval().requires_grad_(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "ClipModel":
        self._text_cache.clear()  # another device or dtype
        return super()._apply(fn, recurse)


def train_clip(
    clip: ClipModel, data: Lesson, recipe: Recipe, tick: Callable[[], None], keeper: Keeper | None = None
) -> None:
    """Train ``clip`` in place on image–caption pairs, contrastively between the captions of a batch."""

    def loss(step: int) -> Tensor:
        rows = recipe.rows(len(data), step)
        images = clip.image_embedding(_noisy(data.pixels(rows, recipe.seed, step), recipe.seed, step))
        texts, which = _texts(clip, data, rows, recipe.seed, step)
        return _contrastive(_scale(clip) * images @ texts.T, which)

    fit(clip.parameters(), loss, recipe, tick, keeper)
    clip.freeze()


def train_preference(
    clip: ClipModel,
    data: Lesson,
    degrade: Degrade,
    recipe: Recipe,
    tick: Callable[[], None],
    keeper: Keeper | None = None,
) -> None:
    """Fine-tune ``clip`` in place to prefer clean over degraded images of the same prompt (Bradley–Terry).

    The contrastive loss stays, so that the score still says whether image and prompt agree.
    """
    clip.requires_grad_(True).train()

    def loss(step: int) -> Tensor:
        rows = recipe.rows(len(data), step)
        x = data.pixels(rows, recipe.seed, step)
        texts, which = _texts(clip, data, rows, recipe.seed, step)
        worse = degrade(x, which, generator(recipe.seed, "degradation", step))
        images = clip.image_embedding(torch.cat([x, worse]))
        logits = _scale(clip) * images @ texts.T  # (2B, U)
        clean, degraded = logits.chunk(2)
        margin = (clean - degraded).gather(1, which[:, None])
        return softplus(-margin).mean() + _contrastive(clean, which)

    fit(clip.parameters(), loss, recipe, tick, keeper)
    clip.freeze()


def _texts(clip: ClipModel, data: Lesson, rows: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Unit embeddings (U, 64) of a batch's captions, some words hidden, and which of them each row (B,) has."""
    prompts, which = data.texts(rows, seed, step)
    tokens = _hide_words(clip.tokenizer, prompts, data.captions.kept, seed, step)
    return clip.clip.encode_text(tokens, normalize=True), which


def _scale(clip: ClipModel) -> Tensor:
    """The learnt inverse temperature, at most 100 as in CLIP."""
    return clip.clip.logit_scale.exp().clamp(max=100)


def _contrastive(logits: Tensor, labels: Tensor) -> Tensor:
    """Scaled cosines (B, U) of images and captions against each image's caption (B,), in both directions.

    All images of a caption are its positives, as a batch may hold several.
    """
    positive = one_hot(labels, logits.shape[1]).float()
    of_caption = (log_softmax(logits, dim=0) * positive).sum(dim=0) / positive.sum(dim=0).clamp(min=1)
    return (cross_entropy(logits, labels) - of_caption.mean() / 4) / 2


def _hide_words(tokenizer: WordTokenizer, prompts: Sequence[str], kept: Sequence[str], seed: int, step: int) -> Tensor:
    """Tokens with 10 % of the words that are not ``kept`` replaced by the unknown word."""
    tokens = tokenizer(prompts)
    names = torch.tensor([int(tokenizer([word])[0, 1]) for word in kept], dtype=torch.long)
    hideable = (tokens > tokenizer.unknown) & (tokens < tokenizer.end) & ~torch.isin(tokens, names)
    chosen = torch.rand(tokens.shape, generator=generator(seed, "hidden words", step)) < 0.1
    return tokens.masked_fill(hideable & chosen, tokenizer.unknown)


def _noisy(x: Tensor, seed: int, step: int) -> Tensor:
    """Weak keyed pixel noise, of another strength for each image, against learning scans by heart."""
    draw = generator(seed, "noise", step)
    return x + 0.15 * torch.rand((len(x), 1, 1, 1), generator=draw) * torch.randn(x.shape, generator=draw)


def _open_clip(width: int, layers: int, vocabulary: int, form: Form) -> Any:
    from twinrl.lab.libraries import CLIP, CLIPTextCfg, CLIPVisionCfg

    return CLIP(
        embed_dim=EMBEDDING,
        vision_cfg=CLIPVisionCfg(
            layers=layers, width=width, head_width=32, patch_size=form.patch, image_size=form.side
        ),
        text_cfg=CLIPTextCfg(
            context_length=form.context, vocab_size=vocabulary, width=width, heads=width // 32, layers=2
        ),
    )
