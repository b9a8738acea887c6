"""A tiny real VAE and text encoder, and pictures to feed them."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from twinrl.data.settings import PrepareConfig
from twinrl.machine.compat import ensure_torchvision

CONFIG = {
    "buckets": {"ratios": ["1:1", "3:2", "2:3"], "area": 32 * 32, "multiple": 8, "tolerance": 0.2},
    "batch": 2, "prompt_batch": 3, "shard": 4, "workers": 2,
}  # fmt: skip


def settings(**changes: object) -> PrepareConfig:
    return PrepareConfig.model_validate(CONFIG | changes)


class TinyEncoder:
    """AutoencoderKL and T5 (over bytes), random weights from a seed; counts what it encodes."""

    def __init__(self, seed: int = 0):
        ensure_torchvision()
        from diffusers import AutoencoderKL
        from transformers import T5Config, T5EncoderModel

        torch.manual_seed(seed)
        self.vae = AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ).eval()  # fmt: skip
        config = T5Config(vocab_size=259, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        self.text = T5EncoderModel(config).eval()
        self.key = f"tiny-{seed}"
        self.images, self.prompts = 0, 0

    def encode_images(self, pixels: Tensor) -> Tensor:
        self.images += len(pixels)
        return self.vae.encode(pixels).latent_dist.mode()

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        self.prompts += len(prompts)
        codes = [[*(byte + 3 for byte in prompt.encode()), 1] for prompt in prompts]
        width = max(map(len, codes))
        ids = torch.tensor([code + [0] * (width - len(code)) for code in codes])
        mask = (ids != 0).long()
        text = self.text(input_ids=ids, attention_mask=mask).last_hidden_state
        return {"text": text, "mask": mask, "pooled": text[:, 0]}


def quiet(stage: str, done: int, total: int | None) -> None:
    """Watches nothing."""


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth noise, so that no two pictures are alike and files are small."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    """The bytes of an image file."""
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def write_pairs(folder: Path, sizes: list[tuple[int, int]], start: int = 0) -> None:
    """``<number>.png`` with ``<number>.txt`` for each size."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(sizes, start):
        (folder / f"{number:03}.png").write_bytes(encoded(picture(width, height, number)))
        (folder / f"{number:03}.txt").write_text(f"picture number {number} " + "with words " * (number % 3))
