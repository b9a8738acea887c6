"""Processes that a launcher starts again in one store find each other, and nothing that earlier ones have left."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from twinrl.config.errors import InputError
from twinrl.fsdp import mesh

SOON = timedelta(seconds=60)


def test_every_attempt_has_its_own_name() -> None:
    store = dist.HashStore()
    names = [meeting(store, 3) for _ in range(3)]
    assert all(len(set(found)) == 1 for found in names)
    assert len({found[0] for found in names}) == 3


def test_an_attempt_that_died_half_way_is_not_taken_up() -> None:
    """Rank 0 called and rank 1 answered before the launcher ended them; then rank 1 is back before rank 0."""
    store = dist.HashStore()
    before = meeting(store, 2)[0]
    store.set("attempt/call", "half")
    store.set("attempt/answer-1", "half-way")
    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(mesh.attempt, store, 1, 2, SOON)
        threading.Event().wait(0.3)
        assert not second.done()
        first = pool.submit(mesh.attempt, store, 0, 2, SOON)
        assert first.result() == second.result()
    assert first.result() not in (before, "half")


def test_who_has_not_come_is_named() -> None:
    with pytest.raises(InputError, match=r"not all of the 2 processes have come in 0.2 s; got no answer of rank 1"):
        mesh.attempt(dist.HashStore(), 0, 2, timedelta(seconds=0.2))
    with pytest.raises(InputError, match="got no call of rank 0"):
        mesh.attempt(dist.HashStore(), 1, 2, timedelta(seconds=0.2))


def meeting(store: dist.Store, world: int) -> list[str]:
    """What each of ``world`` processes calls their attempt."""
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: mesh.attempt(store, rank, world, SOON), range(world)))
