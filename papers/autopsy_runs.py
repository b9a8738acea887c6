"""From run directories to the autopsy's tables in papers/results/autopsy; ``papers/autopsy.py`` makes the page of them.

    python papers/autopsy_runs.py collect [runs/ablations …]    trials and curves of the autopsy's studies
    python papers/autopsy_runs.py samplings runs/ablations      healthy runs sampled as published and as recommended

What the committed tables hold of trials whose run directories are not here is kept, as long as the study is the same,
and told by the present verdict as far as the tables go.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch

from ablations.ledger import Ledger
from ablations.margin import probe_of, reachable
from ablations.study import Arm, load
from analysis.frames import Run, hash_of, load_run, run_divergence, run_folders
from twinrl.evaluation.grids import sample_grid
from twinrl.run import names
from twinrl.sampling import few_step
from twinrl.stability.divergence import FALL, Divergence, first_divergence
from twinrl.training.opened import open_run

IMAGES = Path(__file__).parent / "images"
FOLDER = Path(__file__).parent / "results" / "autopsy"
TRIALS, CURVES, REPLAYS, FALLS, SAMPLED, STARTS, LEDGER = (
    FOLDER / name
    for name in (
        "trials.csv",
        "curves.parquet",
        "replays.csv",
        "falls.csv",
        "samplings.csv",
        "starts.csv",
        "ledger.jsonl",
    )
)
MARGIN = "margin"
"""The study that is a bisection: `ablate margin`."""
STUDIES = (
    *("search", "plateau", "regime", "suspects", "finalists", "screening", "interactions", MARGIN, "size", "dose"),
    *("causes", "clipped"),
    *("unclipped", "unclipped-control", "sensitivity", "recommended", "control"),
    *("dit-rates", "dit", "dit-window", "mnist-rates", "mnist"),
)
CURVED = ("search", "plateau", "regime")
"""Studies whose curves are kept."""
BROKEN, SOUND, NO_REWARD = "reward=with teacher=live", "reward=with teacher=ema", "reward=without teacher=live"
"""The regime's published arm, the one that stayed whole with the reward, and the one without it."""
WINDOW = 10  # steps behind a point of the committed curves: their largest norm
NORMS = {
    "norm": names.GRAD_TOTAL_RAW,
    **{term: names.grad(term, "norm_raw") for term in ("base", "adversarial", "rectify", "reward")},
}
"""Column → norm before clipping."""
WATCHED = {
    "quality": names.VAL_QUALITY,
    "fd": names.val("fd", 1),
    "accuracy": names.val("accuracy", 1),
    "recall": names.val("recall", 1),
    "objective": names.VAL_OBJECTIVE,
    "velocity_mse": names.val("velocity_mse"),
    "lab_hps": names.score("lab_hps", 1, held_out=False),
    "lab_clip": names.score("lab_clip", 1, held_out=False),
    "lab_judge": names.score("lab_judge", 1, held_out=True),
}
"""Column → metric at an evaluation."""
JUDGED = {"fd": "fd", "recall": "recall", "accuracy": "accuracy", "judge": "score/lab_judge", "hps": "score/lab_hps"}
"""Column → metric of the final table."""
HIGH = 8.0
"""A loss this many times its median before the reward's start has risen."""
ORDERS = 100.0
"""A norm this many times its median before the reward's start is the reported kind of spike."""


# --- trials and curves ------------------------------------------------------------------------------------


def collect(roots: Sequence[Path]) -> None:
    """Adds the finished trials of the autopsy's studies in ``roots`` to the compact tables."""
    found = {
        (study, arm.name, seed): (arm, run)
        for study in STUDIES
        for root in roots
        for arm, seed, run in trials_of(study, root)
    }  # of a trial that was made twice, the last
    trials, curves = [], []
    for (study, name, seed), (arm, run) in found.items():
        key = {"study": study, "arm": name, "seed": seed}
        made = {"config_hash": arm.settings.hash} | outcome(run) | judged(run)
        trials.append(key | made | {f"level.{factor}": level for factor, level in arm.levels.items()})
        curves += [key | point for point in curve(run.rows)] if study in CURVED else []
    FOLDER.mkdir(parents=True, exist_ok=True)
    table = merged(pd.read_csv(TRIALS) if TRIALS.exists() else None, pd.DataFrame.from_records(trials))
    table = table[[of_today(*row) for row in zip(table.study, table.config_hash, strict=True)]]
    points = merged(pd.read_parquet(CURVES) if CURVES.exists() else None, pd.DataFrame.from_records(curves))
    points = points.merge(table[KEY].drop_duplicates(), on=KEY)
    points.astype({"seed": "int16"}).to_parquet(CURVES, index=False)
    table = told(table, points)
    table.to_csv(TRIALS, index=False, float_format="%.6g")
    write_ledger(roots, table)
    print(f"{len(table)} trials, {len(trials)} of them from here; {len(points)} points of curves in {FOLDER}")


KEY = ["study", "arm", "seed"]


def merged(before: pd.DataFrame | None, made: pd.DataFrame) -> pd.DataFrame:
    """What was made now, and of what was there before the trials that were not made again."""
    if before is None or made.empty:
        return made if before is None else before
    again = set(made[KEY].itertuples(index=False, name=None))
    known = before[KEY].itertuples(index=False, name=None)
    old = before[[key[0] in STUDIES and key not in again for key in known]]
    both = pd.concat([old, made], ignore_index=True) if len(old) else made
    return both.sort_values(KEY, key=lambda column: column if column.name != "study" else column.map(STUDIES.index))


@cache
def arms(study: str) -> dict[str, Arm]:
    """Hash of the configuration → arm of ``autopsy-<study>``; of a bisection each probe that it can come to."""
    found = load(f"autopsy-{study}")
    made: Iterable[Arm] = found.arms
    if study == MARGIN:
        margin = found.config.margin
        made = (probe_of(arm, margin, rate) for arm in found.arms for rate in sorted(reachable(margin)))
    return {arm.settings.hash: arm for arm in made}


def of_today(study: str, config_hash: str) -> bool:
    """Whether the study still asks for this configuration."""
    return config_hash in arms(study)


def write_ledger(roots: Sequence[Path], table: pd.DataFrame) -> None:
    """The trials' lines of the ledgers, so that nobody who has the sources that made them runs them again."""
    found = Ledger(LEDGER, *(root / "ledger.jsonl" for root in roots)).read()
    chosen = {(row.config_hash, row.seed): row for row in table.itertuples()}
    kept = [
        replace(
            r, where={key: r.where[key] for key in ("revision", "at")}, diverged=_failure(chosen[trial], r.diverged)
        )
        for r in found.values()
        if (trial := (r.config_hash, r.seed)) in chosen
    ]
    LEDGER.write_text("".join(f"{record.line()}\n" for record in sorted(kept, key=lambda record: record.key)))


def _failure(row: Any, before: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A trial's failure as a ledger has it; ``before`` where it was not told again."""
    if row.told not in (BY_CURVE, BY_TABLE):
        return before
    if not row.diverged:
        return None
    found = {"step": row.diverged_step, "kind": FALL, "after": row.diverged_after, "recovered": row.recovered}
    return {name: int(value) if isinstance(value, float) else value for name, value in found.items()}


BY_RUN, BY_CURVE, BY_TABLE = "run", "curve", "table"
"""What a trial was told by: its run directory with the start's evaluation; the committed curve; the table's columns."""


def told(trials: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """The trials of runs that were made without an evaluation of their start, with the falls that it shows.

    Where the curve is kept the verdict is exact. Else the table has two evaluations and the best distance: a run fell
    from its start where it was whole at neither, bad at the last and never near its start. Others may have fallen, too,
    and what the start is not known of stays as it was.
    """
    starts = pd.read_csv(STARTS).set_index(["source", "network"])
    points = dict(iter(curves[curves.quality.notna()].groupby(KEY)))
    lines = []
    for row in trials.to_dict("records"):
        settings = arms(row["study"])[row["config_hash"]].settings
        name = (settings.data.source, settings.model.network.kind)
        if row.get("told") != BY_RUN and name in starts.index:
            margins, start = settings.stability.divergence, starts.loc[name]
            if (curve := points.get(tuple(row[key] for key in KEY))) is not None:
                row |= _by_curve(row, curve, margins, start)
            elif not row["diverged"]:
                row |= _by_table(row, settings.evaluation.every, margins, start)
        lines.append(row)
    return pd.DataFrame.from_records(lines, columns=[*dict.fromkeys([*trials.columns, *TOLD])])


TOLD = ("diverged_after", "recovered", "told")
"""Columns that tell more of a failure."""


def evaluations(curve: pd.DataFrame) -> list[dict[str, float]]:
    """The log rows of a run's evaluations, as far as a fall is judged by them, from the kept curve."""
    return [
        {"step": int(row.step), names.VAL_QUALITY: row.quality}
        | {names.val(quantity, 1): getattr(row, quantity) for quantity in ("accuracy", "recall")}
        for row in curve[curve.quality.notna()].itertuples()
    ]


def start_of(source: str = "digits", network: str = "mlp") -> dict[str, float]:
    """The metrics of the start weights: the teacher's, as a student."""
    start = pd.read_csv(STARTS).set_index(["source", "network"]).loc[(source, network)]
    return {names.VAL_QUALITY: start.quality} | {names.val(q, 1): start[q] for q in ("accuracy", "recall")}


def _by_curve(
    row: Mapping[str, Any], curve: pd.DataFrame, margins: Divergence.Config, start: pd.Series
) -> dict[str, Any]:
    """What is told otherwise of a run with its start."""
    found = first_divergence(evaluations(curve), margins, 1, start_of(*start.name), ended=True)
    if (found is not None) == row["diverged"] and (found is None or found.step == row["diverged_step"]):
        return {}
    fall, reward = math.inf if found is None else found.step, 0.2 * row["steps"]
    norms = curve[(curve.step >= reward) & (curve.step <= fall)].norm
    return {
        "diverged": found is not None,
        "diverged_step": math.nan if found is None else found.step,
        "diverged_after": math.nan if found is None else found.after,
        "recovered": found is not None and found.recovered,
        "norm_ratio_whole": norms.max() / row["usual_norm"],
        "told": BY_CURVE,
    }


def _by_table(row: Mapping[str, Any], every: int, margins: Divergence.Config, start: pd.Series) -> dict[str, Any]:
    """A fall from the start of a run that has none by its own best; its step is one by which it had fallen."""
    far, worse = (start[name] * (1 + margins.relative) + margins.absolute for name in ("fd", "quality"))
    unwell = max(row["accuracy_at_start"], row["final_accuracy"]) < margins.accuracy_floor
    if not (unwell and row["fd_best"] > far and row["final_quality"] > worse):
        return {}
    step = every * math.floor(0.2 * row["steps"] / every)
    return {"diverged": True, "diverged_step": step, "diverged_after": 0, "recovered": False,
            "norm_ratio_whole": math.nan, "told": BY_TABLE}  # fmt: skip


def trials_of(study: str, root: Path) -> Iterable[tuple[Arm, int, Run]]:
    """Arm, seed and run directory of every finished trial of ``autopsy-<study>``."""
    for folder in run_folders(root):
        if (arm := arms(study).get(hash_of(folder))) is not None and (run := load_run(folder)).result:
            yield arm, int(run.config["seed"]), run


def outcome(run: Run) -> dict[str, Any]:
    """What the questions ask of a trial, by the definitions in the text."""
    start = round(0.2 * run.config["train"]["steps"])
    norms = [(int(row["step"]), _number(row.get(names.GRAD_TOTAL_RAW))) for row in run.rows]
    usual = median(norm for step, norm in norms if step < start)
    later = [(step, norm / usual) for step, norm in norms if step >= start]
    evaluations = [row for row in run.rows if names.VAL_QUALITY in row]  # none where it ended at once
    last = evaluations[-1] if evaluations else {}
    at_start = max((row for row in evaluations if row["step"] <= start), key=lambda row: row["step"], default={})
    diverged = run_divergence(run)
    fall = diverged.step if diverged else math.inf
    return {
        "lr": run.config["optim"]["lr"],
        "lr_at_start": next((_number(row[names.LR]) for row in run.rows if row["step"] >= start), math.nan),
        "lr_end": _number(run.rows[-1][names.LR]),
        "steps": run.config["train"]["steps"],
        "usual_norm": usual,
        "norm_ratio": max((ratio for _, ratio in later), default=math.nan),  # a run may end before the reward starts
        "norm_ratio_whole": max((ratio for step, ratio in later if step <= fall), default=math.nan),
        "norm_max": max(norm for _, norm in norms),
        "spike_step": next((step for step, ratio in later if ratio >= ORDERS), math.nan),
        "early_spikes": sum(norm >= 10 * usual for step, norm in norms if step < start),
        "latent_gradient_begin": latent_gradient(run, start, 10),
        "latent_gradient_first": latent_gradient(run, start, 100),
        "adversarial_rise": rise(run, names.loss("adversarial"), start),
        "total_rise": rise(run, names.LOSS_TOTAL, start),
        "early_norm_noise": noise([norm for step, norm in norms if step < start]),
        "early_loss_noise": noise([_number(row.get(names.LOSS_TOTAL)) for row in run.rows if row["step"] < start]),
        "diverged": diverged is not None,
        "diverged_step": diverged.step if diverged else math.nan,
        "diverged_after": diverged.after if diverged else math.nan,
        "recovered": diverged is not None and diverged.recovered,
        "told": BY_RUN if run.start is not None else "",
        "accuracy_at_start": _number(at_start.get(WATCHED["accuracy"])),
        "fd_at_start": _number(at_start.get(WATCHED["fd"])),
        "accuracy_least": min((row[WATCHED["accuracy"]] for row in evaluations), default=math.nan),
        "fd_best": min((row[WATCHED["fd"]] for row in evaluations), default=math.nan),
        "seconds": sum(_number(row.get(names.STEP_SECONDS)) for row in run.rows),
    } | {f"final_{name}": _number(last.get(metric)) for name, metric in WATCHED.items()}


def latent_gradient(run: Run, start: int, steps: int) -> float:
    """Median norm of the reward's latent gradient in its first ``steps`` steps."""
    first = (row for row in run.rows if start < row["step"] <= start + steps and names.REWARD_GRAD_NORM in row)
    return median([_number(row[names.REWARD_GRAD_NORM]) for row in first] or [math.nan])


def rise(run: Run, series: str, start: int) -> float:
    """First step after ``start`` at which a loss is ``HIGH`` times its median over the 100 steps before."""
    before = [_number(row[series]) for row in run.rows if start - 100 <= row["step"] < start]
    level = HIGH * median(before or [math.nan])
    return next((row["step"] for row in run.rows if row["step"] >= start and _number(row[series]) > level), math.nan)


def noise(series: Sequence[float]) -> float:
    """How unsteady a series of positive numbers is: the median change of its logarithm from one step to the next."""
    return median(abs(math.log(after / before)) for before, after in pairwise(series))


def judged(run: Run) -> dict[str, float]:
    """Of the final table on the test split: the student's distance, recall and held-out reward, and the teacher's."""
    found: dict[str, float] = {}
    for row in ((run.result or {}).get("table") or {"rows": []})["rows"]:
        whose = {"student": f"test{row['nfe']}", "teacher, Euler": "teacher"}.get(row["name"])
        if whose is not None:
            found |= {
                f"{whose}_{name}": _number(row["metrics"][metric]["value"])
                for name, metric in JUDGED.items()
                if metric in row["metrics"]  # MNIST has other scorers
            }
    return found


def curve(rows: Sequence[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """A point every ``WINDOW`` steps: the largest norms in it, and the evaluation that falls into it."""
    for first in range(0, len(rows), WINDOW):
        window = rows[first : first + WINDOW]
        point: dict[str, Any] = {"step": int(window[-1]["step"])}
        for column, metric in NORMS.items():
            point[column] = max((_number(row[metric]) for row in window if metric in row), default=math.nan)
        for column, metric in WATCHED.items():
            point[column] = next((_number(row[metric]) for row in window if metric in row), math.nan)
        yield point


def _number(value: object) -> float:
    """A logged number; an infinite or undefined one stays so."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


# --- what sampling does to healthy runs --------------------------------------------------------------------

SAMPLINGS = ((1, 0.0), (2, 0.0), (4, 0.0), (8, 0.0), (4, 4.0), (8, 4.0))
"""Network evaluations and strength of guidance; the last is how the published run's final samples were made."""


def samplings(root: Path) -> None:
    """Judges the healthy runs of the regime's sound arm under every sampling, and draws samples of the first."""
    table = pd.read_csv(SAMPLED) if SAMPLED.exists() else pd.DataFrame(columns=["study", "seed"])
    for study in ("regime", "plateau"):
        healthy = [run for arm, _, run in trials_of(study, root) if arm.name == SOUND and run_divergence(run) is None]
        for run in healthy:
            seed = int(run.config["seed"])
            rows, drawn = sampled(run)
            if study == "regime" and run is healthy[0]:
                labels = [f"{nfe} NFE, guidance {guidance:g}" for nfe, guidance in SAMPLINGS]
                sample_grid(drawn, labels, title="one healthy run, the same noise").save(
                    IMAGES / "autopsy-guidance.png"
                )
            others = table[(table.study != study) | (table.seed != seed)]
            made = pd.DataFrame([{"study": study, "seed": seed} | row for row in rows])
            table = pd.concat([others, made], ignore_index=True)
            print(made.to_string(), flush=True)
            table.sort_values(["study", "seed", "guidance", "nfe"]).to_csv(SAMPLED, index=False, float_format="%.6g")


def sampled(run: Run) -> tuple[list[dict[str, float]], torch.Tensor]:
    """A row of metrics for every sampling of a run's student, and (samplings, classes, 3, H, W) of its samples."""
    opened = open_run(run.path, device=torch.device("cpu"))
    protocol, network = opened.provider.protocol("test"), opened.network
    classes = protocol.labels.unique().tolist()
    shown = [int((protocol.labels == label).nonzero()[0]) for label in classes]
    rows, drawn = [], []
    for nfe, guidance in SAMPLINGS:
        pixels = protocol.samples(network, few_step(nfe), guidance=guidance)
        drawn.append(pixels[shown])
        judged = protocol.judge(pixels)
        by_class = [judged.correct[judged.labels == label].mean().item() for label in classes]
        made = {"nfe": nfe, "guidance": guidance, "accuracy_worst_class": min(by_class)}
        rows.append(made | protocol.summary(judged))
    return rows, torch.stack(drawn)


def run_chosen(description: str | None, commands: Mapping[Callable[[Any], None], str | None]) -> None:
    """Calls the command that the command line names with its folders of run directories.

    ``commands``: each with how many it takes, as argparse has it.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    choosers = parser.add_subparsers(dest="command", required=True)
    for command, roots in commands.items():
        chooser = choosers.add_parser(command.__name__, help=command.__doc__)
        chooser.add_argument("root", type=Path, nargs=roots, help="folder of run directories")
        chooser.set_defaults(make=command)
    chosen = parser.parse_args()
    chosen.make(chosen.root)


if __name__ == "__main__":
    run_chosen(__doc__, {collect: "*", samplings: None})
