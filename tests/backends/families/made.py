"""Tiny pipelines on disk with pictures prepared for them, for tests that train a family; and their samples."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from tests.backends.families import tiny
from tests.backends.families.conftest import SWITCHES
from tests.backends.families.held import from_state, to_state
from tests.data.tiny import write_pairs
from tests.rounding import assert_rounded
from twinrl.backends.families import FAMILIES, family_class
from twinrl.backends.families.family import Family
from twinrl.commands import data
from twinrl.flow.conditions import Condition
from twinrl.sampling import few_step, keyed_noise, sample

TOKENS = {
    "qwen_image": 192,
    "z_image": 64,
    "flux2_klein": 64,
}  # templates are long where the tokenizer's tokens are letters
SIZES = ((32, 32), (64, 32))


@dataclass(frozen=True)
class Made:
    """A family's pipeline and the images prepared for it."""

    name: str
    pipeline: Path
    prepared: Path

    @property
    def overrides(self) -> list[str]:
        """What a run of it is told about model and data."""
        switches = [f"model.{key}={str(value).lower()}" for key, value in SWITCHES.get(self.name, {}).items()]
        model = f"model={{family: {self.name}, path: {self.pipeline}}}"
        return [model, *switches, f"data={{source: folder, root: {self.prepared}}}"]


def made(base: Path, name: str, sizes: Sequence[tuple[int, int]] = SIZES) -> Made:
    """The family ``name`` below ``base`` with 24 images, of the ``sizes`` in turn; made once."""
    images = "-".join(f"{width}x{height}" for width, height in sizes)
    pipeline, prepared = base / name, base / f"{name}-{images}"
    if not pipeline.exists():
        tiny.build(name).save_pretrained(pipeline)
    if not prepared.exists():
        write_pairs(base / images, [sizes[i % len(sizes)] for i in range(24)])
        overrides = [f"buckets.sizes={[list(size) for size in sizes]}", "buckets.multiple=8", "validation=0.3"]
        where = str(pipeline), prepared
        data.prepare_data(base / images, *where, overrides, data.EncodingOptions("cpu"), Console(quiet=True))
    return Made(name, pipeline, prepared)


@contextmanager
def short_prompts() -> Iterator[None]:
    """Texts are short inside, and one thread is enough for models this small."""
    before, threads = {name: family_class(name).TOKENS for name in FAMILIES}, torch.get_num_threads()
    for name in FAMILIES:
        family_class(name).TOKENS = TOKENS.get(name, 32)
    torch.set_num_threads(1)
    yield
    for name, tokens in before.items():
        family_class(name).TOKENS = tokens
    torch.set_num_threads(threads)


def few(family: Family, network: nn.Module, z: Tensor, condition: Condition, steps: int) -> Tensor:
    """Our sampler's result, with the injected noise laid out as the pipeline holds its latents."""
    packed, shape = to_state(family, z).shape, (z.shape[1], z.shape[2], z.shape[3])
    noise = lambda step: from_state(family, keyed_noise(packed, 0, step), shape)  # noqa: E731
    with torch.no_grad():
        return sample(network, z, condition, few_step(steps), noise=noise)


def assert_alike(name: str, theirs: Tensor, ours: Tensor) -> None:
    """Samples of a pipeline and of our sampler: one number by two ways.

    500 roundings are the widths of a tiny transformer's layers, added up. Z-Image is told 1000·(1 − t): near t = 1
    float32 keeps 1000 roundings of it and of its sinusoids. Samples of Stable Diffusion are 15 times as large as
    others (1/α), and so is what they may be apart.
    """
    assert_rounded(theirs, ours, 1500 if name == "z_image" else 500)
