"""The process group, the device mesh, and this process's place in it."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from twinrl.config.errors import InputError
from twinrl.fsdp import watchdog

REPLICATE, SHARD = "replicate", "shard"
"""Names of the mesh's dimensions."""


def launched() -> bool:
    """Whether torchrun, or Ray Train, has started this process."""
    return "RANK" in os.environ


def world_size() -> int:
    """Processes of this launch, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def device_named(wanted: str, key: str) -> torch.device:
    """The device of that name; auto is a GPU where there is one.

    Raises:
        InputError: there is none; calls the setting ``key``.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"{key} {wanted!r} is not available", got=why, fix="use auto or cpu") from error
    return device


def local_device(device: torch.device) -> torch.device:
    """The device of this process: its own GPU where the run is on GPUs and names none in particular."""
    if device.type != "cuda" or device.index is not None or world_size() == 1:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def backend_of(device: torch.device) -> str:
    """What carries messages: gloo for tensors on the CPU, nccl for those on GPUs."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


@contextmanager
def process_group(device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """Join the processes of this launch: gloo for tensors on the CPU, nccl for those on GPUs.

    A group that Ray Train has made is used as it is, and left to it.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield
        return
    watchdog.record()
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    own = dist.PrefixStore(attempt(store, rank, world, timeout), store)
    dist.init_process_group(backend_of(device), store=own, rank=rank, world_size=world, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def attempt(store: dist.Store, rank: int, world: int, timeout: timedelta) -> str:
    """A name for these processes' part of the store: the same for all of them, and never used before.

    torchrun keeps its store over the restarts of a launch, and with it the addresses that the processes before have
    left there: gloo and nccl would wait for those (pytorch issue 135712). Its count of restarts is no such name, since
    each node counts its own. So rank 0 calls with a new name, every other rank answers the call with a new name of its
    own, and whoever finds his among the answers that rank 0 has accepted knows that this call is not an old one.

    Raises:
        InputError: some of the processes have not come in time.
    """
    mine, deadline = uuid4().hex, time.monotonic() + timeout.total_seconds()
    others = [f"attempt/answer-{other}" for other in range(1, world)]
    if rank == 0:
        store.set("attempt/call", mine)
    while time.monotonic() < deadline:
        if rank == 0 and store.check(others):
            answers = [value.decode() for value in store.multi_get(others)]
            if all(answer.startswith(mine) for answer in answers):
                store.set("attempt/accepted", " ".join([mine, *answers]))
                return mine
        elif rank > 0 and store.check(["attempt/call"]):
            store.set(others[rank - 1], f"{store.get('attempt/call').decode()}-{mine}")
            accepted = store.get("attempt/accepted").decode().split() if store.check(["attempt/accepted"]) else []
            if any(answer.endswith(mine) for answer in accepted):
                return accepted[0]
        time.sleep(0.05)
    missing = [str(n) for n, key in enumerate(others, 1) if not store.check([key]) or mine not in str(store.get(key))]
    raise InputError(
        f"not all of the {world} processes have come in {timeout.total_seconds():g} s",
        got="no answer of rank " + ", ".join(missing) if rank == 0 else "no call of rank 0",
        fix="see what the launcher says of them",
    )


def mesh_of(device: torch.device, replicate: int = 1) -> DeviceMesh:
    """The mesh of all processes: (replicate, shard), or (shard,) where there is one copy.

    Raises:
        InputError: the copies do not divide the processes.
    """
    world = dist.get_world_size()
    if world % replicate:
        raise InputError(
            "fsdp.replicate does not divide the processes",
            got=f"{replicate} copies on {world} processes",
            fix="use a divisor of the number of processes, 1 = no copies",
        )
    if replicate == 1:
        return init_device_mesh(device.type, (world,), mesh_dim_names=(SHARD,))
    return init_device_mesh(device.type, (replicate, world // replicate), mesh_dim_names=(REPLICATE, SHARD))
