"""A program on GPUs, run without one: tensors on "cuda" have shapes and no values, those on the CPU are real.

So the control flow is the program's own, at full size, and everything about the device can be counted:
:mod:`memory` what is held and by whom, :mod:`work` operations and the time that they take at least, :mod:`waits`
where the host waits for the device, :mod:`messages` what ranks send each other. Ranks are those of torch's fake
process group: this process is one of them, and the others answer with its own numbers.

It needs a process of its own (:mod:`helper`), and no device. What is not simulated: workspaces inside kernels,
fragmentation of the allocator, what a kernel takes beyond its share of arithmetic and memory, overlap of messages.
"""

from twinrl.machine.simulated.devices import Simulation

__all__ = ["Simulation"]
