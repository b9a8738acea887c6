"""Validation without labels: the distance knows good samples from bad, and nothing around it notices."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.data.tiny import TinyEncoder, quiet, settings, write_pairs
from twinrl.config.errors import InputError
from twinrl.data import CachedDataset, prepare
from twinrl.data.prepared import FolderRows
from twinrl.evaluation import EvaluationConfig, PromptProtocol, PromptTable
from twinrl.evaluation.protocol import GuidedConfig
from twinrl.sampling import few_step

CONFIG = EvaluationConfig(n=20, nfe=(1, 2), batch=3, grid_samples=2, velocity_rows=4)


class Folder:
    """What the protocol needs of a source; pixels are the first three channels."""

    def __init__(self, folder: Path):
        self.splits = {"validation": CachedDataset(folder, "validation")}

    def reader(self, split: str, device: torch.device, dtype: torch.dtype, mix: Any) -> FolderRows:
        return FolderRows(self.splits[split], device, dtype)

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3]


def mean(pixels: Tensor, prompts: list[str]) -> Tensor:
    return pixels.mean((1, 2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    write_pairs(root / "images", [(32, 32)] * 24 + [(48, 32)] * 20)
    prepare(root / "images", TinyEncoder(), settings(validation=0.6), root / "out", quiet)
    return root / "out"


def protocol(folder: Path, **more: Any) -> PromptProtocol:
    return PromptProtocol(Folder(folder), CONFIG, **more)  # type: ignore[arg-type]


def noise(x: Tensor, t: Tensor, r: Tensor, c: Any) -> Tensor:
    """Leaves the noise as it is."""
    return torch.zeros_like(x)


def real(judge: PromptProtocol, rows: Tensor) -> Any:
    """A network that answers chunk after chunk with real images of the same shapes."""
    parts: Iterator[Tensor] = iter([judge.data.dataset.latents(at).float() for at in judge._parts(rows)])
    return lambda x, t, r, c: x - next(parts)


def test_real_images_beat_noise_and_their_distance_is_the_lowest(folder: Path) -> None:
    judge = protocol(folder)
    good = judge.quality(real(judge, judge.rows), few_step(1))["latent_kid"]
    bad = judge.quality(noise, few_step(1))["latent_kid"]
    assert good <= 0 < bad
    assert abs(judge.floor["latent_kid"]) < bad


def test_repeatable_and_unnoticed(folder: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    judges, followed = {"held": mean}, {"followed": mean}
    first = protocol(folder, judges=judges, followed=followed).evaluate(noise)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == protocol(folder, judges=judges, followed=followed).evaluate(noise)
    assert first["val/quality"] == first["val/latent_kid_1nfe"]
    assert first["val/held_out_score/held_1nfe"] == first["val/score/followed_1nfe"]
    assert first["val/velocity_mse"] > 0


def test_guided_samples(folder: Path) -> None:
    """At strength g the velocity is F(c) + g·(F(c) − F(∅)): a network that ignores c gives the unguided samples."""
    judge = protocol(folder)
    judge.config = CONFIG.model_copy(update={"guided": GuidedConfig(strength=3, nfe=2)})
    found = judge.evaluate(noise)
    assert found["val/guided/latent_kid_2nfe"] == pytest.approx(found["val/latent_kid_2nfe"])


def test_what_is_not_finite_is_counted_and_not_hidden(folder: Path) -> None:
    found = protocol(folder).evaluate(lambda x, t, r, c: torch.full_like(x, torch.nan))
    assert found["val/nonfinite_frac_1nfe"] == 1
    assert found["val/quality"] != found["val/quality"]


def test_grids_and_table(folder: Path) -> None:
    judge = protocol(folder, judges={"held": mean})
    grid = judge.grid(noise, few_step(1))
    assert grid.shape[:2] == (len(judge.grid_prompts()), 2)
    assert len(judge.row_names) == len(judge.grid_prompts())
    assert torch.equal(grid[0], grid[1])  # the same noise in a column; this network ignores the prompt
    table = PromptTable.of(judge, noise)
    plain = table.as_dict()
    assert set(plain["rows"]) == {"1", "2"}
    assert plain["held_out"] == ("held",)
    assert "held (held out)" in [column.header for column in table.rich()[1].columns]


def test_too_few_rows(tmp_path: Path) -> None:
    write_pairs(tmp_path / "images", [(32, 32)] * 3)
    prepare(tmp_path / "images", TinyEncoder(), settings(validation=0.0), tmp_path / "out", quiet)
    with pytest.raises(InputError, match=r"validation split is too small; got 0 rows"):
        protocol(tmp_path / "out")


class Regions:
    """Stands for Inception features: means over a 2×2 grid of regions."""

    def __init__(self, folder: Path):
        split = CachedDataset(folder, "validation")
        self.features = torch.cat([self.network(split.latents(rows).float()[:, :3]) for rows in split.members.values()])

    def network(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)


def test_distances_to_a_folder_of_images(folder: Path) -> None:
    """Own images are near, noise is far; they are reported at every NFE, beside what there is without them."""
    judge = protocol(folder, images=Regions(folder))
    good, bad = judge.quality(real(judge, judge.rows), few_step(1)), judge.quality(noise, few_step(1))
    assert abs(good["fid"]) < bad["fid"]
    assert good["kid"] < bad["kid"]
    found, without = judge.evaluate(noise), protocol(folder).evaluate(noise)
    added = {f"val/{name}_{nfe}nfe" for name in ("fid", "kid") for nfe in (1, 2)}
    assert {name for name in found.keys() - without.keys() if "content" not in name} == added
    assert {name: found[name] for name in without} == without
    table = PromptTable.of(judge, noise)
    assert table.rows[1]["fid"] == found["val/fid_1nfe"]


def test_what_samples_are_made_of_beside_held_out_images(folder: Path) -> None:
    """Offsets are 0 for the held-out images themselves; samples that are all alike have no variety."""
    judge = protocol(folder, judges={"held": mean})
    same = judge.quality(real(judge, judge.rows), few_step(1))
    offsets = {name: value for name, value in same.items() if name.startswith("content/")}
    assert {"content/brightness", "content/nearest", "content/held_out/held"} <= offsets.keys()
    assert all(abs(value) < 1e-4 for value in offsets.values()), offsets
    alike = judge.quality(lambda x, t, r, c: x - 0.5, few_step(1))  # type: ignore[arg-type]
    assert alike["content/diversity"] < -1
    assert judge.evaluate(noise)["val/content/contrast_1nfe"] > 0


def test_what_is_not_decoded_is_not_looked_at(folder: Path) -> None:
    assert not [name for name in protocol(folder).evaluate(noise) if "content" in name]


def test_a_sample_that_is_not_finite_makes_its_statistics_nan(folder: Path) -> None:
    judge = protocol(folder, judges={"held": mean})
    found = judge.quality(lambda x, t, r, c: x * torch.nan, few_step(1))  # type: ignore[arg-type]
    assert found["content/brightness"] != found["content/brightness"]
