"""Makes torchvision importable beside a CPU build of torch, where its compiled operators are missing.

Package indexes without a CPU wheel of torchvision leave one whose native library cannot be loaded; its import
then fails with ``operator torchvision::nms does not exist``, and with it open_clip and parts of diffusers.
Nothing here needs the operators themselves, only that their schemas exist.
"""

import functools
import importlib
import logging
import sys

import torch

_log = logging.getLogger(__name__)

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a Library's definitions vanish when it is collected


@functools.cache
def ensure_torchvision() -> None:
    """Import torchvision, defining its missing operator schemas if the native library cannot be loaded.

    *When to use*: before importing open_clip, a diffusers pipeline, or anything else that imports torchvision.

    Raises:
        RuntimeError: torchvision fails to import for another reason.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _purge_partial_modules()
        _define_schemas()
        importlib.import_module("torchvision")
        _log.info("torchvision has no native operators for this torch build: schemas defined, nms unavailable")


def _purge_partial_modules() -> None:
    """Forget the half-initialised modules of a failed import, so that the next one starts afresh."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def _define_schemas() -> None:
    """Define the schemas that torchvision's Python side registers fake kernels for."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)
