"""The process of a simulation: a compiled helper has to be there before torch is imported, so it is a new one.

The helper (``helper.cpp``) is compiled at first use, for each version of torch, and kept in a cache. Real devices are
hidden from the process, so that a torch with CUDA touches none.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from twinrl.config.errors import InputError

SOURCE = Path(__file__).with_name("helper.cpp")
COMPILERS = ("c++", "g++", "clang++")
LIBRARIES = ("-Wl,--no-as-needed", "-lc10", "-ltorch_cpu", "-ltorch")
"""The last one loads torch's CUDA, if there is one: before the helper, whose hooks and guard then replace its own."""
START = (
    "import ctypes, runpy, sys; ctypes.CDLL(sys.argv.pop(1), ctypes.RTLD_GLOBAL); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__')"
)


def compiled(cache: Path) -> Path:
    """The helper for this torch, compiled into ``cache`` if it is not there.

    Raises:
        InputError: there is no C++ compiler, or it fails.
    """
    key = hashlib.blake2b(
        SOURCE.read_bytes() + " ".join(LIBRARIES).encode() + torch.__version__.encode(), digest_size=8
    ).hexdigest()
    library = cache / f"simulation-{key}.so"
    if not library.exists():
        compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), *COMPILERS))), None)
        if compiler is None:
            raise InputError(
                "a simulation compiles a small helper, and there is no C++ compiler", expected=" or ".join(COMPILERS),
                fix="install one (e.g. the package g++), or name it in CXX",
            )  # fmt: skip
        cache.mkdir(parents=True, exist_ok=True)
        _compile(compiler, library)
    return library


def _compile(compiler: str, library: Path) -> None:
    """Raises InputError where the compiler fails; a library is there whole or not at all."""
    at = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        told = [f"-I{at}/include", f"-I{at}/include/torch/csrc/api/include", f"-L{at}/lib", f"-Wl,-rpath,{at}/lib"]
        command = [compiler, "-shared", "-fPIC", "-std=c++20", "-O1", *told, str(SOURCE), *LIBRARIES]
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise InputError(f"{compiler} does not compile the simulation's helper", got=said[:200])
        os.replace(made, library)


def started(module: str, cache: Path, *arguments: str) -> "subprocess.Popen[str]":
    """A process that runs ``module`` as ``__main__`` where fake devices can be; its standard streams are pipes.

    Raises:
        InputError: see :func:`compiled`.
    """
    command = [sys.executable, "-c", START, str(compiled(cache)), module, *arguments]
    # no device is touched, and files of the working directory stand for no libraries
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
