"""The process group, the device mesh, and this process's place in it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from twinrl.errors import InputError

REPLICATE, SHARD = "replicate", "shard"
"""Names of the mesh's dimensions."""


def world_size() -> int:
    """Processes of this launch, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def local_device(device: torch.device) -> torch.device:
    """The device of this process: its own GPU where the run is on GPUs and names none in particular."""
    if device.type != "cuda" or device.index is not None or world_size() == 1:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def process_group(device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """Join the processes of this launch: gloo for tensors on the CPU, nccl for those on GPUs."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


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
