"""FSDP2 around a family's network: hooks, times and gradients survive sharding and its mixed precision."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.backends.families.conftest import assert_gradients_alike, disturbed, gradients_of
from tests.backends.families.forward import T
from tests.backends.families.made import assert_alike
from twinrl.fsdp import wrap
from twinrl.fsdp.config import FSDPConfig
from twinrl.fsdp.mesh import SHARD


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """A process group of one."""
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(file), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(case, mesh, policy):
    """Blocks first, then the transformer: the root has to be inside the network, whose times must stay exact."""
    network = disturbed(case.network())
    blocks = case.family.block_classes(network)
    for module in network.modules():
        if type(module) in blocks:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(network.transformer, mesh=mesh, mp_policy=policy)
    return network


def gradients(case, network):
    velocity = network(case.noise(), -T, 0.5 * -T, case.condition)
    velocity.square().mean().backward()
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients_of(network).items()}
    return velocity.detach(), whole


@pytest.mark.slow
@pytest.mark.filterwarnings("error:FSDP2-wrapped module.*TwinFlowTransformer")
def test_sharded_equals_whole(case, mesh):
    velocity, whole = gradients(case, disturbed(case.network()))
    ours, parts = gradients(case, sharded(case, mesh, MixedPrecisionPolicy()))
    assert_alike(case.name, ours, velocity)
    assert_gradients_alike(parts, whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:FSDP2-wrapped module")
def test_no_unit_returns_a_view(case, mesh):
    """On which an operation in place would lose the hook that gathers its parameters again."""
    network = case.network()
    blocks = [cls.__name__ for cls in case.family.block_classes(network)]
    wrap.shard(network, FSDPConfig(blocks=blocks), init_device_mesh("cpu", (1,), mesh_dim_names=(SHARD,)), None, True)
    network(case.noise(), -T, 0.5 * -T, case.condition).square().mean().backward()


@pytest.mark.slow
def test_times_stay_exact_under_its_mixed_precision(case, mesh):
    network = sharded(case, mesh, MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    transformer, seen = network.transformer, []
    getattr(transformer, transformer.TIME).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    t = torch.tensor([0.799, 0.8] if case.name == "stable_diffusion" else [0.999, 1.0])  # its schedule ends at 0.936
    with torch.no_grad():
        network(case.noise(), t, t, case.condition)
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(transformer.level(seen[0]), t, atol=1e-7, rtol=0)
