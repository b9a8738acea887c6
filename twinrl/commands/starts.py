"""The evaluation of start weights: once for all runs that share them, and what their falls are measured against."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from twinrl.config import canonical_hash
from twinrl.config.errors import InputError
from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.lab.storage import damaged, load_json, publish
from twinrl.machine.files import cache_dir
from twinrl.run import layout, names
from twinrl.run.runlog import LogRow
from twinrl.stability import verdict
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig

UNUSED = ("every", "objective", "grid_samples", "teacher_steps")
"""Evaluation settings that change no metric of an evaluation."""


def evaluated(
    settings: RunConfig, content_hash: str, evaluate: Callable[[], Mapping[str, float]], ranks: Ranks = ALONE
) -> LogRow | None:
    """Metrics of the start weights; None for random ones, from which nothing can fall.

    Kept in the cache, beside the laboratory and its teachers.

    Arguments:
        settings: of the run.
        content_hash: of the data and of the frozen and pretrained models.
        evaluate: makes the metrics, all processes together.

    Raises:
        InputError: the cached file is damaged; the message says which to delete.
    """
    if settings.train.init == "random":
        return None
    path = cache_dir() / "starts" / content_hash[:12] / f"{key(settings, content_hash)}.json"
    if not ranks.anywhere(ranks.first and not os.path.isfile(path)):
        text = ranks.together(lambda: json.dumps(_load(path)) if ranks.first else "")
        return verdict.decoded(json.loads(ranks.gathered(text)[0]))
    made = ranks.agree(dict(evaluate()))
    with suppress(OSError, InputError):  # an unwritable cache: this run keeps its own, the next evaluates again
        ranks.on_first(lambda: publish(path, lambda file: file.write_text(json.dumps(verdict.encoded(made)))))
    return made


def key(settings: RunConfig, content_hash: str) -> str:
    """A digest of all that decides the metrics of the start: weights, network, data, protocol and judges."""
    numeric = settings.numeric()
    reward = numeric["reward"] or {}
    decides: dict[str, Any] = {
        "content": content_hash,
        "start": _origin(settings),
        "model": numeric["model"],
        "precision": settings.train.precision,
        "evaluation": {name: value for name, value in numeric["evaluation"].items() if name not in UNUSED},
        "judges": [numeric.get("judges"), reward.get("model"), reward.get("held_out")],
    }
    return canonical_hash(decides)


def _origin(settings: RunConfig) -> object:
    """What tells start weights apart; a family's new parameters are made from the seed."""
    if settings.train.init == "teacher":
        return settings.seed if settings.model.is_pretrained else "teacher"
    state = RunDirectory(Path(settings.train.init)).newest_checkpoint() / layout.STATE
    return hashlib.sha256(state.read_bytes()).hexdigest()  # it holds the statistics of the run that led there


def _load(path: Path) -> Mapping[str, object]:
    found = load_json(path, path)
    if not isinstance(found, dict) or not isinstance(verdict.decoded(found).get(names.VAL_QUALITY), float):
        raise damaged(path, path, f"it has no {names.VAL_QUALITY}")
    return found
