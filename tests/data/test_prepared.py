"""What a step reads from a prepared folder: one shape a batch, shares of branches kept, prompts alone as zeros."""

from pathlib import Path

import pytest
import torch

from tests.data.tiny import TinyEncoder, quiet, settings, write_pairs
from twinrl.data import CachedDataset, prepare
from twinrl.data.prepared import FolderRows, whole_rows
from twinrl.flow.branches import allocate

CPU = torch.device("cpu")
MIX = {"e2e": 1.0, "mul": 1.0, "any": 1.0, "adv": 1.0}


@pytest.fixture
def dataset(tmp_path: Path, encoder: TinyEncoder) -> CachedDataset:
    write_pairs(tmp_path / "images", [(32, 32)] * 5 + [(48, 32)] * 7 + [(32, 48)] * 6)
    prepare(tmp_path / "images", encoder, settings(validation=0.0), tmp_path / "out", quiet)
    return CachedDataset(tmp_path / "out", "train")


def test_every_batch_has_one_shape_and_divides_into_the_branches(dataset: CachedDataset) -> None:
    reader, seen = FolderRows(dataset, CPU, torch.float32, True, whole_rows(MIX)), set()
    for step in range(30):
        at = reader.rows(8, 3, step)
        assert torch.equal(at, reader.rows(8, 3, step))
        latents = reader.latents(at)
        assert latents.shape == (len(at), *reader.shape(at))
        assert len(at) in reader.sizes(8)
        assert len(set(allocate(MIX, len(at)).values())) == 1
        captions, condition = reader.captioned(at, 3, step)
        assert len(captions) == len(at)
        assert {name: value.shape[1:] for name, value in condition.items()} == {
            name: value.shape[1:] for name, value in reader.null(2).items()
        }
        seen |= {reader.shape(at)}
    assert len(seen) == 3


def test_another_seed_is_another_order(dataset: CachedDataset) -> None:
    reader = FolderRows(dataset, CPU, torch.float32)
    orders = [torch.cat([reader.rows(4, seed, step) for step in range(6)]).tolist() for seed in (0, 1, 1 << 32)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_prompts_alone_have_latents_of_the_right_shape_without_content(dataset: CachedDataset) -> None:
    reader = FolderRows(dataset, CPU, torch.float64, images=False)
    at = reader.rows(4, 0, 0)
    assert torch.equal(reader.latents(at), torch.zeros(len(at), *reader.shape(at), dtype=torch.float64))


@pytest.mark.parametrize(
    ("mix", "rows"), [(MIX, 4), ({"any": 1.0}, 1), ({"e2e": 0.5, "any": 1.5}, 4), ({"mul": 0.1, "any": 0.9}, 10)]
)
def test_the_fewest_rows_that_shares_divide(mix: dict[str, float], rows: int) -> None:
    assert whole_rows(mix) == rows
