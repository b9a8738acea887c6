"""Building a network in parts, without any process group: the parts are exactly those of the whole network."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.fake_source import FakeSource
from tests.fsdp.cases import Scaled
from twinrl.backends import MLP, DiT, UNet, build_network, spec_of
from twinrl.config.errors import InputError
from twinrl.flow.branches import BatchDraws, TimeLaw, divide, shared
from twinrl.fsdp.initial import SafetensorsPart, has_hidden_buffers, outline, streamed
from twinrl.fsdp.sharded import check_equal_shares
from twinrl.fsdp.wrap import block_classes, part

NETWORKS = {
    "mlp": MLP.Config(width=16, depth=3, condition_width=16),
    "dit": DiT.Config(width=16, depth=3, condition_width=16, heads=2),
}


SOURCE = FakeSource()


def builder(name: str) -> Callable[[], nn.Module]:
    return lambda: build_network(NETWORKS[name], SOURCE, seed=5)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_streamed_parts_are_those_of_the_whole_network(name: str, ranks: int) -> None:
    expected = builder(name)().state_dict()
    classes = block_classes(outline(builder(name)), None)
    assert classes == ("Block",)
    found = [streamed(builder(name), classes, ranks, rank) for rank in range(ranks)]
    assert all(p.device.type == "meta" for network, _ in found for p in network.parameters())
    for key, value in expected.items():
        assert torch.equal(torch.cat([parts[key] for _, parts in found]), value), key


def test_scalars_and_hidden_buffers_stay_whole() -> None:
    def build() -> nn.Module:
        torch.manual_seed(1)
        return Scaled(Scaled.Config(), spec_of(SOURCE))

    assert has_hidden_buffers(outline(build))
    assert not has_hidden_buffers(outline(builder("mlp")))
    _, parts = streamed(build, ("Layer",), 4, 3)
    assert parts["gain"] == 0.5
    assert torch.equal(parts["offset"], torch.linspace(-1, 1, 13))
    assert parts["blocks.0.linear.weight"].shape == (1, 13)


class Repentant(nn.Module):
    """Initialises a block again after it has joined the list."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        nn.init.zeros_(self.blocks[1].weight)  # type: ignore[arg-type]


def test_a_late_initialisation_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="initialised again"):
        streamed(Repentant, ("Linear",), 2, 0)


@pytest.mark.parametrize(("size", "ranks"), [(16, 4), (13, 4), (3, 4), (0, 2), (7, 1)])
def test_parts_cover_a_dimension(size: int, ranks: int) -> None:
    tensor = torch.arange(size)
    parts = [tensor[part(size, ranks, rank)] for rank in range(ranks)]
    assert torch.equal(torch.cat(parts), tensor)
    expected = torch.chunk(tensor, ranks) if size else ()
    assert [p.tolist() for p in parts if len(p)] == [c.tolist() for c in expected if len(c)]


def test_blocks_are_found_or_named() -> None:
    network = outline(builder("dit"))
    assert block_classes(network, ("TimeEmbedding", "Block")) == ("TimeEmbedding", "Block")
    assert block_classes(nn.Linear(2, 2), None) == ()
    assert block_classes(outline(lambda: UNet(UNet.Config(), spec_of(SOURCE))), None) != ()
    with pytest.raises(InputError, match=r"fsdp.blocks names Blok.*Block") as caught:
        block_classes(network, ("Blok",))
    assert "\n" not in str(caught.value)


def test_safetensors_are_read_in_part(tmp_path: Path) -> None:
    weights = {"a.weight": torch.randn(6, 2), "a.bias": torch.randn(6)}
    save_file(weights, tmp_path / "model.safetensors")
    stored = SafetensorsPart([tmp_path / "model.safetensors"], rename=lambda name: f"net.{name}")
    assert stored.shapes() == {"net.a.weight": torch.Size([6, 2]), "net.a.bias": torch.Size([6])}
    target = torch.zeros(6, 2, dtype=torch.float64)
    stored.read_into({"net.a.weight": target})
    assert torch.equal(target, weights["a.weight"].double())
    assert torch.equal(stored["net.a.bias"], weights["a.bias"])


@pytest.mark.parametrize("by_row", [False, True])
def test_ranks_share_every_branch(by_row: bool) -> None:
    mix = {"e2e": 1.0, "mul": 1.0, "any": 1.0, "adv": 1.0}
    x = torch.arange(16.0).view(16, 1, 1, 1).expand(16, 2, 4, 4)
    c = {"c": torch.arange(16.0)[:, None]}
    drawn = BatchDraws(0, 0, (16, 2, 4, 4), by_row)
    batch, parts = divide(mix, TimeLaw(), x, c, c, drawn), []
    for mine in (shared(mix, 16, 4, rank) for rank in range(4)):
        own = {"c": c["c"][mine]}
        parts.append(divide(mix, TimeLaw(), x[mine], own, own, drawn, mine=mine))
    assert torch.cat([p.rows.index for p in parts]).sort().values.tolist() == list(range(16))
    for one in parts:
        for name in ("x", "z", "t", "r"):
            assert torch.equal(getattr(one.rows, name), getattr(batch.rows, name)[one.rows.index]), name
        assert {name: len(at) for name, at in one.branch.items()} == dict.fromkeys(mix, 1)
        assert one.rows.global_batch == 16
        assert torch.equal(one.rows.normal("noise"), batch.rows.normal("noise")[one.rows.index])
        for name, at in one.branch.items():
            assert set(one.rows.index[at].tolist()) <= set(batch.branch[name].tolist())


def test_unequal_shares_are_refused() -> None:
    check_equal_shares({"any": 8, "adv": 4}, 4)
    with pytest.raises(InputError, match="rows of branch adv cannot be shared by 4 processes equally; got 6 of 14"):
        check_equal_shares({"any": 8, "adv": 6}, 4)
