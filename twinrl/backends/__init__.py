"""Networks: ``F(x_t, t, r, condition) → velocity``, and the registry that names them.

A network is a :class:`VelocityNetwork`, named here or by its dotted path (docs/extending.md).
"""

import hashlib
from typing import Any

import torch
from torch import nn

from twinrl.backends.dit import DiT
from twinrl.backends.embedding import NetworkConfig, Spec, VelocityNetwork
from twinrl.backends.mlp import MLP
from twinrl.backends.trajectories import tells_trajectories_apart
from twinrl.backends.unet import UNet
from twinrl.config.components import Registry
from twinrl.flow.draws import generator
from twinrl.flow.source import Source

__all__ = [
    "MLP",
    "NETWORKS",
    "DiT",
    "NetworkConfig",
    "Spec",
    "VelocityNetwork",
    "build_network",
    "network_key",
    "spec_of",
    "tells_trajectories_apart",
]

NETWORKS: Registry[Any] = Registry("network", VelocityNetwork, {"mlp": MLP, "dit": DiT, "unet": UNet})


def build_network(config: NetworkConfig, source: Source, seed: int) -> nn.Module:
    """The network that ``config`` describes, sized for ``source``; ``seed`` alone decides its initial weights.

    Arguments:
        config: an instance of ``NETWORKS[kind].Config``.
        source: gives latent shape and condition.
        seed: key of the initial weights; the global random state is left untouched.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(seed, "network weights").initial_seed())
        network: nn.Module = NETWORKS.build(config, spec_of(source))
        return network


def spec_of(source: Source) -> Spec:
    """What ``source`` decides about a network's shape."""
    return Spec.of(source.latent_shape, source.null_condition(1), len(source.classes))


def network_key(config: NetworkConfig) -> str:
    """A short name of an architecture, kind and settings: the key under which its teacher is cached."""
    digest = hashlib.sha256(config.model_dump_json().encode()).hexdigest()
    return f"{config.kind}-{digest[:12]}"  # type: ignore[attr-defined]
