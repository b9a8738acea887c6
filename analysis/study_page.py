"""The page about a study: ranking, divergence, factors, what the reward cost, samples side by side."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis import margins, plots
from analysis.effects import Effect, main_effects, odds_effects
from analysis.frames import Run, Study, higher_is_better
from analysis.intervals import Interval, clopper_pearson, fewest_seeds, number
from analysis.leaderboard import (
    PAIRED_FROM,
    Line,
    TooFewSeedsError,
    collapsed_prompts,
    leaderboard,
    per_prompt,
    values_of,
)
from analysis.ledger import ENDED
from analysis.mlflow_store import mlflow_links
from analysis.page import Block, Gallery, Heading, Links, Page, Picture, Table, Text, percent
from analysis.survival import (
    Times,
    hazard_ratio,
    log_rank,
    restricted_mean,
    restricted_mean_difference,
    times_of,
)
from twinrl.errors import InputError
from twinrl.tracking import names

if TYPE_CHECKING:
    import pandas as pd

REWARDS = ("reward/", "val/score/", "val/held_out_score/")
LR = "optim.lr"
GRIDS = ("final-1nfe.png", "step-*.png", "*.png")


def build(
    study: Study, figures: Path, metric: str | None, effect: float, interactions: Sequence[tuple[str, str]]
) -> Page:
    """The page; figures are written into ``figures``.

    Raises:
        InputError: one arm only, or the metric was never logged.
    """
    metric = metric or study.metric or names.VAL_QUALITY
    if len(study.arms) < 2:
        raise InputError(
            "a study compares arms", got=f"one arm, {study.arms[0]}", expected="two or more",
            fix="analyze one of its run directories instead",
        )  # fmt: skip
    page = Page(f"Study {study.name}")
    ranking = _ranking(study, metric, effect, figures)
    survival = _survival(study, figures)
    page.add(*_summary(study, metric, ranking[0]), *ranking[1], *survival)
    page.add(*_factors(study, metric, interactions, figures), *_critical(study), *_reward(study, figures))
    page.add(*_prompts(study, figures), *_cost(study), *_samples(study), *_links(study))
    return page


def _summary(study: Study, metric: str, lines: Sequence[Line]) -> list[Block]:
    """What a reader in a hurry wants to know."""
    trials = study.trials
    seeds = trials.groupby("arm")["seed"].nunique()
    span = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    text = f"{len(study.arms)} arms, {span} seed{'s' * (span != '1')} an arm, {trials['planned'].max():,} steps; "
    text += f"base: {study.base}. "
    text += f"{int(trials['diverged'].sum())} of {len(trials)} runs diverged. "
    better = [line.arm for line in lines if line.p_holm < 0.05 and line.better and line.better.estimate > 0.5]
    worse = [line.arm for line in lines if line.p_holm < 0.05 and line.better and line.better.estimate < 0.5]
    if lines:
        text += f"By {metric}, better than the base at 5 % family-wise: {', '.join(better) or 'none'}; "
        text += f"worse: {', '.join(worse) or 'none'}."
    question: list[Block] = [Text(study.question)] if study.question else []
    left = trials[~trials["status"].isin(ENDED)]["status"].value_counts()
    note: list[Block] = []
    if len(left):
        counted = ", ".join(f"{count} {status}" for status, count in left.items())
        note = [Text(f"Not ranked, but counted as watched until their last step: {counted}.", note=True)]
    return [*question, Text(text), *note]


# --- ranking ----------------------------------------------------------------------------------------------


def _ranking(study: Study, metric: str, effect: float, figures: Path) -> tuple[list[Line], list[Block]]:
    try:
        lines = leaderboard(study, metric, effect)
    except TooFewSeedsError as error:
        return [], [Heading("Ranking"), Text(f"There is no ranking: {error}.")]
    direction = "higher" if higher_is_better(metric) else "lower"
    values = {line.arm: values_of(study.arm(line.arm), metric) for line in lines}
    figure = plots.save(plots.arms(lines, values, metric, direction), figures / "leaderboard.svg")
    blocks: list[Block] = [Heading(f"Ranking by {metric}"), Table(_ranking_table(lines, study.base)), Picture(figure)]
    return lines, [*blocks, *_too_few(study), Text(RANKING_NOTE, note=True)]


def _too_few(study: Study) -> list[Block]:
    """A warning where no difference, however large, could pass the test."""
    base = set(study.arm(study.base)["seed"])
    common = min(len(base & set(study.arm(arm)["seed"])) for arm in study.arms)
    needed = fewest_seeds(len(study.arms) - 1)
    if not PAIRED_FROM <= common < needed:
        return []
    text = f"With {common} common seeds no difference can pass Wilcoxon's test in {len(study.arms) - 1} comparisons"
    return [Text(f"{text}; {needed} seeds could. The intervals say what is known.")]


RANKING_NOTE = (
    "Interquartile mean with a calibrated trimmed-t interval. A run that diverged before its end counts as worse than "
    "all others. P(better): chance that a run beats the base's run of the same seed (mid-P interval; Wilcoxon's "
    "signed ranks), or over all pairs where fewer than 5 seeds are common. Holm's correction over the arms."
)


def _ranking_table(lines: Sequence[Line], base: str) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(
        {
            "arm": line.arm + (" (base)" if line.arm == base != "base" else ""),
            "n": line.n,
            "interquartile mean [95 %]": line.interval,
            "P(better) [95 %]": line.better,
            "mean difference by seed [95 %]": line.difference,
            "p": None if math.isnan(line.p) else line.p,
            "p (Holm)": None if math.isnan(line.p_holm) else line.p_holm,
            "diverged": line.diverged,
        }
        for line in lines
    )


# --- divergence -------------------------------------------------------------------------------------------


def _survival(study: Study, figures: Path) -> list[Block]:
    arms = {arm: times_of(study.arm(arm)) for arm in study.arms}
    horizon = float(study.trials["planned"].max())
    table = survival_table(arms, study.base, horizon)
    blocks: list[Block] = [Heading("Time to divergence"), Text(_survival_text(arms)), Table(table)]
    if any(times.events for times in arms.values()):
        curves = plots.save(plots.survival_curves(arms, horizon), figures / "survival.svg")
        ratios = {name: hazard_ratio(t, arms[study.base]) for name, t in arms.items() if name != study.base}
        forest = plots.forest(ratios, f"hazard ratio against {study.base}", reference=1.0, log_scale=True)
        blocks += [Picture(curves), Picture(plots.save(forest, figures / "hazard-ratios.svg"))]
        if len(arms) > plots.MOST_ARMS:
            blocks.append(Text(f"The curves show the first {plots.MOST_ARMS} arms.", note=True))
    if (study.trials["status"] == "pruned").any():
        blocks.append(Text("Runs were pruned for bad quality: that is no independent censoring, and curves flatter."))
    return [*blocks, Text(SURVIVAL_NOTE, note=True)]


SURVIVAL_NOTE = (
    "Share diverged: Clopper–Pearson. Hazard ratio: Firth's penalised likelihood with its profile interval, finite "
    "also where an arm has no or only events; – where nothing diverged. Mean steps without divergence: area under the "
    "Kaplan–Meier curve up to the planned end. p: log-rank against the base, uncorrected."
)


def _survival_text(arms: dict[str, Times]) -> str:
    """The test over all arms, and what no event at all means."""
    p = log_rank(arms)
    text = "No run diverged." if math.isnan(p) else f"Log-rank test over all arms: p = {number(p)}."
    spared: dict[int, list[str]] = {}
    for name, times in arms.items():
        if times.events == 0:
            spared.setdefault(times.n, []).append(name)
    for n, quiet in spared.items():
        bound = percent(clopper_pearson(0, n).high)
        text += f" 0 of {n} diverged in {', '.join(quiet)}, which excludes only rates above {bound} (95 %)."
    return text


def survival_table(arms: dict[str, Times], base: str, horizon: float) -> "pd.DataFrame":
    """Share diverged, hazard ratio, restricted mean and its difference to the base, log-rank p; one row an arm."""
    import pandas as pd

    def line(name: str, times: Times) -> dict[str, object]:
        other = arms[base] if name != base else None
        p = log_rank({base: other, name: times}) if other else math.nan
        return {
            "arm": name,
            "diverged": f"{times.events} of {times.n}",
            "share [95 %]": times.share,
            "hazard ratio [95 %]": hazard_ratio(times, other) if other else None,
            "steps without divergence [95 %]": restricted_mean(times, horizon),
            "difference [95 %]": restricted_mean_difference(times, other, horizon) if other else None,
            "p": None if math.isnan(p) else p,
        }

    return pd.DataFrame(line(name, times) for name, times in arms.items())


# --- factors ----------------------------------------------------------------------------------------------


def _factors(study: Study, metric: str, interactions: Sequence[tuple[str, str]], figures: Path) -> list[Block]:
    if not study.factors:
        return []
    blocks: list[Block] = [Heading("Factors")]
    ended = study.trials[study.trials["status"].isin(ENDED)].copy()
    reference = study.arm(study.base).iloc[0][list(study.factors)].to_dict()
    try:
        ended[metric] = [values_of(ended.loc[[k]], metric).iloc[0] for k in ended.index]
        found = main_effects(ended, metric, study.factors, interactions, reference)
        blocks += _effects(found, f"change of {metric}", "effects", figures)
        odds = odds_effects(study.trials, study.factors, "diverged", interactions, reference)
        blocks += _effects(odds, "log odds ratio of diverging", "odds", figures) if odds else []
    except InputError as error:
        return [*blocks, Text(f"No effects: {error}.")]
    return [*blocks, Text(FACTORS_NOTE, note=True)]


FACTORS_NOTE = (
    "Each factor's effect averaged over the others; least squares with the seed as a block (on ranks where a diverged "
    "run has no finite value), Firth's logistic regression for yes or no. Holm's correction over the factors; "
    "★ below 5 %."
)


def _effects(found: Sequence[Effect], label: str, name: str, figures: Path) -> list[Block]:
    import pandas as pd

    label += " (ranks)" if found[0].scale == "ranks" else ""
    table = pd.DataFrame(
        {
            "factor": effect.factor,
            "level − reference": effect.contrast,
            f"{label} [95 %]": effect.interval,
            "p": effect.p,
            "p (Holm)": effect.p_holm,
            "": "★" if effect.named else "",
        }
        for effect in found
    )
    figure = plots.save(plots.effects(found, label), figures / f"{name}.svg")
    return [Heading(label[0].upper() + label[1:], 3), Table(table), Picture(figure)]


def _critical(study: Study) -> list[Block]:
    """Critical learning rates, where the learning rate is a factor beside others."""
    if LR not in study.factors:
        return []
    others = [factor for factor in study.factors if factor != LR]
    trials = study.trials.copy()
    trials["arm"] = [" ".join(f"{f}={row[f]}" for f in others) or "all" for _, row in trials.iterrows()]
    rates = margins.critical_rates(trials, LR)
    base = trials.loc[study.trials["arm"] == study.base, "arm"].iloc[0]
    rows = [_critical_row(arm, rates, base) for arm in dict.fromkeys(rate.arm for rate in rates)]
    if not any(rate.bracketed for rate in rates):
        return []
    import pandas as pd

    note = (
        "Geometric middle of the bracket between the largest healthy and the smallest diverging rate; a margin of +1 "
        "means that twice the rate is survived. Student's interval over seeds; the brackets' own width is not in it."
    )
    return [Heading("Critical learning rate"), Table(pd.DataFrame(rows)), Text(note, note=True)]


def _critical_row(arm: str, rates: Sequence[margins.Critical], base: str) -> dict[str, object]:
    mine = [rate for rate in rates if rate.arm == arm]
    margin: Interval | None = None
    if arm != base:
        try:
            margin = margins.margin(rates, arm, base)
        except InputError:
            margin = None
    logs = [rate.log2 for rate in mine if rate.bracketed]
    return {
        "arm": arm,
        "seeds bracketed": f"{len(logs)} of {len(mine)}",
        "critical rate (geometric mean)": 2 ** (sum(logs) / len(logs)) if logs else None,
        f"margin over {base} (log₂) [95 %]": margin,
    }


# --- reward, prompts, cost --------------------------------------------------------------------------------


def _reward(study: Study, figures: Path) -> list[Block]:
    rewards = [name for name in study.metrics if name.startswith(REWARDS) and study.trials[name].notna().any()]
    recalls = [name for name in study.metrics if name.startswith("val/recall")]
    if not rewards or not recalls:
        return []
    blocks: list[Block] = [Heading("Reward against recall")]
    for k, reward in enumerate(rewards[:3]):
        figure = plots.trade_off(study.trials, reward, recalls[0], study.arms)
        blocks.append(Picture(plots.save(figure, figures / f"reward-{k}.svg")))
    return [*blocks, Text("A reward that rises while recall falls was bought with diversity.", note=True)]


def _prompts(study: Study, figures: Path) -> list[Block]:
    accuracy = per_prompt(study)
    if accuracy.empty:
        return []
    figure = plots.save(plots.prompts(accuracy), figures / "prompts.svg")
    gone = {arm: prompts for arm, prompts in collapsed_prompts(accuracy).items() if prompts}
    text = "; ".join(f"{arm}: {', '.join(prompts)}" for arm, prompts in gone.items()) or "none"
    return [Heading("Prompts"), Picture(figure, "Judge accuracy by prompt."), Text(f"Below 50 % accuracy: {text}.")]


def _cost(study: Study) -> list[Block]:
    import pandas as pd

    if study.trials["seconds"].isna().all():
        return []
    rows = []
    for arm in study.arms:
        trials = study.arm(arm)
        per_step = 1000 * trials["seconds"] / trials["step"]
        cells = [
            arm,
            float(trials["seconds"].median()),
            float(per_step.median()),
            float(trials["seconds"].sum() / 3600),
        ]
        rows.append(dict(zip(("arm", "seconds a run (median)", "ms a step", "hours in all"), cells, strict=True)))
    return [Heading("Cost"), Table(pd.DataFrame(rows))]


# --- samples and links ------------------------------------------------------------------------------------


def newest_grid(run: Run) -> Path | None:
    """The run's final sample grid, else its newest one."""
    for pattern in GRIDS:
        if found := sorted((run.path / "samples").glob(pattern)):
            return found[-1]
    return None


def _samples(study: Study) -> list[Block]:
    """The grids of one seed that all arms have, side by side."""
    grids = {(study.trials.loc[k, "arm"], study.trials.loc[k, "seed"]): newest_grid(r) for k, r in study.runs.items()}
    with_grid = {key: path for key, path in grids.items() if path is not None}
    if not with_grid:
        return []
    counts: dict[int, int] = {}
    for _, seed in with_grid:
        counts[seed] = counts.get(seed, 0) + 1
    chosen = max(sorted(counts), key=lambda seed: counts[seed])
    pictures = [Picture(with_grid[arm, chosen], str(arm)) for arm in study.arms if (arm, chosen) in with_grid]
    return [Heading("Samples"), Text(f"Seed {chosen} of every arm, the same noise."), Gallery(pictures)]


def _links(study: Study) -> list[Block]:
    links = mlflow_links(list(study.runs.values()))
    if not links:
        return []
    return [Heading("MLflow"), Text("Served by `twinrl ui` unless the store is a server.", note=True), Links(links)]
