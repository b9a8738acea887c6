"""How a network is sharded; changes memory and speed, not what is computed."""

from pydantic import Field

from twinrl.config import Settings


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
    full_precision: tuple[str, ...] = Field(
        ("TimeEmbedding",), description="classes that keep the parameters' precision under train.precision=bf16"
    )
