"""What single changes do, from the autopsy's table of trials: of the published recipe, and of the recommended one."""

import math

import numpy as np
import pandas as pd
from autopsy_runs import BROKEN, NO_REWARD, SOUND
from scipy.stats import binomtest

from analysis.intervals import Interval, clopper_pearson, mean_t, number


def share(yes: pd.Series) -> str:
    """k of n with its exact interval."""
    found = clopper_pearson(int(yes.sum()), len(yes))
    return f"{int(yes.sum())} of {len(yes)} [{found.low:.2f}, {found.high:.2f}]"


def paired_p(a: pd.Series, b: pd.Series) -> str:
    """p that two arms fall apart alike: the exact sign test on the seeds of which only one does (McNemar)."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return f"{binomtest(only_a, only_a + only_b).pvalue:.2g}" if only_a + only_b else "1"


def factor(found: Interval, base: float, digits: int = 2) -> str:
    """An interval of logarithms as one of factors."""
    ends = [number(base**value, digits) for value in (found.estimate, found.low, found.high)]
    return f"{ends[0]} [{ends[1]}, {ends[2]}]"


# --- one suspect at a time ---------------------------------------------------------------------------------

COLUMNS = (
    "fell apart | of these, before the reward | at step, median | largest norm ÷ usual until then, median (most) "
    "| of those that stayed whole: lowest accuracy, median | Fréchet distance, median"
)
RULE = "--:|--:|--:|--:|--:|--:|"


def arm_line(found: pd.DataFrame) -> str:
    """The cells of ``COLUMNS`` for the runs of an arm."""
    fell, whole = found[found.diverged], found[~found.diverged]
    early = int(before_reward(fell).sum())
    norms = f"{number(median_of(found.norm_ratio_whole))} ({number(found.norm_ratio_whole.max())})"
    least = f"{number(median_of(whole.accuracy_least), 2)} | {number(median_of(whole.final_fd), 2)}"
    return f"{share(found.diverged)} | {early or '–'} | {number(median_of(fell.diverged_step), 4)} | {norms} | {least}"


def before_reward(found: pd.DataFrame) -> pd.Series:
    """Which runs' fall was confirmed before the reward came on, at a fifth of the run: it takes two evaluations."""
    return found.diverged_step < 0.2 * found.steps


def median_of(values: pd.Series) -> float:
    """The median of what is known; nan where nothing is."""
    return float(values.median()) if values.notna().any() else math.nan


CURE, NONE, OPEN = "yes", "no", "not settled"
GUESSES = ("sigmoid start", "own clip", "lr cut on spikes", "first three", "smaller eta", "more rows")
"""Arms of autopsy-suspects that the run's author proposed."""
FRESH = 5
"""Seeds from this one on were not there when the finalists were chosen."""


def suspects_values(trials: pd.DataFrame) -> dict[str, str]:
    """Each single change of the published recipe beside the published arm, with the verdict that was declared."""
    (_, published), *arms = single_changes(trials)
    bound = clopper_pearson(int(published.diverged.sum()), len(published)).low
    lines = [f"| alone | whose guess | {COLUMNS} | a cure |", f"|---|---|{RULE}---|"]
    lines.append(f"| `published` | | {arm_line(published)} | – |")
    for name, found in arms:
        whose = "the author's" if name in GUESSES else ""
        lines.append(f"| {name} | {whose} | {arm_line(found)} | {verdict(found, bound)} |")
    cut = dict(arms)["lr cut on spikes"]
    fresh = trials[(trials.study == "finalists") & (trials.seed >= FRESH)].groupby("arm").diverged
    shrunk = trials[trials.study == "regime"].set_index(["arm", "seed"]).latent_gradient_first.loc[BROKEN]
    decoded = dict(arms)["decoded baseline"].set_index("seed").latent_gradient_first
    return {
        "suspects": "\n".join(lines),
        "suspect_seeds": str(min(len(found) for _, found in arms)),
        "finalist_seeds": str(trials[trials.study == "finalists"].seed.nunique()),
        "fresh": ", ".join(f"{name} {int(fell.sum())} of {len(fell)}" for name, fell in fresh),
        "shrunk": number((shrunk / decoded).dropna().median(), 2),
        "decoded_broken": share(dict(arms)["decoded baseline"].diverged),
        "own_clip_broken": share(dict(arms)["own clip"].diverged),
        "cut_broken": share(dict(arms)["lr cut on spikes"].diverged),
        "eta_broken": share(dict(arms)["smaller eta"].diverged),
        "cut_at_start": number(100 * (cut.lr_at_start / cut.lr).median(), 2),
        "cut_end": number(100 * (cut.lr_end / cut.lr).median(), 2),
        "cures": ", ".join(name for name, found in arms if verdict(found, bound) == CURE),
    }


def verdict(found: pd.DataFrame, bound: float) -> str:
    """A cure: the share's upper end is below the published share's lower end. No cure: half and more fell apart."""
    if clopper_pearson(int(found.diverged.sum()), len(found)).high < bound:
        return CURE
    return NONE if found.diverged.mean() >= 0.5 else OPEN


def single_changes(trials: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """`published`, then each single change of it with its runs, those that keep the most runs whole first.

    An arm that is a finalist has the seeds of that study as well: its configuration is the same.
    """
    regime = trials[trials.study == "regime"].groupby("arm")
    chosen = trials[trials.study == "suspects"]
    arms = [("EMA teacher", regime.get_group(SOUND)), ("no reward", regime.get_group(NO_REWARD))]
    arms += list(chosen.groupby("arm", sort=False))
    arms.sort(key=lambda arm: (arm[1].diverged.mean(), arm[1].norm_ratio.median()))
    return [("published", regime.get_group(BROKEN)), *arms]


DOSES = {
    "residual": "residual alone",
    "from_z": "from z at half the norm",
    "from_decoded": "from E(D(z)) at half the norm",
    "large_eta": "from E(D(z)) with eta 100",
    "exact_eta": "exact from E(D(z)) with eta 1000",
}
"""Name in the text → arm of autopsy-dose."""


def dose_values(trials: pd.DataFrame) -> dict[str, str]:
    """The published latent gradient's residual and its preference, each alone and at comparable sizes."""
    chosen = trials[trials.study == "dose"]
    regime = trials[trials.study == "regime"].groupby("arm")
    arms = {
        "`published`": regime.get_group(BROKEN),
        **{arm: chosen[chosen.arm == arm] for arm in DOSES.values()},
        "decoded baseline": trials[(trials.study == "suspects") & (trials.arm == "decoded baseline")],
        "no reward": regime.get_group(NO_REWARD),
    }
    lines = [f"| reward's gradient | its norm in latents, first 10 and 100 steps | {COLUMNS} |", f"|---|--:|{RULE}"]
    for name, found in arms.items():
        sizes = [number(median_of(found[f"latent_gradient_{when}"]), 2) for when in ("begin", "first")]
        lines.append(f"| {name} | {'–' if name == 'no reward' else ', '.join(sizes)} | {arm_line(found)} |")
    shares = {f"dose_{name}": share(chosen[chosen.arm == arm].diverged) for name, arm in DOSES.items()}
    from_z, decoded = (median_of(arms[DOSES[name]].latent_gradient_begin) for name in ("from_z", "from_decoded"))
    return {
        "dose": "\n".join(lines),
        "dose_seeds": str(chosen.seed.nunique()),
        "dose_shorter": number(from_z / decoded, 2),
    } | shares


def renoise_values(trials: pd.DataFrame) -> dict[str, str]:
    """The claim that dynamic renoise steadies training before the reward starts: uniform times instead, by seed."""
    before = trials[(trials.study == "regime") & (trials.arm == BROKEN)].set_index("seed")
    uniform = trials[(trials.study == "suspects") & (trials.arm == "uniform renoise")].set_index("seed")
    shaped = before.loc[uniform.index]
    ratios = {name: np.log(uniform[f"early_{name}_noise"] / shaped[f"early_{name}_noise"]) for name in ("norm", "loss")}
    return {
        "uniform_norm_noise": factor(mean_t(ratios["norm"]), math.e, 3),
        "uniform_loss_noise": factor(mean_t(ratios["loss"]), math.e, 3),
        "uniform_early": f"{int(before_reward(uniform).sum())} of {len(uniform)}",
        "shaped_early": f"{int(before_reward(shaped).sum())} of {len(shaped)}",
        "uniform_spikes": f"{int(uniform.early_spikes.sum())}",
        "shaped_spikes": f"{int(shaped.early_spikes.sum())}",
        "shaped_spikes_most": f"{int(shaped.early_spikes.max())}",
        "uniform_usual": factor(mean_t(np.log(uniform.usual_norm / shaped.usual_norm)), math.e, 3),
        "shaped_spiky": f"{int((shaped.early_spikes > 0).sum())} of {len(shaped)} runs",
        "renoise_seeds": str(len(uniform)),
    }


def size_values(trials: pd.DataFrame) -> dict[str, str]:
    """Twice the steps and a quarter of the images, beside the published arm."""
    published = trials[(trials.study == "regime") & (trials.arm == BROKEN)].set_index("seed")
    arms = trials[trials.study == "size"].groupby("arm")
    longer, fewer = (arms.get_group(arm).set_index("seed") for arm in ("twice the steps", "a quarter of the images"))
    later = (fewer.diverged_step - published.diverged_step).dropna()
    return {
        "size_seeds": str(fewer.index.nunique()),
        "longer_broken": share(longer.diverged),
        "longer_before": str(int(before_reward(longer).sum())),
        "fewer_broken": share(fewer.diverged),
        "fewer_later": str(mean_t(later)),
    }


def transformer_values(trials: pd.DataFrame) -> dict[str, str]:
    """The transformer's live student between the rates of its search, with the published reward and without it; and how
    high norms rose under each change in the seeds that are no fall without the reward.
    """
    window, changes = (trials[trials.study == study] for study in ("dit-window", "dit"))
    lines = [f"| learning rate | reward | seeds | {COLUMNS} |", f"|--:|---|--:|{RULE}"]
    for (rate, reward), found in window.groupby(["lr", "level.reward"]):
        lines.append(f"| {rate:.1e} | {reward} | {len(found)} | {arm_line(found)} |")
    without = changes[changes.arm == "no reward"]
    living = changes[changes.seed.isin(without.seed[~without.diverged])]
    ratios = {arm.replace(" ", "_"): number(found.norm_ratio.max(), 2) for arm, found in living.groupby("arm")}
    return {
        "dit_window": "\n".join(lines),
        "dit_lost": f"{int((without.accuracy_at_start < WELL).sum())} of {len(without)}",
        **{f"dit_norm_{arm}": ratio for arm, ratio in ratios.items()},
    }


def carried_values(trials: pd.DataFrame, where: str) -> dict[str, str]:
    """On other networks or data: the published recipe at each learning rate, and the decisive changes at one."""
    rates, changes = (trials[trials.study == study] for study in (f"{where}-rates", where))
    lines = [f"| learning rate | {COLUMNS} |", f"|--:|{RULE}"]
    lines += [f"| {rate:.0e} | {arm_line(found)} |" for rate, found in rates.groupby("lr")]
    arms = [f"| alone | {COLUMNS} |", f"|---|{RULE}"]
    arms += [f"| {name} | {arm_line(found)} |" for name, found in changes.groupby("arm", sort=False)]
    averaged, both = changes.arm == "EMA teacher", pd.concat([rates, changes])
    return {
        f"{where}_rates": "\n".join(lines),
        where: "\n".join(arms),
        f"{where}_ema_broken": share(changes.diverged[averaged]),
        f"{where}_seeds": str(changes.seed.nunique()),
        f"{where}_norm": number(both.norm_ratio.max(), 2),
    }


# --- the recipe -------------------------------------------------------------------------------------------


SPIKY = 4.0
"""Times the usual norm that a run of the recipe is called unsteady from."""
CONTROLS = 10
"""Seeds below this one are the declared controls; later ones were run to see why a run with the reward ended unwell."""
WELL = 0.9
"""Judge accuracy at the last evaluation below which a run is not well: one evaluation confirms no divergence."""


def recipe_values(trials: pd.DataFrame) -> dict[str, str]:
    """Of the recommended recipe, and of its first version without a clip of the rectify term: how many runs ended well
    at each rate, the judge against the teacher, the price.
    """
    recipe, first = (trials[trials.study == study] for study in ("recommended", "unclipped"))
    without = trials[trials.study == "unclipped-control"]
    slow, fast = (recipe[recipe.lr == rate] for rate in sorted(recipe.lr.unique()))
    first_slow, first_fast = (first[first.lr == rate] for rate in sorted(first.lr.unique()))
    control = trials[trials.study == "control"]
    plain = control[control.lr == control.lr.min()]
    paired = slow.set_index("seed").join(first_slow.set_index("seed"), rsuffix="_first")
    well = paired[(paired.final_accuracy >= WELL) & (paired.final_accuracy_first >= WELL)]
    return {
        "recipe": recipe_table(recipe, control),
        "first_recipe": recipe_table(first, without[without.seed < CONTROLS]),
        "recipe_slow_broken": share(slow.diverged),
        "recipe_fast_broken": share(fast.diverged),
        "recipe_well": _well(recipe),
        "first_broken": share(first.diverged),
        "first_well": _well(first),
        "first_unwell": _ends(first[first.final_accuracy < WELL]),
        "first_control_unwell": _ends(without[without.seed >= CONTROLS]),
        "recipe_slow_spiky": _spiky(slow),
        "recipe_fast_spiky": _spiky(fast),
        "first_slow_spiky": _spiky(first_slow),
        "first_fast_spiky": _spiky(first_fast),
        "clip_fd": factor(mean_t(np.log(well.test1_fd / well.test1_fd_first)), math.e, 3),
        "clip_norm": factor(mean_t(np.log(paired.norm_ratio / paired.norm_ratio_first)), math.e, 3),
        "control_lead": str(mean_t(plain.test1_judge - plain.teacher_judge)),
        "student_fd": str(mean_t(slow.test1_fd)),
        "student_recall": str(mean_t(slow.test1_recall)),
        "teacher_fd": number(slow.teacher_fd.mean()),
        "teacher_recall": number(slow.teacher_recall.mean()),
        "recipe_seeds": str(slow.seed.nunique()),
        "control_seeds": str(plain.seed.nunique()),
    }


def recipe_table(recipe: pd.DataFrame, control: pd.DataFrame) -> str:
    """One line for each rate and number of evaluations; the last columns are paired with runs without the reward."""
    lines = [
        "| learning rate | seeds | fell apart | unwell at the end | largest norm ÷ usual (most) | NFE "
        "| held-out judge − teacher's "
        "| judge, with − without reward | Fréchet distance × | recall, with − without | no worse |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for rate, runs in recipe.groupby("lr"):
        plain = control[control.lr == rate].set_index("seed")
        paired = runs.set_index("seed")
        unwell = int((runs.final_accuracy < WELL).sum())
        first = f"{rate:.0e} | {len(runs)} | {share(runs.diverged)} | {unwell} | {runs.norm_ratio.max():.2g}"
        for nfe in (1, 2):
            metric = {name: f"test{nfe}_{name}" for name in ("judge", "fd", "recall")}
            above = paired[metric["judge"]] - paired.teacher_judge
            judge, recall = ((paired[metric[name]] - plain[metric[name]]).dropna() for name in ("judge", "recall"))
            distance = np.log(paired[metric["fd"]] / plain[metric["fd"]]).dropna()
            cells = ["–"] * 4
            if len(distance) > 1:
                worse = "yes" if _no_worse(mean_t(distance), mean_t(recall)) else "not shown"
                cells = [str(mean_t(judge)), factor(mean_t(distance), math.e, 3), str(mean_t(recall)), worse]
            lines.append(f"| {first if nfe == 1 else ' | | | | '} | {nfe} | {mean_t(above)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _well(runs: pd.DataFrame) -> str:
    return f"{int((runs.final_accuracy >= WELL).sum())} of {len(runs)}"


def _spiky(runs: pd.DataFrame) -> str:
    return f"{int((runs.norm_ratio >= SPIKY).sum())} of {len(runs)}"


def _ends(runs: pd.DataFrame) -> str:
    return "; ".join(
        f"seed {row.seed} at {row.lr:.0e}, accuracy {row.final_accuracy:.2f}, Fréchet distance {row.final_fd:.0f}"
        for row in runs.itertuples()
    )


def _no_worse(distance: Interval, recall: Interval) -> bool:
    """As declared in the study's file: within 5 % of the Fréchet distance (here its logarithm) and 0.02 of recall."""
    return distance.high <= math.log(1.05) and recall.low >= -0.02


HARMLESS = 1.1
"""The sensitivity study's declared bound of the Fréchet distance's factor."""


def sensitivity_values(trials: pd.DataFrame) -> dict[str, str]:
    """The recipe with one setting changed, paired by seed with the recipe itself at the same rate."""
    chosen = trials[trials.study == "sensitivity"]
    at_rate = trials[trials.lr == chosen.lr.iloc[0]]
    recipe = at_rate[at_rate.study == "recommended"].set_index("seed")
    unclipped = at_rate[(at_rate.study == "unclipped") & at_rate.seed.isin(chosen.seed)]
    compared = pd.concat([chosen, unclipped.assign(arm="rectify not clipped")])
    lines = [
        "| changed | fell apart | largest norm ÷ usual (most) | held-out judge − teacher's, 1 NFE "
        "| judge − the recipe's | Fréchet distance ×, 1 NFE | 2 NFE | recall − the recipe's, 1 NFE | harmless |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for name, found in compared.groupby("arm", sort=False):
        runs = found.set_index("seed")
        base = recipe.loc[runs.index]
        ratios = [np.log(runs[f"test{nfe}_fd"] / base[f"test{nfe}_fd"]) for nfe in (1, 2)]
        distance = [factor(mean_t(ratio), math.e, 3) for ratio in ratios]
        harmless = not found.diverged.any() and mean_t(ratios[0]).high < math.log(HARMLESS)
        lines.append(
            f"| {name} | {share(found.diverged)} | {number(found.norm_ratio.max(), 2)} "
            f"| {mean_t(runs.test1_judge - runs.teacher_judge)} | {mean_t(runs.test1_judge - base.test1_judge)} "
            f"| {distance[0]} | {distance[1]} | {mean_t(runs.test1_recall - base.test1_recall)} "
            f"| {'yes' if harmless else 'not shown'} |"
        )
    return {
        "sensitivity": "\n".join(lines),
        "sensitivity_seeds": str(chosen.seed.nunique()),
        "sensitivity_broken": share(chosen.diverged),
    }
