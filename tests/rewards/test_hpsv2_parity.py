"""Our HPSv2 against the ``hpsv2`` package's own ``score``: its preprocessing, tokenizer, model class and formula.

The package runs with a tiny model of its class in place of the 986 M parameters; the checkpoint goes through a file
to both. It lacks the vocabulary that its tokenizer opens when imported; open_clip's copy of it is opened instead.
"""

import gzip
import importlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.rewards.tiny import OPEN_CLIP, SIDE, open_clip_folder, reward, shake
from tests.rounding import bound
from twinrl.machine.compat import ensure_torchvision

pytest.importorskip(
    "hpsv2", reason="the optional hpsv2 package is absent: pip install --no-deps hpsv2==1.2.0 clint==0.5.1 args==0.1.0"
)

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
ROUNDINGS = 3 * 8 * 8 + 2 * 9 * 64
"""Patches, then two layers of width 64: three products and one of four times the width, attention beside them."""


@pytest.fixture(scope="module")
def package():
    """The package's scoring module, imported with a vocabulary."""
    ensure_torchvision()
    import open_clip

    opened = gzip.open

    def with_vocabulary(path, *args, **kwargs):
        if str(path).endswith(VOCABULARY) and not Path(path).exists():
            path = Path(open_clip.__file__).parent / VOCABULARY
        return opened(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gzip, "open", with_vocabulary)
        # a stray import of the package, which needs a display library
        patch.setitem(sys.modules, "turtle", types.SimpleNamespace(forward=None))
        return importlib.import_module("hpsv2.img_score")


@pytest.fixture(scope="module")
def theirs(package, tmp_path_factory):
    """(PIL image, prompt) → the package's score, and the checkpoint that it reads."""
    vendored = importlib.import_module("hpsv2.src.open_clip")
    torch.manual_seed(0)
    model = shake(vendored.CLIP(**OPEN_CLIP, output_dict=True), 0.05)
    checkpoint = tmp_path_factory.mktemp("hpsv2") / "HPS_v2_compressed.pt"
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    transform = vendored.image_transform(SIDE, is_train=False, resize_longest_max=True)
    package.model_dict.update(model=shake(model), preprocess_val=transform)  # score() loads the checkpoint again
    yield lambda image, prompt: package.score(image, prompt, cp=str(checkpoint))[0], checkpoint
    package.model_dict.clear()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("height", "width"), [(SIDE, SIDE), (512, 512), (512, 320), (75, 131), (20, 24)])
@pytest.mark.parametrize("prompt", ["a red cat", "A Café at 7:30pm, 4k — ultra-detailed &amp; sharp!", "word " * 200])
def test_scores_agree(theirs, tmp_path, height, width, prompt):
    from PIL import Image

    score, checkpoint = theirs
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = reward(
        {
            "kind": "hpsv2",
            "version": "v2.0",
            "checkpoint": str(checkpoint),
            "architecture": open_clip_folder(tmp_path / "architecture"),
        }
    )
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    off = bound(ROUNDINGS)  # of a cosine
    assert ours(images, [prompt]).item() == pytest.approx(float(score(Image.fromarray(pixels), prompt)), abs=off)
