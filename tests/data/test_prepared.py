"""What a step reads from a prepared folder: one shape a batch, shares of branches kept, prompts alone as zeros."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.data.tiny import TinyEncoder, quiet, settings, write_pairs
from twinrl.config.errors import InputError
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


def test_conditions_are_as_they_were_prepared_and_of_the_rows_that_are_wanted(dataset: CachedDataset) -> None:
    reader = FolderRows(dataset, CPU, torch.float64)
    at = reader.rows(4, 0, 0)
    captions, condition = reader.captioned(at, 0, 0, torch.tensor([2, 0]))
    assert captions == dataset.captions(at)
    for name, value in dataset.conditions(at).items():
        assert condition[name].dtype == value.dtype
        assert torch.equal(condition[name], value[[2, 0]])


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


# --- damaged shards -----------------------------------------------------------------------------------------


def rewritten(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """Every shard with other tensors; None leaves one out."""
    for path in folder.glob("encoder-*/*/shard-*.safetensors"):
        changed = {name: change(f"{path.parent.name}/{name}", value) for name, value in load_file(path).items()}
        save_file({name: value.contiguous() for name, value in changed.items() if value is not None}, path)


def of_one(kind: str, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Changes the first tensor of a kind (latents, prompts) and name."""
    seen: list[str] = []

    def changing(full: str, value: torch.Tensor) -> torch.Tensor:
        if full.startswith(kind) and full.endswith(f"/{name}") and not seen:
            seen.append(full)
            return change(value)
        return value

    return changing


def read(dataset: CachedDataset) -> None:
    for row in range(len(dataset)):
        dataset.latents([row])
        dataset.conditions([row])


DAMAGES = {
    "latents of another shape": (of_one, "latents", "latents", lambda v: v[:, :2], "float32 .* instead of"),
    "latents of another format": (of_one, "latents", "latents", lambda v: v.double(), "float64 .* instead of"),
    "latents of integers": (of_one, "latents", "latents", lambda v: v.to(torch.int8), "int8 .* instead of"),
    "latents that are not finite": (of_one, "latents", "latents", lambda v: v / 0, "not finite"),
    "embeddings that are not finite": (of_one, "prompts", "pooled", lambda v: v / 0, "pooled that is not finite"),
    "narrower embeddings": (of_one, "prompts", "text", lambda v: v[:, :3], "text float32"),
    "embeddings of another format": (of_one, "prompts", "pooled", lambda v: v.bfloat16(), "pooled bfloat16"),
    "longer embeddings": (of_one, "prompts", "text", lambda v: v.repeat(99, 1), "text float32"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_records_that_do_not_fit_name_their_shard(tmp_path: Path, dataset: CachedDataset, damage: str) -> None:
    make, *how, words = DAMAGES[damage]
    rewritten(tmp_path / "out", make(*how))
    again = CachedDataset(tmp_path / "out", "train")
    with pytest.raises(InputError, match=rf"shard-\d+\.safetensors is damaged; got .*{words}.*fix: delete it"):
        read(again)


def test_a_record_without_its_tensor(tmp_path: Path, dataset: CachedDataset) -> None:
    rewritten(tmp_path / "out", lambda name, value: None if name.endswith("/pooled") and "prompts" in name else value)
    dataset = CachedDataset(tmp_path / "out", "train")
    assert dataset.conditions([0]).keys() == {"text", "mask"}  # of all prompts alike
