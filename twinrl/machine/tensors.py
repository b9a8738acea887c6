"""Safetensors files, with the system's own errors: the library gives them other classes, or says that a file that it
may not read is not there."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from twinrl.machine import files

NUMBER = re.compile(r"\(os error (\d+)\)")


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file, to take its name later (:func:`twinrl.machine.files.publishing`).

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        if (number := NUMBER.search(str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def load(path: Path) -> dict[str, Tensor]:
    """The tensors by name.

    Raises:
        OSError: the file is not there, or cannot be read.
        SafetensorError: it is damaged, or no such file.
    """
    files.check_plain(path)
    path.open("rb").close()
    return load_file(path)
