"""The published models' configurations build with a second time and a sign, on the meta device, at their known sizes.

Sizes: the parameter counts that the model pages state, to the digits that they give.
"""

import functools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from tests.benchmarks.scripts import script
from twinrl.backends.families import family_class
from twinrl.config import presets
from twinrl.training import schema

MODELS = script("published").MODELS


@functools.cache
def published(name):
    """The transformer of the published size."""
    with torch.device("meta"):
        return family_class(name).TRANSFORMER(**MODELS[name][0])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_published_sizes(name):
    transformer, billions = published(name), MODELS[name][1]
    count = sum(tensor.numel() for tensor in transformer.state_dict().values())  # SD3 stores its positions
    ours = sum(p.numel() for p in transformer.twin_parameters().values())
    assert (count - ours) / 1e9 == pytest.approx(billions, rel=0.03)
    assert ours < 0.03 * count


@pytest.mark.parametrize("name", sorted(MODELS))
def test_adapters_find_their_layers_in_the_published_models(name):
    """Every default target names layers in every block that it is meant for."""
    family, transformer = family_class(name), published(name)
    names = [n for n, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    found = {target: sum(n.endswith(f".{target}") for n in names) for target in family.LORA_TARGETS}
    blocks = Counter(
        type(module).__name__ for module in transformer.modules() if type(module).__name__ in family.BLOCKS
    )
    assert set(blocks) == set(family.BLOCKS)
    assert all(count >= min(blocks.values()) for count in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("preset", [name for name in presets() if schema.load(name).model.family is not None])
def test_presets_of_real_sizes_build_with_their_settings(preset, tmp_path):
    """`published-qwen2512` and the others on the published dimensions: sizes, dtypes and adapters, no weights."""
    settings = schema.load(preset)
    family = family_class(settings.model.family)
    billions = MODELS[settings.model.family][1]
    folder = script("published").describe(settings.model.family, tmp_path)
    with torch.device("meta"):
        network = family(folder, SimpleNamespace(vae=None, components={})).outline(settings.model.pretrained)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    frozen = [p for p in network.parameters() if not p.requires_grad]
    if settings.model.lora is None:
        assert sum(p.numel() for p in trained.values()) / 1e9 == pytest.approx(billions, rel=0.13)  # positions: buffers
    else:
        assert sum(p.numel() for p in frozen) / 1e9 == pytest.approx(billions, rel=0.13)
        assert {p.dtype for p in trained.values()} == {torch.float32}
        assert sum("lora_A" in name for name in trained) >= len(family.LORA_TARGETS)
        assert all(p.shape[0] == settings.model.lora.rank for name, p in trained.items() if "lora_A" in name)
