"""One loaded case for each family: a tiny pipeline saved to disk and read back through the real path."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backends.families import tiny
from tests.backends.families.held import to_pipeline
from tests.rounding import assert_rounded
from twinrl.backends.families import FAMILIES, load_family
from twinrl.backends.families.diffusion import DIFFUSION_FAMILIES
from twinrl.backends.families.family import Family, FamilyConfig

PROMPTS = ["a red cat", "b"]  # of different lengths
CALL: dict[str, dict[str, Any]] = {  # how each pipeline is told: no guidance
    "sd3": {"guidance_scale": 1.0},
    "qwen_image": {},
    "z_image": {"guidance_scale": 0.0},
    "sana": {"guidance_scale": 1.0, "use_resolution_binning": False},
    "flux": {"guidance_scale": 3.5},
    "flux2_klein": {"guidance_scale": 1.0},
    "flux2": {"guidance_scale": 3.5},
    "stable_diffusion": {"guidance_scale": 1.0},
}
SWITCHES: dict[str, dict[str, Any]] = {"stable_diffusion": {"prediction": "epsilon", "diff2flow": True}}
FLOWS = [name for name in FAMILIES if name not in DIFFUSION_FAMILIES]
HEIGHTS = {"sana": 32}  # its pipeline takes multiples of 32
TOKENS = {"qwen_image": 192}  # its template is a paragraph, and the tokenizer's tokens are letters


@dataclass(frozen=True)
class Case:
    """A family with its tiny pipeline."""

    name: str
    folder: Path
    pipeline: Any  # diffusers' own, with the stock transformer
    family: Family

    @property
    def config(self) -> FamilyConfig:
        return FamilyConfig(path=str(self.folder), **SWITCHES.get(self.name, {}))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width; not a square, so that swapped axes show."""
        height = HEIGHTS.get(self.name, 16)
        return height, 2 * height

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.family.latent_shape(*self.size)

    def network(self, **settings):
        return self.family.network(self.config.model_copy(update=settings))

    @functools.cached_property
    def condition(self):
        return self.family.encode_prompts(PROMPTS)

    def noise(self, seed=0):
        return torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(seed))

    def call(self, pipeline, z, **arguments):
        """The pipeline's answer for the two prompts from the starting latents ``z``."""
        height, width = self.size
        settings = {"height": height, "width": width} | length(self.family) | CALL[self.name]
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(prompt=list(PROMPTS), latents=to_pipeline(self.family, z), **(settings | arguments))[0]


def length(family: Family) -> dict[str, Any]:
    """How a family's pipeline is told the length of texts; Stable Diffusion's takes its tokenizer's."""
    return {} if family.NAME == "stable_diffusion" else {"max_sequence_length": family.TOKENS}


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """Name → its case, built on first use."""
    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def case(name):
        pipeline = tiny.build(name)
        pipeline.save_pretrained(root / name)
        family = load_family(name, FamilyConfig(path=str(root / name)))
        family.TOKENS = TOKENS.get(name, 64)  # texts are short here
        return Case(name, root / name, pipeline, family)

    return case


@pytest.fixture(params=list(FAMILIES))
def case(request, cases):
    return cases(request.param)


@pytest.fixture(params=FLOWS)
def flow(request, cases):
    """A family whose own pipeline is a flow's."""
    return cases(request.param)


@pytest.fixture
def sd3(cases):
    return cases("sd3")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are faster so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_gradients_alike(ours, theirs):
    """Gradients by name, of one loss by two ways; sums of all rows and pixels, so what is added up cancels in some.

    1000 roundings: the widths of a tiny transformer's layers, added up, forward and backward.
    """
    assert ours.keys() == theirs.keys()
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert scale > 0
    for name, gradient in theirs.items():
        assert_rounded(ours[name], gradient, 1000, scale, msg=name)


def gradients_of(network):
    """Name → gradient."""
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@torch.no_grad()
def disturbed(network):
    """``network`` with noise on what a student may train: e₂ and the sign are no longer silent."""
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return network
