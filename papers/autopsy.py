"""The autopsy's page: papers/results/autopsy → figures and papers/autopsy.md.

    python papers/autopsy.py

``papers/results/autopsy/text.md`` is the text with ``${names}`` in place of numbers and tables; a test renders it again
and compares, so no result in the page was typed by hand. The tables are made by ``papers/autopsy_runs.py``.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd
from autopsy_arms import (
    WELL,
    before_reward,
    carried_values,
    dose_values,
    factor,
    median_of,
    paired_p,
    recipe_values,
    renoise_values,
    sensitivity_values,
    share,
    single_changes,
    size_values,
    suspects_values,
    transformer_values,
)
from autopsy_crossed import (
    causes_values,
    clipped_values,
    interaction_values,
    margin_values,
    screening_figure,
    screening_values,
)
from autopsy_interventions import falls_values, replay_values
from autopsy_runs import (
    BROKEN,
    BY_CURVE,
    BY_TABLE,
    CURVED,
    CURVES,
    FALLS,
    FOLDER,
    IMAGES,
    NO_REWARD,
    ORDERS,
    REPLAYS,
    SAMPLED,
    SOUND,
    TRIALS,
    evaluations,
    start_of,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.intervals import mean_t, number
from twinrl.run import names
from twinrl.stability.divergence import Divergence, first_divergence

PAGE = Path(__file__).parent / "autopsy.md"
TEXT = FOLDER / "text.md"
NO_DIGITS = 0.5
"""Judge accuracy at the end below which a run's samples are no digits any more."""
HEALTHY = 0.95
"""Judge accuracy at the reward's start from which a run counts as an early success."""


# --- from tables to the page ------------------------------------------------------------------------------


def render(values: Mapping[str, str]) -> str:
    """The page, from the text and what :func:`values_of` makes of the committed tables."""
    return Template(TEXT.read_text()).substitute(values)


def values_of(trials: pd.DataFrame) -> dict[str, str]:
    """Every number and table of the page, by its name in the text."""
    made = trials.drop_duplicates(["config_hash", "seed"])  # studies share trials
    values = {"hours": f"{made.seconds.sum() / 3600:.0f}", "trials": str(len(made))}
    values |= {"search": search_table(trials)}
    values |= {study: regime_table(trials, study) for study in ("regime", "plateau")}
    values |= regime_values(trials, "regime") | {
        f"plateau_{name}": value for name, value in regime_values(trials, "plateau").items()
    }
    values |= (
        warning_values(trials)
        | suspects_values(trials)
        | renoise_values(trials)
        | dose_values(trials)
        | size_values(trials)
        | screening_values(trials)
        | interaction_values(trials)
        | margin_values(trials)
        | causes_values(trials)
        | clipped_values(trials)
        | carried_values(trials, "dit")
        | transformer_values(trials)
        | carried_values(trials, "mnist")
    )
    values |= recipe_values(trials) | sensitivity_values(trials) | told_values(trials)
    curves = pd.read_parquet(CURVES)
    values |= (
        {"definitions": definitions_table(curves)}
        | measuring_values(curves)
        | replay_values(pd.read_csv(REPLAYS), trials)
        | falls_values(pd.read_csv(FALLS))
    )
    return values | sampling_values(pd.read_csv(SAMPLED))


def told_values(trials: pd.DataFrame) -> dict[str, str]:
    """What the evaluation of the start has changed, and of which runs the tables cannot say whether they fell."""
    changed = trials[trials.told.isin((BY_CURVE, BY_TABLE))]
    lines = ["| study | arm | seed | before | now | told by |", "|---|---|--:|---|---|---|"]
    for row in changed.itertuples():
        back = ", and recovered" if row.recovered else ""
        now = f"fell by step {row.diverged_step:.0f}, from its start{back}" if row.diverged else "whole"
        before = "whole" if row.diverged else "fell"
        source = {BY_CURVE: "its curve", BY_TABLE: "two evaluations"}[row.told]
        lines.append(f"| {row.study} | {row.arm} | {row.seed} | {before} | {now} | {source} |")
    whole = trials[~trials.diverged & ~trials.study.isin(CURVED)].drop_duplicates(["config_hash", "seed"])
    unwell = whole[(whole.accuracy_at_start < WELL) & (whole.final_accuracy < WELL)]
    counts = unwell.groupby("study", sort=False).size()
    start = start_of()
    return {
        "told": "\n".join(lines),
        "told_unknown": ", ".join(f"{count} of {study}" for study, count in counts.items()),
        "start_quality": number(start[names.VAL_QUALITY]),
        "start_accuracy": number(start[names.val("accuracy", 1)], 2),
        "start_limit": number(1.5 * start[names.VAL_QUALITY] + 0.05),
    }


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


def regime_table(trials: pd.DataFrame, study: str) -> str:
    """One line for each arm of a study of the regime, over its seeds."""
    lines = [
        "| arm | seeds | fell apart | norm ≥ 100 × usual | largest norm ÷ usual, median (most) "
        "| Fréchet distance at the end, geometric mean | `lab_hps` at the end |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for arm, found in trials[trials.study == study].groupby("arm", sort=False):
        lines.append(
            f"| {arm} | {len(found)} | {share(found.diverged)} | {share(found.norm_ratio >= ORDERS)} "
            f"| {number(found.norm_ratio.median())} ({number(found.norm_ratio.max())}) "
            f"| {factor(mean_t(np.log(found.final_fd)), math.e, 3)} "
            f"| {mean_t(found.final_lab_hps)} |"
        )
    return "\n".join(lines)


def regime_values(trials: pd.DataFrame, study: str) -> dict[str, str]:
    """What the text says of the regime, by name."""
    regime = trials[trials.study == study].set_index(["arm", "seed"])
    with_reward, without = (regime.loc[f"reward={level} teacher=live"] for level in ("with", "without"))
    averaged = [regime.loc[f"reward={level} teacher=ema"] for level in ("with", "without")]
    early = with_reward[with_reward.accuracy_at_start >= HEALTHY]
    begun = with_reward[~before_reward(with_reward)]
    compared = {"early": early, "begun": begun}
    gain = (averaged[1].final_fd - averaged[0].final_fd).dropna()
    paired = (np.log10(with_reward.norm_ratio) - np.log10(without.norm_ratio)).dropna()
    first = (np.log(with_reward.latent_gradient_first) - np.log(averaged[0].latent_gradient_first)).dropna()
    reached = with_reward[with_reward.spike_step.notna() & with_reward.diverged]
    lag = reached.spike_step - reached.diverged_step
    return {
        "latent_first": factor(mean_t(first), math.e) if len(first) else "–",
        "live_with_broken": share(with_reward.diverged),
        "live_without_broken": share(without.diverged),
        "live_p": paired_p(with_reward.diverged, without.diverged),
        "ema_with_broken": share(averaged[0].diverged),
        "ema_without_broken": share(averaged[1].diverged),
        "ema_gain": str(mean_t(gain)),
        "ema_clip_gain": str(mean_t((averaged[0].final_lab_clip - averaged[1].final_lab_clip).dropna())),
        "ema_hps_gain": str(mean_t((averaged[0].final_lab_hps - averaged[1].final_lab_hps).dropna())),
        "n": str(len(with_reward)),
        "before": str(len(with_reward) - len(begun)),
        "norm_factor": factor(mean_t(paired), 10),
        "norm_reached": share(with_reward.norm_ratio >= ORDERS),
        "norm_reached_without": share(without.norm_ratio >= ORDERS),
        "norm_whole": number(median_of(with_reward.norm_ratio_whole), 2),
        "lag": f"{lag.median():.0f}",
        "lag_after": f"{int((lag > 0).sum())} of {len(lag)}",
        "onset": f"{with_reward.diverged_step.median() / with_reward.steps.iloc[0]:.2f}",
        "ended": share(with_reward.final_accuracy < NO_DIGITS),
        "ended_without": share(without.final_accuracy < NO_DIGITS),
        **{name: str(len(runs)) for name, runs in compared.items()},
        **{f"{name}_broken": share(runs.diverged) for name, runs in compared.items()},
        **{f"{name}_without_broken": share(without.loc[runs.index].diverged) for name, runs in compared.items()},
        "early_norm": f"{early.norm_max.max():,.0f}",
        "early_norm_without": number(without.loc[early.index].norm_max.max(), 2),
    }


def warning_values(trials: pd.DataFrame) -> dict[str, str]:
    """What the adversarial loss says ahead of a fall in the regime, and where it says so for nothing."""
    regime = trials[trials.study == "regime"].set_index(["arm", "seed"])
    published = regime.loc[BROKEN]
    rises = published.adversarial_rise
    whole = {name: regime.loc[arm] for name, arm in {"live": NO_REWARD, "ema": SOUND}.items()}
    whole["ema"] = pd.concat([whole["ema"], regime.loc["reward=without teacher=ema"]])
    whole = {name: runs[~runs.diverged] for name, runs in whole.items()}
    return {
        "warned": f"{int((rises < published.diverged_step).sum())} of {len(published)}",
        "warned_steps": f"{(published.diverged_step - rises)[rises < published.diverged_step].median():.0f}",
        "warned_total": f"{int((published.total_rise < published.diverged_step).sum())} of {len(published)}",
        **{
            f"false_{name}": f"{int(runs.adversarial_rise.notna().sum())} of {len(runs)}"
            for name, runs in whole.items()
        },
    }


DEFINITIONS = ((0.9, 2), (0.5, 2), (0.9, 1), (0.9, 3))
"""Floors of the judge's accuracy and bad evaluations in a row that make a fall; the first is the text's."""


def definitions_table(curves: pd.DataFrame) -> str:
    """The falls of the live teacher's runs under other definitions of a fall, from the committed evaluations."""
    lines = [
        "| accuracy below | evaluations in a row | with the reward | without | plateau: with | without |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for floor, in_a_row in DEFINITIONS:
        config = Divergence.Config(accuracy_floor=floor, evaluations=in_a_row, recall_floor=0)
        cells = []
        for study in ("regime", "plateau"):
            for arm in (BROKEN, NO_REWARD):
                runs = curves[(curves.study == study) & (curves.arm == arm)].groupby("seed")
                fell = [first_divergence(evaluations(run), config, 1, start_of(), True) is not None for _, run in runs]
                cells.append(f"{sum(fell)} of {len(fell)}")
        lines.append(f"| {floor} | {in_a_row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measuring_values(curves: pd.DataFrame) -> dict[str, str]:
    """What the published validation does in runs that are well: means over the seeds of the healthy arm with reward.

    ``end`` is the mean of the last 300 steps, as ``before`` is of the first.
    """
    well = curves[(curves.study == "regime") & (curves.arm == SOUND)].dropna(subset="objective")
    at = {
        "before": well[well.step <= 300].groupby("seed")[["objective", "fd"]].mean(),
        "peak": well[well.step == 600].set_index("seed")[["objective", "fd"]],
        "end": well[well.step > well.step.max() - 300].groupby("seed")[["objective", "fd"]].mean(),
    }
    rise = 100 * (at["peak"].objective / at["before"].objective - 1)
    later = 100 * (at["end"].objective / at["peak"].objective - 1)
    values = {"objective_rise": str(mean_t(rise)), "objective_later": str(mean_t(later))}
    for when, found in at.items():
        values |= {f"objective_{when}": f"{found.objective.mean():.2f}", f"fd_{when}": f"{found.fd.mean():.1f}"}
    return values


def sampling_values(sampled: pd.DataFrame) -> dict[str, str]:
    """What the sampling makes of healthy runs: a table, and the published sampling over the plain one, paired."""
    lines = [
        "| network evaluations | guidance | Fréchet distance | precision | accuracy | worst class, median (least) "
        "| with a plateau: distance | worst class |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    regime, plateau = (sampled[sampled.study == study] for study in ("regime", "plateau"))
    for (guidance, nfe), found in regime.groupby(["guidance", "nfe"]):
        other = plateau[(plateau.guidance == guidance) & (plateau.nfe == nfe)]
        lines.append(
            f"| {nfe} | {guidance:g} | {mean_t(found.fd)} | {mean_t(found.precision)} | {found.accuracy.mean():.3f} "
            f"| {_worst(found)} | {mean_t(other.fd)} | {_worst(other)} |"
        )
    return {
        "samplings": "\n".join(lines),
        "sampled_runs": str(regime.seed.nunique()),
        "guided_ratio": _guided(regime),
        "guided_ratio_plateau": _guided(plateau),
    }


def _worst(sampled: pd.DataFrame) -> str:
    return f"{sampled.accuracy_worst_class.median():.2f} ({sampled.accuracy_worst_class.min():.2f})"


def _guided(sampled: pd.DataFrame) -> str:
    """Factor of the Fréchet distance at 8 evaluations by guidance 4, paired by run."""
    by_seed = sampled.set_index(["guidance", "nfe", "seed"]).sort_index()
    return factor(mean_t(np.log(by_seed.fd.loc[4.0, 8]) - np.log(by_seed.fd.loc[0.0, 8])), math.e)


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


def suspects_figure(trials: pd.DataFrame) -> Figure:
    """When each run of each single change fell apart; a ring at the end is a run that stayed whole."""
    arms = single_changes(trials)
    figure = Figure(figsize=(8.4, 0.27 * len(arms) + 1.0), layout="constrained")
    axes = figure.subplots()
    for row, (_, found) in enumerate(reversed(arms)):
        shift = np.linspace(-0.22, 0.22, len(found))
        found = found.sort_values("diverged_step").assign(shift=shift)
        fell, whole = found[found.diverged], found[~found.diverged]
        axes.axhline(row, color="0.92", lw=0.8, zorder=0)
        axes.plot(fell.diverged_step, row + fell["shift"], "o", color=LIVE, ms=4, alpha=0.8)
        axes.plot(whole.steps, row + whole["shift"], "o", color=EMA, ms=4, mfc="white", clip_on=False)
        axes.text(
            1.02, row, f"{len(fell)} of {len(found)}", transform=axes.get_yaxis_transform(), fontsize=8, va="center"
        )
    axes.set_yticks(range(len(arms)), [name for name, _ in reversed(arms)], fontsize=8)
    _mark([axes])
    axes.set_xlim(0, 2000)
    axes.set_ylim(-0.6, len(arms) - 0.3)
    axes.set_xlabel("step at which a run fell apart (orange); rings: whole to the end", fontsize=9)
    axes.text(1.02, len(arms) - 0.3, "fell apart", transform=axes.get_yaxis_transform(), fontsize=8, va="bottom")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=8, left=False)
    return figure


SHARES = {
    "as published, on the lab": {
        "live teacher, reward": "live_with_broken",
        "live teacher, no reward": "live_without_broken",
        "EMA teacher, reward": "ema_with_broken",
        "EMA teacher, no reward": "ema_without_broken",
    },
    "live teacher, another gradient of the reward": {
        "round-trip error alone": "dose_residual",
        "preference alone, as long": "dose_large_eta",
        "from E(D(z)), else as published": "decoded_broken",
    },
    "in a recipe that is whole": {
        "live teacher and published reward": "clipped_live_published",
        "live teacher": "clipped_live_corrected",
        "published reward": "clipped_ema_published",
        "neither": "clipped_base",
    },
    "the recommended recipe": {
        "at the rate that breaks published": "recipe_slow_broken",
        "at three times that rate": "recipe_fast_broken",
    },
}
"""Group → row of the shares' figure → name of the share in the text."""
SHARE = re.compile(r"(\d+) of (\d+) \[([\d.]+), ([\d.]+)\]")


def shares_figure(values: Mapping[str, str]) -> Figure:
    """Share of the runs that fell apart in each arm of the summary, with its interval: what the text says in numbers.

    Arguments:
        values: of the text, as :func:`values_of` makes them.
    """
    lines = sum(len(rows) for rows in SHARES.values()) + len(SHARES)
    figure = Figure(figsize=(8.4, 0.27 * lines + 0.6), layout="constrained")
    axes = figure.subplots()
    row, labels = 0, {}
    for group, rows in SHARES.items():
        labels[row] = group
        for label, name in rows.items():
            row -= 1
            labels[row] = label
            _draw_share(axes, row, values[name])
        row -= 1
    axes.set_yticks(list(labels), list(labels.values()), fontsize=8)
    for text, label in zip(axes.get_yticklabels(), labels.values(), strict=True):
        text.set_fontweight("bold" if label in SHARES else "normal")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(row + 0.4, 0.6)
    axes.set_xlabel("share of runs that fell apart", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=8, left=False)
    return figure


def _draw_share(axes: Axes, row: int, told: str) -> None:
    found = SHARE.fullmatch(told)
    assert found, told
    fell, runs = int(found[1]), int(found[2])
    colour = LIVE if fell / runs >= 0.5 else EMA
    axes.plot([float(found[3]), float(found[4])], [row, row], color=colour, lw=1.6)
    axes.plot(fell / runs, row, "o", color=colour, ms=5, clip_on=False)
    axes.text(1.02, row, f"{fell} of {runs}", transform=axes.get_yaxis_transform(), fontsize=8, va="center")


def main() -> None:
    """See the module."""
    trials = pd.read_csv(TRIALS)
    values = values_of(trials)
    shares_figure(values).savefig(IMAGES / "autopsy-shares.png", dpi=150)
    suspects_figure(trials).savefig(IMAGES / "autopsy-suspects.png", dpi=150)
    screening_figure(trials).savefig(IMAGES / "autopsy-screening.png", dpi=150)
    central_figure(pd.read_parquet(CURVES)).savefig(IMAGES / "autopsy.png", dpi=150)
    PAGE.write_text(render(values))


if __name__ == "__main__":
    main()
