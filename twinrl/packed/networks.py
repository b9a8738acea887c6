"""The members' networks as one: stacked weights, one call for all who wait.

Members call the same networks (the *roles*: student, EMA, …) with weights of their own. The weights of a role lie in
one tensor for each name, ``stacked[name]`` of shape (members, …), and every member's parameters are views of their
slice: optimizers, averages and checkpoints work in place and notice nothing. A network stays the module that it was;
only its ``forward`` asks the rendezvous. Requests of equal role, shapes, modes and precision are one
``torch.func.vmap`` of the functional network over weights and inputs.

Gradient: the group's call keeps its graph on the stacked weights. Each member's own graph has one node for the call;
its backward asks the rendezvous once more, and one pass back through the group's graph answers all members that want
the same call's gradient; members that do not (yet) have a cotangent of zero. So gradients arrive in each member's
``.grad`` by ``backward`` as ever, as often as they are asked for. (torch.func: https://pytorch.org/docs/stable/func.html)
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from twinrl.conditions import Condition
from twinrl.errors import InputError
from twinrl.packed.rendezvous import Rendezvous, Request


@dataclass(eq=False)
class Role:
    """One network of every member.

    Attributes:
        template: the network whose forward is used; its own weights never are.
        stacked: name → (members, …), parameters and buffers.
        trained: names of the parameters that get a gradient.
    """

    template: nn.Module
    stacked: dict[str, Tensor] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()

    def weights(self, members: Sequence[int], gradient: bool) -> dict[str, Tensor]:
        """The weights of some members, as leaves of a new graph where a gradient is wanted."""
        found = {}
        for name, stack in self.stacked.items():
            value = stack.detach() if len(members) == len(stack) else stack[list(members)]
            found[name] = value.requires_grad_(gradient and name in self.trained)
        return found


@dataclass(eq=False)
class Call:
    """One call of a role for a group of members.

    Attributes:
        members: the group. output: (members, B, C, H, W), with the graph. weights: its leaves.
    """

    members: tuple[int, ...]
    output: Tensor
    weights: dict[str, Tensor]

    def pull(self, cotangents: Mapping[int, Tensor]) -> dict[int, dict[str, Tensor | None]]:
        """Member → name → gradient of the trained weights, for the members with a cotangent (B, C, H, W)."""
        nothing = torch.zeros_like(next(iter(cotangents.values())))
        stacked = torch.stack([cotangents.get(member, nothing) for member in self.members])
        names = [name for name, weight in self.weights.items() if weight.requires_grad]
        leaves = [self.weights[name] for name in names]
        # the graph lives as long as a member's graph refers to this call
        found = torch.autograd.grad(self.output, leaves, stacked, retain_graph=True, allow_unused=True)
        slices = [[None] * len(self.members) if one is None else one.unbind() for one in found]
        return {m: dict(zip(names, (s[i] for s in slices), strict=True)) for i, m in enumerate(self.members)}


class Networks:
    """The networks of ``size`` members.

    Attributes:
        rendezvous: where their calls meet; runs the members.
    """

    def __init__(self, size: int):
        self.size = size
        self.rendezvous = Rendezvous(self._answer)
        self.roles: list[Role] = []
        self._joined = [0] * size
        self._stacks: dict[int, tuple[nn.Parameter, Tensor]] = {}  # a frozen weight can be in several networks

    def join(self, network: nn.Module, member: int) -> nn.Module:
        """The network, from now on called together with the networks of other members that joined in the same order.

        Raises:
            InputError: it draws random numbers, keeps statistics, or is unlike the others'.
        """
        check_packable(network)
        number = self._joined[member]
        self._joined[member] += 1
        if number == len(self.roles):
            self.roles.append(Role(deepcopy(network).requires_grad_(False)))
        role = self.roles[number]
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        _check_alike(role, tensors)
        for name, tensor in tensors.items():
            self._place(role, name, tensor, member)
        role.trained = frozenset(name for name, p in network.named_parameters() if p.requires_grad)
        network.forward = _Together(self.rendezvous, role, number, network, member)
        return network

    def _place(self, role: Role, name: str, tensor: Tensor, member: int) -> None:
        """Make a tensor the view of its slice."""
        if id(tensor) in self._stacks:  # shared by two networks of this member
            role.stacked[name] = self._stacks[id(tensor)][1]
            return
        if name not in role.stacked:
            role.stacked[name] = torch.zeros((self.size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        stack = role.stacked[name]
        stack[member] = tensor.detach()
        tensor.data = stack[member]
        if isinstance(tensor, nn.Parameter):
            self._stacks[id(tensor)] = tensor, stack

    # --- answers ------------------------------------------------------------------------------------------------

    def _answer(self, requests: Sequence[Request]) -> None:
        if isinstance(requests[0].content, _Backward):
            self._backward(requests)
        elif len(requests) > 1:  # one alone calls its own network
            self._forward(requests)

    def _forward(self, requests: Sequence[Request]) -> None:
        asked: list[_Forward] = [request.content for request in requests]
        first, members = asked[0], tuple(request.member for request in requests)
        role = first.role
        weights = role.weights(members, first.gradient)
        x, t, r = (torch.stack([one.point[i] for one in asked]) for i in range(3))
        condition = {name: torch.stack([one.condition[name] for one in asked]) for name in first.condition}
        if role.template.training != first.training:
            role.template.train(first.training)

        def alone(weights: dict[str, Tensor], *inputs: Any) -> Tensor:
            return torch.func.functional_call(role.template, weights, inputs)

        with (
            torch.set_grad_enabled(first.gradient),
            torch.autocast(x.device.type, first.autocast, enabled=first.autocast is not None),
        ):
            try:
                output = torch.func.vmap(alone)(weights, x, t, r, condition)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise InputError(
                    f"the network {type(role.template).__name__} can't be packed", got=str(error).splitlines()[0],
                    fix="train its seeds one by one (resources.packed: 1)",
                ) from error  # fmt: skip
        call = Call(members, output, weights)
        for request, own in zip(requests, output.detach().unbind(), strict=True):
            request.answer = call, own.clone()

    @staticmethod
    def _backward(requests: Sequence[Request]) -> None:
        call = requests[0].content.call
        found = call.pull({request.member: request.content.cotangent for request in requests})
        for request in requests:
            request.answer = found[request.member]


@dataclass(eq=False)
class _Forward:
    role: Role
    point: tuple[Tensor, Tensor, Tensor]  # x, t, r
    condition: Condition
    gradient: bool
    training: bool
    autocast: torch.dtype | None


@dataclass(eq=False)
class _Backward:
    call: Call
    cotangent: Tensor


class _Together:
    """In place of a member's network's ``forward``."""

    def __init__(self, rendezvous: Rendezvous, role: Role, number: int, network: nn.Module, member: int):
        self.rendezvous, self.role, self.number, self.network = rendezvous, role, number, network
        self.member = member
        parameters = dict(network.named_parameters())
        self.trained = {name: parameters[name] for name in role.stacked if name in role.trained}

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        alone = type(self.network).forward
        inputs = [x, t, r, *condition.values()]
        gradient = torch.is_grad_enabled()
        if self.rendezvous.member is None or (gradient and any(one.requires_grad for one in inputs)):
            return alone(self.network, x, t, r, condition)
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        asked = _Forward(self.role, (x, t, r), condition, gradient, self.network.training, autocast)
        answer = self.rendezvous.ask(self._key(asked, inputs), asked)
        if answer is None:
            return alone(self.network, x, t, r, condition)
        call, output = answer
        return _Member.apply(self, call, output, *self.trained.values()) if gradient else output

    def _key(self, asked: _Forward, inputs: Sequence[Tensor]) -> Hashable:
        shapes = tuple((one.shape, one.dtype, one.device) for one in inputs)
        return self.number, shapes, tuple(asked.condition), asked.gradient, asked.training, asked.autocast

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """A copy of the network is an ordinary one."""
        copied = memo[id(self.network)]
        return MethodType(type(copied).forward, copied)


class _Member(torch.autograd.Function):
    """A group's call as a node of one member's graph."""

    @staticmethod
    def forward(ctx: Any, together: _Together, call: Call, output: Tensor, *trained: Tensor) -> Tensor:
        ctx.together, ctx.call = together, call
        return output

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        together, call = ctx.together, ctx.call
        if together.rendezvous.member is None:  # the members have ended
            found = call.pull({together.member: cotangent})[together.member]
        else:
            found = together.rendezvous.ask(("backward", id(call)), _Backward(call, cotangent))
        return None, None, None, *(found[name] for name in together.trained)


def check_packable(network: nn.Module) -> None:
    """Raises InputError where a network's result depends on more than its inputs and weights."""
    for name, module in network.named_modules():
        drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        keeps = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        if drops or keeps:
            what = "draws random numbers" if drops else "keeps running statistics"
            raise InputError(
                f"a network with {type(module).__name__} ({name}) can't be packed", got=f"it {what} in its forward",
                fix="train its seeds one by one (resources.packed: 1)",
            )  # fmt: skip


def _check_alike(role: Role, tensors: Mapping[str, Tensor]) -> None:
    """Raises InputError where a member's network is not like those of the members before it."""
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    known = {name: (stack.shape[1:], stack.dtype) for name, stack in role.stacked.items()}
    if known and found != known:
        odd = next(name for name in sorted({*found, *known}) if found.get(name) != known.get(name))
        raise InputError(
            "packed runs need networks of equal shapes and precision", got=f"another {odd}",
            fix="pack only runs with the same model.network and train.precision",
        )  # fmt: skip
