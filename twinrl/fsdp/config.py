"""How a network is sharded; changes memory and speed, not what is computed."""

from typing import Literal

from pydantic import Field

from twinrl.config import Settings


class LaunchConfig(Settings):
    """Processes that `twinrl train` and `twinrl resume` start by themselves, through Ray Train.

    Without effect where torchrun has started them already.
    """

    workers: int = Field(1, ge=1, description="processes that train together; 1 = this one, without Ray")
    address: str | None = Field(
        None, description="Ray cluster to train on (host:port or auto), which shares run.dir; null = this machine"
    )
    cpus: float = Field(1, gt=0, description="CPU cores that each process reserves")
    retries: int = Field(
        3, ge=0, description="restarts from the newest checkpoint after a process or its machine was lost"
    )

    @property
    def wanted(self) -> bool:
        """Whether Ray is to start the processes."""
        return self.workers > 1 or self.address is not None


class FSDPConfig(Settings):
    """Sharding over the processes that torchrun has started; without effect in a single process."""

    blocks: tuple[str, ...] | None = Field(
        None, description="classes of the modules that are sharded each for itself; null = the repeated block class"
    )
    replicate: int = Field(
        1, ge=1, description="copies of the sharded model, a divisor of the processes (hybrid sharding, e.g. per node)"
    )
    prefetch: int = Field(1, ge=0, description="blocks gathered ahead in forward and backward; 0 = torch's own order")
    reshard_last: bool = Field(False, description="free the last block between forward and backward too")
    checkpoint_activations: bool = Field(False, description="recompute the blocks' activations in the backward pass")
    cpu_offload: bool = Field(False, description="parameters, gradients and optimizer state in the host's memory")
    frozen: Literal["replicated", "sharded"] = Field(
        "replicated",
        description="VAE, text encoders and reward models: whole in every process, or 1/N of them between uses, for "
        "which all processes gather them",
    )
    watchdog: float | None = Field(
        600,
        gt=0,
        description="seconds that processes may wait for one of them in training; then a line names it and all end "
        "with exit code 1; null = wait",
    )
    reduce_every_micro_batch: bool = Field(
        True,
        description="sum gradients over the processes after every micro-batch, so that none ever holds a whole one; "
        "false: once for all of a term's, in fewer messages",
    )
    full_precision: tuple[str, ...] = Field(
        ("TimeEmbedding",), description="classes that keep the parameters' precision under train.precision=bf16"
    )
