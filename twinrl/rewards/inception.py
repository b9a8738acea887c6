"""Inception features of images, by which papers measure sets of images: FID (arXiv:1706.08500) and KID (1801.01401).

    features(y) = mean over positions of Inception-v3's last convolution, (B, 2048), of y at 299×299

The network is the one of the original FID code, TensorFlow's of 2015, in PyTorch's weights (mseitzer/pytorch-fid). It
differs from torchvision's ``inception_v3`` in its pools, which leave the border out of their means, and in the last
block's, which takes the maximum. Samples are rounded to 8 bits as if they had been saved. What the network is given is
that of "clean" FID (arXiv:2104.11222, package clean-fid 0.1.35): bicubic with antialiasing, each channel in float32,
overshoot cut off at 0 and 255, not rounded again, then (y − 128) / 128 as in the original code. Values compare among
each other and with clean FIDs, not with those of other resizers.

A Fréchet distance of n samples is too large by an amount that falls with n, and with 2048 features it takes tens of
thousands to be comparable with papers; the kernel distance is unbiased at any n.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d

from twinrl.config.errors import InputError
from twinrl.data.images import SUFFIXES, decode
from twinrl.data.listing import ending_in
from twinrl.data.problems import UnusableError
from twinrl.lab.storage import publish
from twinrl.machine.compat import ensure_torchvision
from twinrl.machine.files import cache_dir
from twinrl.rewards.weights import PUBLISHED, read_weights
from twinrl.run.fit import load_module

ensure_torchvision()

from torchvision.models import inception  # noqa: E402
from torchvision.transforms.functional import pil_to_tensor  # noqa: E402

WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_FILE}"
SIZE = 299
RESIZING = "clean, cut off"
"""Names in the cache what the network is given: kept features of another resizing are not used."""
SETTING = "evaluation.inception"


def _mean_inside(x: Tensor) -> Tensor:
    return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _A(inception.InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_mean_inside(x))]


class _C(inception.InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = x
        for layer in (f"branch7x7dbl_{i}" for i in range(1, 6)):
            double = getattr(self, layer)(double)
        return [self.branch1x1(x), single, double, self.branch_pool(_mean_inside(x))]


class _E(inception.InceptionE):
    maximum = False

    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = max_pool2d(x, 3, stride=1, padding=1) if self.maximum else _mean_inside(x)
        return [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]


def architecture() -> nn.Module:
    """The network with random weights, on the CPU; its names are those of the published file."""
    blocks = [
        inception.BasicConv2d, _A, inception.InceptionB, _C, inception.InceptionD, _E, inception.InceptionAux,
    ]  # fmt: skip
    network = inception.Inception3(1008, aux_logits=False, inception_blocks=blocks, init_weights=False)
    network.Mixed_7c.maximum = True
    return network


class Inception(nn.Module):
    """Pixels (B, 3, H, W) in [−1, 1] → features (B, 2048).

    Arguments:
        file: the published weights.

    Raises:
        InputError: it is damaged, or another network's.
    """

    def __init__(self, file: Path):
        super().__init__()
        with torch.device("meta"):  # no random numbers are drawn
            self.network = architecture()
        own = self.network.state_dict()
        counts = {n: torch.tensor(0) for n in own if n.endswith("num_batches_tracked")}  # older files have none
        load_module(self.network, counts | read_weights(file), file, PUBLISHED, assign=True)
        self.network.fc = nn.Identity()
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """See the class. Computed where the network is, in float32; the features are on the CPU."""
        here = next(self.parameters()).device
        with torch.autocast(here.type, enabled=False):
            return self.network(prepared(pixels.to(here, torch.float32))).cpu()


def prepared(pixels: Tensor) -> Tensor:
    """What the network is given of float32 pixels (B, 3, H, W) in [−1, 1]: (B, 3, SIZE, SIZE) in [−1, 127/128]."""
    y = ((pixels.clamp(-1, 1) + 1) * 127.5).round()
    y = interpolate(y, (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)
    return (y.clamp(0, 255) - 128) / 128


class Reference(NamedTuple):
    """What samples are compared with.

    Attributes:
        network: gives features.
        features: (N, 2048) of the reference images.
    """

    network: Inception
    features: Tensor


def reference(folder: Path, weights: Path | None, device: torch.device) -> Reference:
    """The features of the images in ``folder`` and below, kept in the cache, and the network on ``device``.

    Raises:
        InputError: fewer than two images, a damaged one, or no weights.
    """
    files, problems = ending_in(folder, SUFFIXES) if folder.is_dir() else ([], [])
    if problems:
        raise InputError(f"{folder / problems[0].name} {problems[0].reason}", got=problems[0].detail, fix="remove it")
    if len(files) < 2:
        raise InputError(
            "evaluation.reference has no images", got=f"{len(files)} in {folder}", expected="a folder of two or more"
        )
    file = located(weights)
    network = Inception(file).to(device)
    kept = cache_dir() / "inception" / f"{_digest(files, folder, file)}.pt"
    publish(kept, lambda new: torch.save(torch.cat([network(_pixels(path)) for path in files]), new))
    return Reference(network, torch.load(kept, weights_only=True))


def located(weights: Path | None) -> Path:
    """The weights' file: the user's own, else the published one, downloaded once into the cache.

    Raises:
        InputError: no such file, or it cannot be downloaded.
    """
    if weights is not None:
        if not weights.is_file():
            raise InputError(f"{SETTING} is no file", got=weights, fix=f"put {WEIGHTS_FILE} there, from {URL}")
        return weights
    kept = cache_dir() / "inception" / WEIGHTS_FILE
    if not kept.is_file():
        prefix = WEIGHTS_FILE.removesuffix(".pth").rsplit("-", 1)[1]
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(kept), hash_prefix=prefix, progress=False)
        except (OSError, RuntimeError) as error:  # RuntimeError: its hash is another
            raise InputError(
                f"{WEIGHTS_FILE} is neither in the cache ({kept.parent}) nor can it be downloaded",
                got=str(error).splitlines()[0],
                fix=f"fetch {URL} elsewhere and set {SETTING}=PATH",
            ) from error  # fmt: skip
    return kept


def _pixels(path: Path) -> Tensor:
    try:
        image = decode(path.read_bytes())
    except UnusableError as error:
        raise InputError(f"{path} cannot be read", got=error, fix="take it out of evaluation.reference") from error
    return pil_to_tensor(image)[None].float() / 127.5 - 1


def _digest(files: list[Path], folder: Path, weights: Path) -> str:
    """Of names, sizes and times of change, and of what the network is given."""
    known = hashlib.sha256(RESIZING.encode())
    for path in (*files, weights):
        name = path.relative_to(folder) if path.is_relative_to(folder) else path
        known.update(f"{name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return known.hexdigest()[:32]
