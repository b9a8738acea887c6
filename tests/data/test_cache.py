"""Shards and records of unequal length."""

from pathlib import Path

import pytest
import torch

from twinrl.config.errors import InputError
from twinrl.data.cache import ShardStore, longest, masks_of, pad, trim


def record(length: int, full: int, width: int = 3) -> dict[str, torch.Tensor]:
    mask = torch.arange(full) < length
    return {"text": torch.randn(full, width) * mask[:, None], "mask": mask, "pooled": torch.randn(full)}


def test_mask_names() -> None:
    names = {
        "text": torch.zeros(4, 2), "mask": torch.zeros(4), "t5": torch.zeros(6, 2), "t5_mask": torch.zeros(6),
        "pooled": torch.zeros(4), "other": torch.zeros(5, 2),
    }  # fmt: skip
    assert masks_of(names) == {"mask": "mask", "t5_mask": "t5_mask", "text": "mask", "t5": "t5_mask"}


def test_trimming_and_filling_up_are_inverse() -> None:
    rows = [record(length, 9) for length in (4, 9, 1)]
    trimmed = [trim(row) for row in rows]
    assert [len(row["text"]) for row in trimmed] == [4, 9, 1]
    assert all(len(row["pooled"]) == 9 for row in trimmed)  # no mask, though of the same length
    batch = pad(trimmed, longest(trimmed))
    for name in rows[0]:
        assert torch.equal(batch[name], torch.stack([row[name] for row in rows]))


def test_left_padding_and_empty_prompts_are_kept_whole() -> None:
    left = {"text": torch.randn(5, 2), "mask": torch.tensor([0, 0, 1, 1, 1])}
    assert torch.equal(trim(left)["text"], left["text"])
    empty = {"text": torch.zeros(5, 2), "mask": torch.zeros(5)}
    assert len(trim(empty)["text"]) == 1


def test_lengths_without_a_mask_are_explained() -> None:
    with pytest.raises(InputError, match=r"embeddings text differ in shape between prompts; got \(3, 2\) and \(4, 2\)"):
        pad([{"text": torch.zeros(3, 2)}, {"text": torch.zeros(4, 2)}], {})


def test_a_store_grows_by_shards_and_reads_back_the_same(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "shards")
    written = {f"{i:03}": {"a": torch.randn(2, 3).to(torch.bfloat16), "b": torch.tensor(i)} for i in range(7)}
    for start in (0, 3, 6):
        store.append(dict(list(written.items())[start : start + 3]))
    store.append({})
    again = ShardStore(tmp_path / "shards")
    assert len(again) == len(store) == 7
    assert len(list((tmp_path / "shards").iterdir())) == 3
    for key, tensors in written.items():
        assert key in again
        for one in (store, again):
            assert one[key].keys() == tensors.keys()
            assert all(torch.equal(one[key][name], value) for name, value in tensors.items())
    assert "999" not in again


def test_a_removed_shard_leaves_no_number_to_be_taken_twice(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    for name in "abc":
        store.append({name: {"x": torch.zeros(1)}})
    (tmp_path / "shard-000001.safetensors").unlink()
    again = ShardStore(tmp_path)
    again.append({"d": {"x": torch.ones(1)}})
    assert sorted(path.name for path in tmp_path.iterdir())[-1] == "shard-000003.safetensors"
    assert [name in ShardStore(tmp_path) for name in "abcd"] == [True, False, True, True]
