"""What ends a run from outside, on one line: a full disk, another process that has gone."""

import errno
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch.distributed as dist

from twinrl.fsdp import mesh
from twinrl.machine.streams import say
from twinrl.run.checkpoints import SaveError

FAILED = 1
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE}

P = ParamSpec("P")


def in_one_line(command: Callable[P, int]) -> Callable[P, int]:
    """A command that says in one line, and with exit code 1, what has ended it from outside; bugs stay bugs.

    In a worker of Ray, which has formed the process group, errors go to Ray, whose launcher says them.
    """

    @wraps(command)
    def run(*arguments: P.args, **named: P.kwargs) -> int:
        if dist.is_initialized():
            return command(*arguments, **named)
        try:
            return command(*arguments, **named)
        except SaveError as error:  # of all processes
            if mesh.process_rank() == 0:
                say(str(error))
        except OSError as error:
            if error.errno not in DISK:
                raise
            say(f"{_here()}a file cannot be written; got {error}; fix: make room or mend the rights, then resume")
        except RuntimeError as error:
            if not _of_a_lost_peer(error):
                raise
            say(f"{_here()}another process of this training has gone; fix: see its message, then resume")
        return FAILED

    return run


def _of_a_lost_peer(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or ("gloo" in str(error) and "onnection" in str(error))


def _here() -> str:
    return f"rank {mesh.process_rank()}: " if mesh.world_size() > 1 else ""
