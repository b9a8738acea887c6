"""What the interventions on recorded runs show, from the tables that ``papers/autopsy_replays.py`` makes."""

import math

import numpy as np
import pandas as pd
from autopsy_arms import factor, median_of, share
from autopsy_replays import CHANGES, INTERVENTIONS, PLACEBOS

from analysis.intervals import mean_t, number
from twinrl.run import names


def replay_values(heights: pd.DataFrame, trials: pd.DataFrame) -> dict[str, str]:
    """How high the series of large spikes still rise under each intervention, beside placebos.

    Of those whose unchanged replay repeats the log; the reward's own series are left out, which vanish with it by
    definition.
    """
    others = heights[heights.exact & (heights.series != names.grad("reward", "norm_raw"))]
    compared = others.dropna(subset=list(PLACEBOS))
    fell = trials.set_index(["study", "arm", "seed"]).diverged_step
    of_run = compared.set_index(["study", "arm", "seed"]).index
    early = compared[compared.step.to_numpy() <= fell.reindex(of_run).to_numpy()]
    above = compared[[*INTERVENTIONS, "unchanged"]].div(compared.usual, axis=0).median()
    lines = [
        "| changed for these steps | spikes that keep at most a fifth | height ÷ usual, median | height ÷ placebos' "
        "| of these, before the run fell |",
        "|---|--:|--:|--:|--:|",
        f"| nothing | – | {number(above.unchanged)} | {against(compared, 'unchanged')} "
        f"| {against(early, 'unchanged')} |",
    ]
    for name, change in INTERVENTIONS.items():
        shown = f"`{' '.join(change)}`" + (" (placebo)" if name in PLACEBOS else "")
        beside = ["–"] * 2 if name in PLACEBOS else [against(found, name) for found in (compared, early)]
        lines.append(f"| {shown} | {gone(compared, name)} | {number(above[name])} | {' | '.join(beside)} |")
    return {
        "replays": "\n".join(lines),
        "replay_spikes": str(len(compared)),
        "replay_runs": str(compared.groupby(["study", "arm", "seed"]).ngroups),
        "replay_early": str(len(early)),
        "replay_early_runs": str(early.groupby(["study", "arm", "seed"]).ngroups),
        "replay_placebo": " and ".join(gone(compared, name) for name in PLACEBOS),
        **{f"replay_{name}": against(compared, name) for name in INTERVENTIONS if name not in PLACEBOS},
    }


def gone(heights: pd.DataFrame, intervention: str) -> str:
    """The share of spikes that keep at most a fifth of their height."""
    return share(heights[intervention] <= heights.unchanged / 5)


def against(heights: pd.DataFrame, intervention: str) -> str:
    """Factor of the height under an intervention over that under the placebos: mean over runs of their spikes' mean."""
    placebos = np.log(heights[list(PLACEBOS)]).mean(axis=1)
    by_run = (np.log(heights[intervention]) - placebos).groupby([heights.study, heights.arm, heights.seed]).mean()
    return factor(mean_t(by_run), math.e)


def falls_values(falls: pd.DataFrame) -> dict[str, str]:
    """Whether runs with an EMA teacher that fall apart would have lived with something changed shortly before."""
    falls = falls[falls.exact]
    lines = ["| changed from there on | fell apart | lowest accuracy, median (least) | largest norm, median |"]
    lines.append("|---|--:|--:|--:|")
    found, span = dict(iter(falls.groupby("change"))), falls.to - falls["from"]
    for name, change in {"nothing": [], **CHANGES}.items():
        runs = found[name]
        shown = "nothing" if not change else f"`{' '.join(change)}`" + (" (placebo)" if name in PLACEBOS else "")
        least = f"{median_of(runs.accuracy):.2f} ({runs.accuracy.min():.2f})"
        lines.append(f"| {shown} | {share(runs.fell.notna())} | {least} | {number(median_of(runs.norm), 2)} |")
    return {
        "falls": "\n".join(lines),
        "falls_runs": str(len(found["nothing"])),
        "falls_horizon": " to ".join(str(ends) for ends in span.agg(["min", "max"])),
        **{f"falls_{name}": f"{int(runs.fell.notna().sum())} of {len(runs)}" for name, runs in found.items()},
    }
