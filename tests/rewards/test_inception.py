"""FID's network on small images: torchvision's where they agree, pools where they differ, files that are wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.tiny import encoded, picture
from tests.rounding import bound
from twinrl.config.errors import InputError
from twinrl.rewards import inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the published architecture, in a file like the published one."""
    file = tmp_path_factory.mktemp("inception") / inception.WEIGHTS_FILE
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = inception.architecture().state_dict()
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, file)
    return file


@pytest.fixture(autouse=True)
def _own_cache_and_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(inception, "SIZE", 107)  # the smallest that every layer takes is 75


def test_images_are_seen_at_the_published_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert inception.SIZE == 299


GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "clean_fid_pixels.json").read_text())


def board(width: int, height: int, field: int) -> np.ndarray:
    """Saturated fields: black and white in red, the reverse in green, black and 200 in blue."""
    y, x = np.mgrid[:height, :width]
    on = (x // field + y // field) % 2
    return np.stack([255 * on, 255 - 255 * on, 200 - 200 * on], 2).astype(np.uint8)


def grey(width: int, height: int) -> np.ndarray:
    """One channel that jumps everywhere."""
    y, x = np.mgrid[:height, :width]
    return ((37 * x + 101 * y) % 256).astype(np.uint8)


PICTURES = {
    "saturated 32x32": board(32, 32, 4), "saturated 512x400": board(512, 400, 5), "saturated 3x2": board(3, 2, 1),
    "one pixel": board(1, 1, 1), "grey 40x30": grey(40, 30),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_the_network_is_given_what_clean_fid_gives_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    Image.fromarray(PICTURES[name]).save(tmp_path / "a.png")
    given = inception.prepared(inception._pixels(tmp_path / "a.png"))
    assert given.shape == (1, 3, 299, 299)
    values, at = given[0] * 128 + 128, torch.tensor(GOLDEN["at"])
    expected = torch.tensor(GOLDEN[name])
    off = bound(1, scale=512 * 255)  # where a pixel lies is rounded, and a pixel on it may be 255 brighter
    torch.testing.assert_close(values[:, at][:, :, at], expected, atol=off + 0.0005, rtol=0)
    assert values.min() >= 0
    assert values.max() <= 255


def test_features_of_another_resizing_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = folder(tmp_path / "images", range(2))
    before = inception._digest(sorted(images.iterdir()), images, images / "0.png")
    monkeypatch.setattr(inception, "RESIZING", "another")
    assert inception._digest(sorted(images.iterdir()), images, images / "0.png") != before


def folder(path: Path, seeds: range) -> Path:
    path.mkdir()
    for seed in seeds:
        (path / f"{seed}.png").write_bytes(encoded(picture(40, 30, seed)))
    return path


@pytest.mark.slow
def test_features_of_images_of_any_size(weights: Path) -> None:
    network = inception.Inception(weights)
    x = torch.rand(2, 3, 20, 30) * 2 - 1
    features = network(x)
    assert features.shape == (2, 2048)
    assert features.isfinite().all()
    alone, other = ((features[0] - f).abs().max() for f in (network(x[:1])[0], features[1]))
    assert alone < 0.01 * other  # a rounding, not a neighbour
    assert torch.equal(network(3 * x - 0.5), network((3 * x - 0.5).clamp(-1, 1)))
    assert network(x[:1] * torch.nan).isnan().any()


@pytest.mark.parametrize("block", ["Mixed_5b", "Mixed_6b", "Mixed_7b"])
def test_blocks_are_torchvisions_but_for_the_border_of_the_pool(weights: Path, block: str) -> None:
    """Inside, all branches agree with the stock block of the same weights; at the border the pooled one does not."""
    from torchvision.models import inception as stock

    network = inception.architecture()
    network.load_state_dict(torch.load(weights), strict=False)
    network.eval()
    ours = getattr(network, block)
    kind = {"Mixed_5b": (stock.InceptionA, 192, 32), "Mixed_6b": (stock.InceptionC, 768, 128)}.get(block)
    theirs = kind[0](*kind[1:]) if kind else stock.InceptionE(1280)
    theirs.load_state_dict(ours.state_dict())
    theirs.eval()
    x = torch.rand(1, {"Mixed_5b": 192, "Mixed_6b": 768, "Mixed_7b": 1280}[block], 9, 9, dtype=torch.float64)
    with torch.no_grad():
        a, b = ours.double()(x), theirs.double()(x)
    inside = (..., slice(1, -1), slice(1, -1))
    size = float(b.abs().max())
    torch.testing.assert_close(a[inside], b[inside], atol=1e-9 * size, rtol=0)
    assert not torch.allclose(a, b, atol=1e-3 * size, rtol=0)
    assert network.Mixed_7c.maximum
    assert not network.Mixed_7b.maximum


@pytest.mark.slow
def test_a_folder_is_read_once(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = folder(tmp_path / "images", range(3))
    first = inception.reference(images, weights, torch.device("cpu"))
    assert first.features.shape == (3, 2048)
    state = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(inception, "_pixels", None)  # not called
        again = inception.reference(images, weights, torch.device("cpu"))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.features, again.features)
    (images / "new.png").write_bytes(encoded(picture(40, 30, 9)))
    assert len(inception.reference(images, weights, torch.device("cpu")).features) == 4


def test_what_is_wrong_is_one_line(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, images = torch.device("cpu"), folder(tmp_path / "images", range(2))
    with pytest.raises(InputError, match=r"evaluation\.reference has no images; got 0 in"):
        inception.reference(tmp_path / "none", weights, cpu)
    (images / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(InputError, match=r"gone.png cannot be opened; got a broken link"):
        inception.reference(images, weights, cpu)
    (images / "gone.png").unlink()
    with pytest.raises(InputError, match=r"evaluation\.inception is no file"):
        inception.reference(images, tmp_path / "no.pth", cpu)
    monkeypatch.setattr(inception, "URL", "http://127.0.0.1:9/x.pth")
    with pytest.raises(InputError, match=r"nor can it be downloaded.*set evaluation.inception=PATH") as caught:
        inception.reference(images, None, cpu)
    assert "\n" not in str(caught.value)
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="belong to another network"):
        inception.reference(images, tmp_path / "other.pth", cpu)
    (images / "bad.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"bad.png cannot be read.*take it out of evaluation.reference"):
        inception.reference(images, weights, cpu)
