"""Makes torchvision importable beside a CPU build of torch, where its compiled operators are missing.

Package indexes without a CPU wheel of torchvision leave one whose native library cannot be loaded; its import
then fails with ``operator torchvision::nms does not exist``, and with it open_clip and parts of diffusers.
Nothing here needs the operators themselves, only that their schemas exist.

``import twinrl`` installs a finder that defines them where, and when, torchvision turns out to need them: whoever
imports it, a stock diffusers script included. torch is not imported for that.
"""

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_log = logging.getLogger(__name__)

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_REMARKS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
"""Loggers that tell, when diffusers imports torchao, which of its kernels cannot be loaded; nothing here needs them."""
_libraries: list[Any] = []  # a torch Library's definitions vanish when it is collected


class _Finder:
    """Finds torchvision as usual, and lets its loader try twice."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == "torchvision" else None
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(_execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Let every later import of torchvision in this process define missing operator schemas, and torchao be silent."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
        for name in _REMARKS:
            logging.getLogger(name).setLevel(logging.ERROR)


def ensure_torchvision() -> None:
    """Import torchvision, defining its missing operator schemas if the native library cannot be loaded.

    *When to use*: before importing what hides the reason of a failed import of torchvision, as lazy modules do.

    Raises:
        RuntimeError: torchvision fails to import for another reason.
    """
    install()
    importlib.import_module("torchvision")


def _execute(load: Callable[[ModuleType], None], module: ModuleType) -> None:
    try:
        load(module)
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _purge_partial_modules()
        _define_schemas()
        load(module)
        _log.info("torchvision has no native operators for this torch build: schemas defined, nms unavailable")


def _purge_partial_modules() -> None:
    """Forget the half-initialised submodules of a failed import, so that the next one starts afresh."""
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]


def _define_schemas() -> None:
    """Define the schemas that torchvision's Python side registers fake kernels for."""
    library = importlib.import_module("torch").library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)
