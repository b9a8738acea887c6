"""The autopsy's tables and text: trials → docs/results/autopsy → docs/autopsy.md.

    python docs/autopsy.py collect runs/ablations     trials and curves of the autopsy's studies
    python docs/autopsy.py replays runs/ablations     the steps around large spikes again, without each suspect
    python docs/autopsy.py samplings runs/ablations   healthy runs sampled as published and as recommended
    python docs/autopsy.py                            figures and docs/autopsy.md from these tables

``docs/results/autopsy/text.md`` is the text with ``${names}`` in place of numbers and tables; a test renders it again
and compares, so no result in the page was typed by hand.
"""

import argparse
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ablations.ledger import Ledger
from ablations.study import Arm, load
from analysis.effects import main_effects
from analysis.frames import Run, hash_of, load_run, run_divergence, run_folders
from analysis.intervals import Interval, clopper_pearson, mean_t
from twinrl import assembly, schema
from twinrl.assembly import load_source
from twinrl.commands import inspect
from twinrl.evaluation.grids import sample_grid
from twinrl.evaluation.protocol import Protocol
from twinrl.replay import replay_each
from twinrl.runs import RunDirectory
from twinrl.sampling import few_step
from twinrl.stability.events import SPIKE
from twinrl.tracking import names

PAGE = Path(__file__).parent / "autopsy.md"
IMAGES = Path(__file__).parent / "images"
FOLDER = Path(__file__).parent / "results" / "autopsy"
TEXT, TRIALS, CURVES, REPLAYS, SAMPLED = (
    FOLDER / name for name in ("text.md", "trials.csv", "curves.parquet", "replays.csv", "samplings.csv")
)
LEDGER = FOLDER / "ledger.jsonl"
SOUND = "reward=with teacher=ema"
"""The regime's arm that stayed whole, with the reward."""
STUDIES = ("search", "regime")
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
HEALTHY = 0.95
"""Judge accuracy at the reward's start from which a run counts as an early success."""
ORDERS = 100.0
"""A norm this many times its median before the reward's start is the reported kind of spike."""


# --- from run directories to tables ---------------------------------------------------------------------


def collect(root: Path) -> None:
    """Writes the compact tables from the finished trials of the studies in ``root``."""
    trials, curves, known = [], [], set()
    for study in STUDIES:
        for arm, seed, run in trials_of(study, root):
            key = {"study": study, "arm": arm.name, "seed": seed}
            known.add((arm.settings.hash, seed))
            trials.append(key | outcome(run) | {f"level.{name}": level for name, level in arm.levels.items()})
            curves += [key | point for point in curve(run.rows)]
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_ledger(root, known)
    pd.DataFrame.from_records(trials).to_csv(TRIALS, index=False, float_format="%.6g")
    pd.DataFrame.from_records(curves).astype({"seed": "int16"}).to_parquet(CURVES, index=False)
    print(f"{len(trials)} trials, {len(curves)} points of curves in {FOLDER}")


def write_ledger(root: Path, chosen: Collection[tuple[str, int]]) -> None:
    """The trials' lines of the ledger, so that nobody who has the sources that made them runs them again."""
    records = [r for r in Ledger(root / "ledger.jsonl").read().values() if (r.config_hash, r.seed) in chosen]
    kept = [replace(r, where={key: r.where[key] for key in ("revision", "at")}) for r in records]
    LEDGER.write_text("".join(f"{record.line()}\n" for record in sorted(kept, key=lambda record: record.key)))


def trials_of(study: str, root: Path) -> Iterable[tuple[Arm, int, Run]]:
    """Arm, seed and run directory of every finished trial of ``autopsy-<study>``."""
    arms = {arm.settings.hash: arm for arm in load(f"autopsy-{study}").arms}
    for folder in run_folders(root):
        if (arm := arms.get(hash_of(folder))) is not None and (run := load_run(folder)).result:
            yield arm, int(run.config["seed"]), run


def outcome(run: Run) -> dict[str, Any]:
    """What the questions ask of a trial, by the definitions in the text."""
    start = round(0.2 * run.config["train"]["steps"])
    norms = [(int(row["step"]), _number(row.get(names.GRAD_TOTAL_RAW))) for row in run.rows]
    usual = median(norm for step, norm in norms if step < start)
    later = [(step, norm / usual) for step, norm in norms if step >= start]
    evaluations = [row for row in run.rows if names.VAL_QUALITY in row]
    at_start = max((row for row in evaluations if row["step"] <= start), key=lambda row: row["step"])
    diverged = run_divergence(run)
    return {
        "lr": run.config["optim"]["lr"],
        "steps": run.config["train"]["steps"],
        "usual_norm": usual,
        "norm_ratio": max(ratio for _, ratio in later),
        "norm_max": max(norm for _, norm in norms),
        "spike_step": next((step for step, ratio in later if ratio >= ORDERS), math.nan),
        "early_spikes": sum(norm >= 10 * usual for step, norm in norms if step < start),
        "diverged": diverged is not None,
        "diverged_step": diverged[0] if diverged else math.nan,
        "accuracy_at_start": at_start[WATCHED["accuracy"]],
        "fd_at_start": at_start[WATCHED["fd"]],
        "accuracy_least": min(row[WATCHED["accuracy"]] for row in evaluations),
        "fd_best": min(row[WATCHED["fd"]] for row in evaluations),
        "seconds": sum(_number(row.get(names.STEP_SECONDS)) for row in run.rows),
    } | {f"final_{name}": _number(evaluations[-1].get(metric)) for name, metric in WATCHED.items()}


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


# --- interventions ----------------------------------------------------------------------------------------

INTERVENTIONS = {
    "reward_off": ["reward.schedule.weight.final=0"],
    "baseline_decoded": ["reward.gradient.baseline=decoded"],
    "teacher_ema": ["teacher={kind: ema, decay: 0.99}"],
    "float32": ["train.precision=float32"],
    "lr_tenth": ["optim.lr=1e-4"],
}
"""Suspect → what removes it for the steps around a spike."""
LARGE = 10.0
"""Spikes that are looked at: this many times what was usual."""


def replays(root: Path, most: int = 24) -> None:
    """Replays large spikes of runs of the published arm under each intervention, and writes the heights.

    Arguments:
        root: folder of run directories that kept enough capsules (``stability.capsules.most``).
        most: spikes in all, shared by the runs.
    """
    device = torch.device("cpu")
    source = load_source(schema.load("published"), device)
    heights = []
    published = [load_run(folder) for folder in run_folders(root)]
    for run, number in chosen_spikes(published, most):
        found = replay_each(RunDirectory(run.path), number, list(INTERVENTIONS.values()), lambda _: (source, device), 5)
        peaks = [found.peak(trace) for trace in found.traces]
        heights.append({
            "seed": run.config["seed"], "event": number, "step": found.event.step, "series": found.event.series,
            "usual": found.event.reference, "exact": found.exact, "unchanged": peaks[0],
        } | dict(zip(INTERVENTIONS, peaks[1:], strict=True)))  # fmt: skip
        print(heights[-1], flush=True)
        pd.DataFrame.from_records(heights).to_csv(REPLAYS, index=False, float_format="%.6g")


def chosen_spikes(runs: Iterable[Run], most: int) -> list[tuple[Run, int]]:
    """The first large spikes after the reward's start, in turn from each run, as (run, number of the event)."""
    queues = []
    for run in runs:
        start, kept = round(0.2 * run.config["train"]["steps"]), run.path / "capsules"
        queues.append([
            (run, number) for number, event in enumerate(run.events, 1)
            if event["kind"] == SPIKE and event["step"] > start and (kept / f"event-{number}").is_dir()
            and float(event["value"]) >= LARGE * float(event["reference"])
        ])  # fmt: skip
    turns = [spike for turn in zip_longest(*queues) for spike in turn if spike is not None]
    return turns[:most]


# --- what sampling does to healthy runs --------------------------------------------------------------------

SAMPLINGS = ((1, 0.0), (2, 0.0), (4, 0.0), (8, 0.0), (4, 4.0), (8, 4.0))
"""Network evaluations and strength of guidance; the last is how the published run's final samples were made."""


def samplings(root: Path) -> None:
    """Judges the healthy runs of the regime's sound arm under every sampling, and draws samples of the first."""
    rows: list[dict[str, Any]] = []
    for arm, seed, run in sorted(trials_of("regime", root), key=lambda found: found[1]):
        if arm.name != SOUND or run_divergence(run) is not None:
            continue
        settings, _, source, network = inspect.load(run.path)
        protocol = assembly.protocol_of(settings, source, "test", torch.device("cpu"))
        assert isinstance(protocol, Protocol)
        shown = [int((protocol.labels == label).nonzero()[0]) for label in range(len(source.classes))]
        drawn = []
        for nfe, guidance in SAMPLINGS:
            pixels = protocol.samples(network, few_step(nfe), guidance=guidance)
            drawn.append(pixels[shown])
            judged = protocol.judge(pixels)
            by_class = [judged.correct[judged.labels == label].mean().item() for label in range(len(source.classes))]
            key = {"seed": seed, "nfe": nfe, "guidance": guidance, "accuracy_worst_class": min(by_class)}
            rows.append(key | protocol.summary(judged))
            print(rows[-1], flush=True)
        if len(rows) == len(SAMPLINGS):
            labels = [f"{nfe} NFE, guidance {guidance:g}" for nfe, guidance in SAMPLINGS]
            sample_grid(torch.stack(drawn), labels, title="one healthy run, the same noise").save(
                IMAGES / "autopsy-guidance.png"
            )
        pd.DataFrame.from_records(rows).to_csv(SAMPLED, index=False, float_format="%.6g")


# --- from tables to the page ------------------------------------------------------------------------------


def render(trials: pd.DataFrame) -> str:
    """The page, from the committed tables and the text."""
    values = {
        "search": search_table(trials),
        "regime": regime_table(trials),
    }
    values |= regime_values(trials) | measuring_values(pd.read_parquet(CURVES)) | replay_values(pd.read_csv(REPLAYS))
    values |= sampling_values(pd.read_csv(SAMPLED))
    return Template(TEXT.read_text()).substitute(values)


def search_table(trials: pd.DataFrame) -> str:
    """One line for each regime of the search: how high norms rose, how low accuracy fell."""
    lines = [
        "| learning rate | teacher | reward | largest norm ÷ usual | lowest accuracy | Fréchet distance at the end |",
        "|--:|---|---|--:|--:|--:|",
    ]
    chosen = trials[trials.study == "search"].rename(columns=lambda name: name.removeprefix("level."))
    for row in chosen.loc[:, ~chosen.columns.duplicated()].sort_values(["lr", "teacher", "reward"]).itertuples():
        lines.append(
            f"| {row.lr:.0e} | {row.teacher} | {row.reward} | {row.norm_ratio:,.3g} | {row.accuracy_least:.2f} "
            f"| {row.final_fd:.0f} |"
        )
    return "\n".join(lines)


def regime_table(trials: pd.DataFrame) -> str:
    """One line for each arm of the regime, over its seeds."""
    lines = [
        "| arm | seeds | fell apart | norm ≥ 100 × usual | largest norm ÷ usual, median (most) "
        "| Fréchet distance at the end | `lab_hps` at the end |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for arm, found in trials[trials.study == "regime"].groupby("arm", sort=False):
        lines.append(
            f"| {arm} | {len(found)} | {share(found.diverged)} | {share(found.norm_ratio >= ORDERS)} "
            f"| {found.norm_ratio.median():.3g} ({found.norm_ratio.max():.3g}) | {mean_t(found.final_fd)} "
            f"| {mean_t(found.final_lab_hps)} |"
        )
    return "\n".join(lines)


def share(yes: pd.Series) -> str:
    """k of n with its exact interval."""
    found = clopper_pearson(int(yes.sum()), len(yes))
    return f"{int(yes.sum())} of {len(yes)} [{found.low:.2f}, {found.high:.2f}]"


def regime_values(trials: pd.DataFrame) -> dict[str, str]:
    """What the text says of the regime, by name."""
    regime = trials[trials.study == "regime"].set_index(["arm", "seed"])
    with_reward, without = (regime.loc[f"reward={level} teacher=live"] for level in ("with", "without"))
    paired = (np.log10(with_reward.norm_ratio) - np.log10(without.norm_ratio)).dropna()
    distance = (with_reward.final_fd - without.final_fd).dropna()
    early = with_reward[with_reward.accuracy_at_start >= HEALTHY]
    early_without = without.loc[early.index.intersection(without.index)]
    averaged = [regime.loc[f"reward={level} teacher=ema"] for level in ("with", "without")]
    gain = (averaged[1].final_fd - averaged[0].final_fd).dropna()
    return {
        "live_with_broken": share(with_reward.diverged),
        "live_without_broken": share(without.diverged),
        "ema_broken": share(pd.concat(averaged).diverged),
        "ema_gain": str(mean_t(gain)),
        "n": str(len(with_reward)),
        "early": str(len(early)),
        "early_broken": share(early.diverged),
        "early_without_broken": share(early_without.diverged),
        "norm_factor": _factor(mean_t(paired), 10),
        "fd_difference": str(mean_t(distance)),
        "norm_max": f"{with_reward.norm_max.max():,.0f}",
        "norm_max_without": f"{without.norm_max.max():,.0f}",
        "hours": f"{trials.seconds.sum() / 3600:.1f}",
        "trials": str(len(trials)),
    }


def screening_table(trials: pd.DataFrame) -> str:
    """One line a suspect: what its other level does to the largest norm, to the share of broken runs and to quality."""
    chosen = trials[trials.study == "screening"].dropna(axis="columns", how="all")
    chosen = chosen.assign(height=np.log10(chosen.norm_ratio), worse=np.log(chosen.final_fd))
    factors = [name for name in chosen.columns if name.startswith("level.")]
    levels = load("autopsy-screening").factors
    reference = {name: next(iter(levels[name.removeprefix("level.")])) for name in factors}
    heights = main_effects(chosen, "height", factors, reference=reference)
    distances = {effect.factor: effect for effect in main_effects(chosen, "worse", factors, reference=reference)}
    lines = [
        "| suspect | published → other | largest norm × | p (Holm) | fell apart: published, other "
        "| Fréchet distance × |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for effect in heights:
        published = chosen[effect.factor].astype(str) == str(reference[effect.factor])
        broken = [
            f"{int(part.sum())} of {len(part)}" for part in (chosen.diverged[published], chosen.diverged[~published])
        ]
        other, _, _ = effect.contrast.partition(" − ")
        lines.append(
            f"| {effect.factor.removeprefix('level.')} | {reference[effect.factor]} → {other} "
            f"| {_factor(effect.interval, 10)} | {effect.p_holm:.2g} | {', '.join(broken)} "
            f"| {_factor(distances[effect.factor].interval, math.e)} |"
        )
    return "\n".join(lines)


def _factor(found: Interval, base: float) -> str:
    """An interval of logarithms as one of factors."""
    return f"{base**found.estimate:.2g} [{base**found.low:.2g}, {base**found.high:.2g}]"


def measuring_values(curves: pd.DataFrame) -> dict[str, str]:
    """What the published validation does in runs that are well: means over the seeds of the healthy arm with reward."""
    well = curves[(curves.study == "regime") & (curves.arm == SOUND)].dropna(subset="objective")
    at = {
        "before": well[well.step <= 300].groupby("seed")[["objective", "fd"]].mean(),
        "peak": well[well.step == 600].set_index("seed")[["objective", "fd"]],
        "end": well[well.step == well.step.max()].set_index("seed")[["objective", "fd"]],
    }
    rise = 100 * (at["peak"].objective / at["before"].objective - 1)
    values = {"objective_rise": str(mean_t(rise))}
    for when, found in at.items():
        values |= {f"objective_{when}": f"{found.objective.mean():.2f}", f"fd_{when}": f"{found.fd.mean():.1f}"}
    return values


def sampling_values(sampled: pd.DataFrame) -> dict[str, str]:
    """What the sampling makes of healthy runs: a table, and the published sampling over the plain one, paired."""
    lines = [
        "| network evaluations | guidance | Fréchet distance | precision | accuracy | worst class, median (least) |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for (guidance, nfe), found in sampled.groupby(["guidance", "nfe"]):
        worst = found.accuracy_worst_class
        lines.append(
            f"| {nfe} | {guidance:g} | {mean_t(found.fd)} | {mean_t(found.precision)} | {found.accuracy.mean():.3f} "
            f"| {worst.median():.2f} ({worst.min():.2f}) |"
        )
    by_seed = sampled.set_index(["guidance", "nfe", "seed"]).sort_index()
    ratio = mean_t(np.log(by_seed.fd.loc[4.0, 8]) - np.log(by_seed.fd.loc[0.0, 8]))
    return {
        "samplings": "\n".join(lines),
        "sampled_runs": str(sampled.seed.nunique()),
        "guided_ratio": _factor(ratio, math.e),
    }


def replay_values(heights: pd.DataFrame) -> dict[str, str]:
    """What was left of the large spikes under each intervention, of those whose unchanged replay repeats the log."""
    inexact, heights = int((~heights.exact).sum()), heights[heights.exact]
    above = heights[[*INTERVENTIONS, "unchanged"]].div(heights.usual, axis=0)
    lines = ["| removed for these steps | spikes that keep at most a fifth | height ÷ usual, median |", "|---|--:|--:|"]
    lines.append(f"| nothing | – | {above.unchanged.median():.3g} |")
    for name, change in INTERVENTIONS.items():
        gone = heights[name] <= heights.unchanged / 5
        lines.append(f"| `{' '.join(change)}` | {share(gone)} | {above[name].median():.3g} |")
    return {
        "replays": "\n".join(lines),
        "replay_spikes": str(len(heights)),
        "replay_inexact": str(inexact),
        "replay_runs": str(heights.seed.nunique()),
    }


# --- figures ----------------------------------------------------------------------------------------------

LIVE, EMA = "#D55E00", "#0072B2"


def central_figure(curves: pd.DataFrame) -> Figure:
    """Quality and gradient norm of every seed, without and with the reward, for a live and an averaged teacher."""
    figure = Figure(figsize=(8.4, 4.8), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    chosen = curves[curves.study == "regime"]
    for column, reward in enumerate(("without", "with")):
        for teacher, colour in (("live", LIVE), ("ema", EMA)):
            seeds = chosen[chosen.arm == f"reward={reward} teacher={teacher}"].groupby("seed")
            for k, (_, run) in enumerate(seeds):
                label = {"live": "live student as teacher", "ema": "EMA teacher"}[teacher] if k == 0 else None
                style = {"color": colour, "lw": 1.1, "alpha": 0.75}
                judged = run.dropna(subset="fd")
                panels[0, column].plot(judged.step, judged.fd, label=label, **style)
                panels[1, column].plot(run.step, run.norm, **style)
        panels[0, column].set_title(f"{reward} reward", fontsize=10)
        panels[1, column].set_xlabel("step", fontsize=9)
        if reward == "with":
            _mark(panels[:, column])
    panels[0, 0].set_ylabel("Fréchet distance, 1 NFE", fontsize=9)
    panels[1, 0].set_ylabel("gradient norm before clipping", fontsize=9)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=9
    )
    for axes in panels.flat:
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    panels[0, 0].set_yticks([30, 100, 300], ["30", "100", "300"], minor=False)
    panels[0, 0].minorticks_off()
    return figure


def _mark(column: Sequence[Axes]) -> None:
    for axes in column:
        axes.axvline(400, color="0.5", lw=0.8, ls="--")
        axes.axvline(600, color="0.5", lw=0.8, ls=":")
    column[0].annotate(
        "reward on", (400, 0.97), xycoords=("data", "axes fraction"), fontsize=7, ha="right", va="top", rotation=90
    )
    column[0].annotate(
        "renoise ends", (600, 0.97), xycoords=("data", "axes fraction"), fontsize=7, ha="right", va="top", rotation=90
    )


FROM_RUNS = (collect, replays, samplings)
"""What needs run directories; everything else is made from the tables."""


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    for command in FROM_RUNS:
        chooser = commands.add_parser(command.__name__, help=command.__doc__)
        chooser.add_argument("root", type=Path)
        chooser.set_defaults(make=command)
    chosen = parser.parse_args()
    if chosen.command:
        chosen.make(chosen.root)
    else:
        central_figure(pd.read_parquet(CURVES)).savefig(IMAGES / "autopsy.png", dpi=150)
        PAGE.write_text(render(pd.read_csv(TRIALS)))


if __name__ == "__main__":
    main()
