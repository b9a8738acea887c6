"""Images are independent: of each other, of chunks, of a broken neighbour; randomness is keyed by row."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.rewards.latent.toys import PROMPTS, Brightness, Toy, latent_reward, latents
from twinrl.flow import draws
from twinrl.rewards.latent import KeyedRows

ROWS = KeyedRows(3, 7, tuple(range(len(PROMPTS))))
CASES: list[tuple[str, str | None]] = [
    ("autograd", "decoded"), ("autograd", "latent"), ("random_direction", "decoded"), ("random_direction", "latent"),
    ("antithetic", "decoded"), ("orthogonal", "latent"), ("spsa", None), ("vae_backprop", None),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "baseline"), CASES)
@pytest.mark.parametrize("broken", ["score", "latents"])
def test_one_nan_stays_where_it_is(kind: str, baseline: str | None, broken: str) -> None:
    """Named by position, not masked, and the other images' gradients do not change by a bit."""
    z, chosen = latents(), latent_reward(kind, baseline=baseline)
    whole = chosen.gradient(z, PROMPTS, Toy(), Brightness(), ROWS)
    assert whole.finite.all()

    prompts, bad = list(PROMPTS), z.clone()
    if broken == "score":
        prompts[2] = "broken"
    else:
        bad[2] = float("nan")
    found = chosen.gradient(bad, prompts, Toy(), Brightness(), ROWS)
    assert (~found.finite).nonzero().flatten().tolist() == [2]
    assert found.scores[2].isnan()
    assert found.g[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(found.g[others], whole.g[others])
    assert torch.equal(found.scores[others], whole.scores[others])


@pytest.mark.parametrize(("kind", "baseline"), CASES)
def test_chunks_and_ranks_change_nothing(kind: str, baseline: str | None) -> None:
    """Whole, in chunks, or the last rows alone under their global positions: the same gradients."""
    z = latents().double()
    whole = latent_reward(kind, baseline=baseline).gradient(z, PROMPTS, Toy(), Brightness(), ROWS)
    for chunk in (1, 4):
        cut = latent_reward(kind, baseline=baseline, chunk=chunk).gradient(z, PROMPTS, Toy(), Brightness(), ROWS)
        torch.testing.assert_close(cut.g, whole.g, rtol=1e-9, atol=1e-12)
        assert cut.aux.keys() == whole.aux.keys()
        assert all(len(values) == len(z) for values in cut.aux.values())
    rank = latent_reward(kind, baseline=baseline).gradient(
        z[4:], PROMPTS[4:], Toy(), Brightness(), KeyedRows(3, 7, (4, 5))
    )
    torch.testing.assert_close(rank.g, whole.g[4:], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["random_direction", "antithetic", "orthogonal", "spsa"])
def test_directions_are_keyed(kind: str) -> None:
    """The same (seed, step, row) repeats bitwise, another step differs, and global randomness plays no part."""
    z = latents()

    def found(step: int, seed: int = 3) -> torch.Tensor:
        rows = KeyedRows(seed, step, ROWS.index)
        return latent_reward(kind).gradient(z, PROMPTS, Toy(), Brightness(), rows).g

    torch.manual_seed(0)
    before, first = torch.get_rng_state(), found(7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(found(7), first)
    assert not torch.equal(found(8), first)
    assert not torch.equal(found(7, seed=4), first)


def test_rows_draw_apart() -> None:
    drawn = KeyedRows(0, 0, (0, 1, 2)).normal("reward direction 0", (500,))
    assert (torch.corrcoef(drawn) - torch.eye(3)).abs().max() < 0.2  # 4.5 standard errors
    assert torch.equal(KeyedRows(0, 0, (0, 1, 2)).rows(1, 3).normal("reward direction 0", (500,)), drawn[1:])


def test_draws_of_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="draws for 1 rows and 6 images"):
        latent_reward("random_direction").gradient(latents(), PROMPTS, Toy(), Brightness(), KeyedRows(0, 0, (4,)))


@pytest.mark.parametrize(("kind", "baseline"), CASES)
def test_models_are_left_alone(kind: str, baseline: str | None) -> None:
    """No graph in, no graph out, no gradient left in a reward's trainable parameters."""

    class Learnt(nn.Module):
        differentiable = True

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(draws.normal((192,), 0, "weight"))

        def forward(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
            return images.flatten(1) @ self.weight

    reward, z = Learnt(), latents().requires_grad_()
    found = latent_reward(kind, baseline=baseline).gradient(z, PROMPTS, Toy(), reward, ROWS)
    assert not found.g.requires_grad
    assert not found.scores.requires_grad
    assert reward.weight.grad is None
    assert z.grad is None


def test_gradients_exist_under_no_grad() -> None:
    """A trainer's target is computed without gradient; the estimators that differentiate switch it on themselves."""
    with torch.no_grad():
        for kind in ("autograd", "vae_backprop"):
            assert latent_reward(kind).gradient(latents(), PROMPTS, Toy(), Brightness(), ROWS).g.abs().min() > 0
