"""Several gloo processes beside the test's own."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tests import forked

T = TypeVar("T")


def spawned(work: Callable[..., T], world: int, folder: Path, *arguments: Any) -> list[T]:
    """What ``work(*arguments)`` returns in each of ``world`` processes of one group.

    They are forks of the server that has imported everything.
    """
    forked.server()
    torch.multiprocessing.start_processes(
        _one, (world, folder, work, arguments), nprocs=world, start_method="forkserver"
    )  # fmt: skip
    return [torch.load(folder / f"found-{world}-{rank}.pt", weights_only=False) for rank in range(world)]


def _one(rank: int, world: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting-{world}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    torch.save(work(*arguments), folder / f"found-{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
