"""The Ray of a study: started on this machine, or joined where it runs already; how many trials fit on it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from rich.console import Console

from ablations.study import Resources
from twinrl.config.errors import InputError
from twinrl.machine import cluster

QUIET_TUNE = cluster.QUIET | {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
"""Nor tables and files of Tune's own."""


@dataclass(frozen=True)
class Machine:
    """Where trials run.

    Attributes:
        address: of a Ray cluster (``host:port`` or ``auto``); None starts one on this machine.
        cpus: cores to use on this machine; None: all that this process may use.
    """

    address: str | None = None
    cpus: int | None = None


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def connect(machine: Machine, console: Console) -> None:
    """Start Ray, or join the cluster.

    Raises:
        InputError: there is no cluster, it wants another token, or Ray does not start.
    """
    if machine.address is not None and machine.cpus is not None:
        raise InputError("--cpus is for this machine; a cluster has the cores that `ray start` gave it",
                         got=f"--address {machine.address}", fix="leave --cpus out")  # fmt: skip
    cluster.connect(machine.address, machine.cpus or usable_cores(), "--address", QUIET_TUNE)
    if machine.address is not None:
        nodes = sum(node["Alive"] for node in ray.nodes())
        console.print(f"joined the Ray cluster at {machine.address}: {nodes} machines, "
                      f"{ray.cluster_resources().get('CPU', 0):g} cores")  # fmt: skip


def fits(resources: Resources) -> bool:
    """Whether the Ray that is joined has a machine for a trial."""
    try:
        return slots(ray.nodes(), resources) > 0
    except InputError:
        return False


def slots(nodes: Sequence[Mapping[str, Any]], resources: Resources) -> int:
    """How many trials fit at once, each on one machine of ``ray.nodes()``. Raises InputError where not one does."""
    needed = {"CPU": resources.cpus * resources.workers, "GPU": resources.gpus * resources.workers}
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    for kind, amount in needed.items():
        most = max((machine.get(kind, 0) for machine in machines), default=0)
        if amount > most:
            raise InputError(f"one trial needs more {kind}s than a machine has", got=f"{most:g}",
                             expected=f"{amount:g} (resources of the study)")  # fmt: skip
    return sum(
        int(min(machine.get(kind, 0) // amount for kind, amount in needed.items() if amount)) for machine in machines
    )
