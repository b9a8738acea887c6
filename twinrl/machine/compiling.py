"""torch.compile of a network's blocks, one by one: what repeats is compiled once, and hooks stay outside."""

import os
import shutil
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from twinrl.config.errors import InputError

INDUCTOR = "inductor"
COMPILERS = ("g++", "c++", "clang++")
VARIANTS = 64
"""Most forms of a block: with and without gradient, of student and average, of one row and of several."""
OLDEST = (7, 0)
"""Compute capability from which Triton makes kernels."""


def check(backend: str, device: torch.device, key: str = "machine.compile") -> None:
    """Raises InputError where a backend is unknown, or has on this machine nothing to compile with."""
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        raise InputError(
            f"{key}: torch has no backend {backend}",
            expected=f"one of {', '.join(torch.compiler.list_backends())}, or null",
        )
    if backend != INDUCTOR:
        return
    if device.type == "cuda":
        if (found := torch.cuda.get_device_capability(device)) < OLDEST:
            got, expected = (f"compute capability {major}.{minor}" for major, minor in (found, OLDEST))
            raise InputError(f"{key}: {device} is too old", got=got, expected=f"{expected} or newer")
        if not torch.utils._triton.has_triton_package():
            raise InputError(f"{key}: {INDUCTOR} needs Triton", fix="pip install triton, or leave it out")
    elif not any(map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))):
        raise InputError(
            f"{key}: {INDUCTOR} needs a C++ compiler on CPUs", expected=" or ".join(COMPILERS),
            fix="install one (e.g. the package g++), or name it in CXX",
        )  # fmt: skip


def compile_blocks(blocks: Iterable[nn.Module], backend: str, hooks: bool = False) -> None:
    """Compile the blocks' forward passes, in place; the first call of each form takes seconds to minutes.

    Arguments:
        blocks: of which many are alike; equal ones share what is compiled.
        backend: a name of ``torch.compiler.list_backends``.
        hooks: the blocks have hooks that must stay outside, as those of FSDP2. Without, copies of a block are not
            compiled; with, a copy would compute with the weights of its original.
    """
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # terms go back through one forward pass one after the other
    dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS)
    options: Any = {"fallback_random": True} if backend == INDUCTOR else None  # the dropout of eager passes
    for block in blocks:
        if hooks:
            block.forward = torch.compile(block.forward, backend=backend, options=options)
        else:
            block.compile(backend=backend, options=options)
