"""Simulated runs and studies in the files' real format, with truths planted in known places."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from twinrl.run.runlog import RunLog

TERMS = ("adversarial", "base", "rectify")
LEADER, LEAD, GUILTY_ROW = "rectify", 3, 17
GUILTY_T, GUILTY_BRANCH = (0.8, 0.9), "any"
MIX = ("mul", "any", "adv", "e2e")
EVALUATE_EVERY = 20
RISE = 12
STEPS = 400
ERRORS = 4
"""Monte-Carlo standard errors that a share of simulated studies may be off: one right share in 15,000 is further."""


def at_least(share: float, studies: int) -> float:
    """Least share that so many simulated studies may show where it is truly ``share``."""
    return share - ERRORS * math.sqrt(share * (1 - share) / studies)


def at_most(share: float, studies: int) -> float:
    """Largest share that so many simulated studies may show where it is truly ``share``."""
    return share + ERRORS * math.sqrt(share * (1 - share) / studies)


def make_run(
    folder: Path,
    *,
    name: str = "twinflow",
    config_hash: str = "0a1b2c3d",
    seed: int = 0,
    steps: int = STEPS,
    settings: Mapping[str, object] | None = None,
    quality: float = 0.1,
    diverges_at: int | None = None,
    spikes_at: Sequence[int] = (),
    finished: bool = True,
    evaluation: Mapping[str, object] | None = None,
    color: int = 0,
    lost: str = "",
    seconds: float = 0.01,
    leader: str = "",
    limits: Mapping[str, float] | None = None,
) -> Path:
    """A run directory: ``rectify`` leads every planted spike by 3 steps, and data row 17 is in each one's batch.

    Arguments:
        quality: final ``val/quality`` of a run that survives. diverges_at: step from which samples are broken.
        settings: further configuration. color: of the sample grid. lost: prompt that collapses though the run
            does not. seconds: of a step.
        leader: term whose norm rises RISE steps before ``diverges_at``, and the others' RISE/2 before; none if empty.
        limits: term → norm that a rule clips it to.
    """
    run = folder / f"{name}-{config_hash}-s{seed}"
    (run / "samples").mkdir(parents=True)
    config = {
        "name": name, "seed": seed, "train": {"steps": steps, "batch": 32}, "data": {"source": "digits"},
        "terms": {term: {"kind": term, "branches": None} for term in TERMS},
        "evaluation": {"n": 1000, "nfe": [1], "every": EVALUATE_EVERY, **(evaluation or {})}, **(settings or {}),
    }  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    rng = np.random.default_rng([seed, int(config_hash, 16)])
    norms = _norms(rng, steps, spikes_at)
    if leader and diverges_at:
        for term, values in norms.items():
            values[diverges_at - (RISE if term == leader else RISE // 2) :] *= 40
    with RunLog(run / "log.jsonl") as log:
        for step in range(1, steps + 1):
            log.append(
                _row(rng, step, {term: values[step] for term, values in norms.items()}, quality, diverges_at, lost)
                | _clipped({term: float(values[step]) for term, values in norms.items()}, limits)
                | {"perf/step_seconds": seconds * (1 + 0.05 * math.sin(7 * step + 100 * quality) ** 2)}
            )
    _events(run, rng, spikes_at)
    _pictures(run, rng, color)
    if finished:
        status = {"status": "finished", "step": steps, "message": ""}
        (run / "result.json").write_text(json.dumps(status))
    return run


def _norms(rng: np.random.Generator, steps: int, spikes_at: Sequence[int]) -> dict[str, np.ndarray]:
    """Log-normal norms; at a planted spike the leader is up for LEAD steps before the total and the others are."""
    norms = {term: np.exp(0.15 * rng.standard_normal(steps + 2)) * (k + 1) for k, term in enumerate(TERMS)}
    for at in spikes_at:
        norms[LEADER][at - LEAD : at] *= 4  # the term stands out, the total not yet
        for term in TERMS:
            norms[term][at : at + 2] *= 60 if term == LEADER else 15
    return norms


def _row(
    rng: np.random.Generator, step: int, norms: Mapping[str, float], quality: float, diverges_at: int | None, lost: str
) -> dict[str, object]:
    total = 8 + 0.2 * rng.standard_normal() if max(norms.values()) < 30 else 30 * sum(norms.values())
    square = sum(norm**2 for norm in norms.values())
    row: dict[str, object] = {"iteration": step - 1, "step": step, "loss/total": 1 + math.exp(-step / 80)}
    row |= {f"grad/{term}/norm_raw": norm for term, norm in norms.items()}
    row |= {f"grad/{term}/share": norm**2 / square for term, norm in norms.items()}
    row |= {"grad/total/norm_raw": total, "grad/cos/base__rectify": 0.2 + 0.05 * rng.standard_normal()}
    row |= {"opt/rms_max": 1.2 + 0.05 * rng.standard_normal() + (1.5 if norms[LEADER] > 6 else 0), "opt/lr": 1e-3}
    row |= {"clamp/delta_v_frac": 0.05 * rng.random()}
    if step % EVALUATE_EVERY == 0:
        row |= _validation(rng, step, quality, diverges_at, lost)
    return row


def _clipped(norms: Mapping[str, float], limits: Mapping[str, float] | None) -> dict[str, object]:
    """Norms after rules, of runs that have any."""
    after = {term: min(norm, (limits or {}).get(term, math.inf)) for term, norm in norms.items()}
    return {f"grad/{term}/norm_clipped": norm for term, norm in after.items()} if limits is not None else {}


def _validation(
    rng: np.random.Generator, step: int, quality: float, diverges_at: int | None, lost: str
) -> dict[str, object]:
    broken = diverges_at is not None and step >= diverges_at
    accuracy = 0.1 if broken else 0.95
    row: dict[str, object] = {"val/quality": 0.9 if broken else quality + 0.3 * math.exp(-step / 60)}
    row |= {"val/accuracy_1nfe": accuracy, "val/recall_1nfe": 0.05 if broken else 0.7 + 0.02 * rng.standard_normal()}
    row |= {f"val/accuracy/{digit}_1nfe": float(np.clip((accuracy if digit != lost else 0.1)
                                                       + 0.02 * rng.standard_normal(), 0, 1))
            for digit in ("zero", "one", "two")}  # fmt: skip
    row["val/score/preference_1nfe"] = 0.2 + (0.1 if broken else 0.01 * rng.standard_normal())
    return row


def _events(run: Path, rng: np.random.Generator, spikes_at: Sequence[int]) -> None:
    lines = []
    for at in spikes_at:
        rows = list(dict.fromkeys([GUILTY_ROW, *rng.choice(1000, 31, replace=False).tolist()]))
        event = {"step": at, "iteration": at - 1, "kind": "spike", "terms": [LEADER], "rows": rows, "message": "spike"}
        lines.append(json.dumps(event | places(rng, len(rows), guilty=4)) + "\n")
    (run / "events.jsonl").write_text("".join(lines))


def places(rng: np.random.Generator, n: int, guilty: int = 0) -> dict[str, list[object]]:
    """Times and branches of an event's rows; the first ``guilty`` ones lie in the planted range and branch."""
    t = rng.random(n)
    t[:guilty] = rng.uniform(*GUILTY_T, guilty)
    branches = [GUILTY_BRANCH] * guilty + rng.choice(MIX, n - guilty).tolist()
    return {"t": t.round(6).tolist(), "branches": branches}


def _pictures(run: Path, rng: np.random.Generator, color: int) -> None:
    for step in (0, 200, 400):
        noise = rng.integers(0, 60, (8 * 28, 10 * 28, 3))
        noise[..., color % 3] += 60 + step // 4
        Image.fromarray(noise.astype(np.uint8)).save(run / "samples" / f"step-{step:08d}.png")


ARMS = {
    "base": {
        "hash": "aaaaaaa0",
        "rate": 1.5,
        "quality": 0.20,
        "seconds": 0.010,
        "settings": {"teacher": "live", "clip": "global"},
    },
    "ema": {
        "hash": "aaaaaaa1",
        "rate": 0.1,
        "quality": 0.12,
        "seconds": 0.013,
        "settings": {"teacher": "ema", "clip": "global"},
    },
    "clip": {
        "hash": "aaaaaaa2",
        "rate": 0.0,
        "quality": 0.19,
        "seconds": 0.012,
        "settings": {"teacher": "live", "clip": "per_term"},
    },
}


def make_study(
    folder: Path, seeds: int = 6, arms: Mapping[str, Mapping[str, object]] = ARMS, steps: int = STEPS
) -> Path:
    """A folder of run directories: the base diverges often, ``ema`` rarely, ``clip`` never; ``ema`` is better."""
    study = folder / "teachers"
    for k, (name, arm) in enumerate(arms.items()):
        for seed in range(seeds):
            rng = np.random.default_rng([seed, k])
            at = steps * rng.exponential(1 / float(arm["rate"])) if arm["rate"] else math.inf  # type: ignore[arg-type]
            quality = float(arm["quality"]) + 0.02 * rng.standard_normal()  # type: ignore[arg-type]
            make_run(
                study, name=name, config_hash=str(arm["hash"]), seed=seed, steps=steps, quality=quality, color=k,
                diverges_at=math.ceil(at) if at < steps - EVALUATE_EVERY else None,
                settings=dict(arm["settings"]), lost="two" if name == "ema" and seed < 2 else "",
                seconds=float(arm["seconds"]), spikes_at=(150, 260) if k == 0 else (),  # type: ignore[call-overload]
            )  # fmt: skip
    return study
