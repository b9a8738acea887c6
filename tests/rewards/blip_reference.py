"""ImageReward's network written out in its published file's own names: an independent forward pass for the test.

Pre-norm vision transformer (BLIP's ViT, layer norms with ε 1e-6), then a post-norm BERT whose layers attend to the
text, then to the patches (ε 1e-12), then the head on the first token. Float64, no dropout.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear


class Blip:
    """Arguments: the file's weights in float64, heads of the two towers, side of a patch."""

    def __init__(self, weights: Mapping[str, Tensor], vision_heads: int, text_heads: int, patch: int):
        self.weights = weights
        self.heads = {"vision": vision_heads, "text": text_heads}
        self.patch = patch

    def __call__(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S), tokens (B, L) without padding → raw scores (B,)."""
        x = self.read(tokens, self.see(pixels))[:, 0]
        for layer in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{layer}")
        return x[:, 0]

    def see(self, pixels: Tensor) -> Tensor:
        root = "blip.visual_encoder"
        weight, bias = self.pair(f"{root}.patch_embed.proj")
        x = conv2d(pixels, weight, bias, stride=self.patch).flatten(2).transpose(1, 2)
        x = torch.cat([self.weights[f"{root}.cls_token"].expand(len(x), -1, -1), x], dim=1)
        x = x + self.weights[f"{root}.pos_embed"]
        for block in self.numbered(f"{root}.blocks"):
            query, key, value = self.linear(self.norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
            x = x + self.linear(self.attend("vision", query, key, value), f"{block}.attn.proj")
            hidden = self.linear(self.norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")
            x = x + self.linear(gelu(hidden), f"{block}.mlp.fc2")
        return self.norm(x, f"{root}.norm", 1e-6)

    def read(self, tokens: Tensor, patches: Tensor) -> Tensor:
        root = "blip.text_encoder"
        x = self.weights[f"{root}.embeddings.word_embeddings.weight"][tokens]
        x = x + self.weights[f"{root}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
        x = self.norm(x, f"{root}.embeddings.LayerNorm", 1e-12)
        for layer in self.numbered(f"{root}.encoder.layer"):
            x = self.bert_attention(x, x, f"{layer}.attention")
            x = self.bert_attention(x, patches, f"{layer}.crossattention")
            hidden = gelu(self.linear(x, f"{layer}.intermediate.dense"))
            x = self.norm(x + self.linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm", 1e-12)
        return x

    def bert_attention(self, x: Tensor, source: Tensor, name: str) -> Tensor:
        query = self.linear(x, f"{name}.self.query")
        key, value = self.linear(source, f"{name}.self.key"), self.linear(source, f"{name}.self.value")
        out = self.linear(self.attend("text", query, key, value), f"{name}.output.dense")
        return self.norm(x + out, f"{name}.output.LayerNorm", 1e-12)

    def attend(self, tower: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads[tower], -1)).transpose(1, 2) for part in (query, key, value))
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, *self.pair(name))

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], *self.pair(name), eps)

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def numbered(self, name: str) -> list[str]:
        return sorted({".".join(key.split(".")[: name.count(".") + 2]) for key in self.weights if key.startswith(name)})
