"""The page about a study: ranking, divergence, factors, what the reward cost, samples side by side."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis import answer, factor_page, margins, panels, plots, telling
from analysis.answer import Answer
from analysis.frames import Run, StudyFrame, higher_is_better
from analysis.intervals import Interval, clopper_pearson, number
from analysis.leaderboard import (
    COLLAPSED,
    ArmLine,
    collapses,
    per_prompt,
    values_of,
)
from analysis.mlflow_store import mlflow_links
from analysis.page import Answered, Gallery, Heading, Links, Page, PageBlock, Picture, Table, Text, percent
from analysis.survival import (
    Times,
    hazard_ratio,
    log_rank,
    restricted_mean,
    restricted_mean_difference,
    times_of,
)
from analysis.traces import rules_table
from twinrl.config.errors import InputError
from twinrl.machine import files
from twinrl.run import layout, names
from twinrl.stability.divergence import FALL, NEVER_WHOLE
from twinrl.tracking.pictures import opened

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

REWARD_METRICS = ("val/score/", "val/held_out_score/", names.REWARD_MEAN)
MOST_REWARDS = 4
LR_KEY = "optim.lr"
THUMBNAIL = 560
"""Width of the part of a grid that the first screen shows, in pixels."""
GRIDS = ("final-1nfe.png", f"{layout.STEP}*.png", "*.png")


def build(
    study: StudyFrame, figures: Path, metric: str | None, effect: float, interactions: Sequence[tuple[str, str]]
) -> Page:
    """The page; figures are written into ``figures``.

    Raises:
        InputError: one arm only, the metric was never logged, or an interaction is of something else than factors.
    """
    metric = metric or study.metric or names.VAL_QUALITY
    if len(study.arms) < 2:
        raise InputError(
            "a study compares arms", got=f"one arm, {study.arms[0]}", expected="two or more",
            fix="analyze one of its run directories instead",
        )  # fmt: skip
    for name in (name for pair in interactions for name in pair):
        if name not in study.factors:
            raise InputError(
                f"{name} is no factor of this study", expected=f"two of {', '.join(study.factors) or 'none'}",
                fix="give --interaction factors that vary",
            )  # fmt: skip
    found = Answer.of(study, metric, interactions, effect)
    page = Page(f"Study {study.name}")
    page.add(Answered(found.sentence, study.question), *_norms(found, figures), *_samples(study, figures))
    page.add(*answer.blocks(found, effect), *_rules(found), *_ranking(found, figures), *_survival(study, figures))
    page.add(*factor_page.section(found.factors, metric, figures), *_critical(study, figures))
    page.add(*_reward(study, figures), *_prompts(study, figures), *_cost(study), *_links(study))
    return page


# --- gradients --------------------------------------------------------------------------------------------


def _norms(found: Answer, figures: Path) -> list[PageBlock]:
    """The picture below the answer; none where no log has a norm."""
    if not any(trace.raw for trace in found.traces.runs.values()):
        return []
    figure = plots.save(panels.study_norms(found.study, found.traces), figures / "norms.svg")
    return [Picture(figure, panels.caption(found.study, found.traces))]


def _rules(found: Answer) -> list[PageBlock]:
    table = rules_table(found.study, found.traces)
    if table.empty:
        return []
    table["share of steps"] = [percent(share) for share in table["share of steps"]]
    return [Heading("What the gradient rules did"), Table(table, "rules"), Text(RULES_NOTE, note=True)]


RULES_NOTE = (
    "Share of the steps with a gradient in which rules changed its norm, and the factor by which they did: its "
    "median over the runs in which they acted at all."
)


# --- ranking ----------------------------------------------------------------------------------------------


def _ranking(found: Answer, figures: Path) -> list[PageBlock]:
    study, metric, lines = found.study, found.metric, found.lines
    if found.unranked:
        return [Heading("Ranking"), Text(f"There is no ranking: {found.unranked}.")]
    direction = "higher" if higher_is_better(metric) else "lower"
    values = {line.arm: values_of(study.arm(line.arm), metric) for line in lines}
    figure = plots.save(plots.arms(lines, values, metric, direction), figures / "leaderboard.svg")
    blocks: list[PageBlock] = [Heading(f"Ranking by {metric}"), Table(_ranking_table(found), "ranking")]
    blocks.append(Picture(figure, "Dot: a seed; line: interquartile mean with its 95 % interval."))
    tests = RANKING_TESTS if found.ranking_tests else "Tests of the arms are those of the factor, below."
    return [*blocks, Text(f"{RANKING_NOTE} {tests}", note=True)]


RANKING_NOTE = (
    "Interquartile mean with a calibrated trimmed-t interval. A run that failed counts as worse than all others, "
    "unless it recovered and went on to its end. P(better): chance that a run beats the base's run of the same seed "
    "(mid-P interval), or over all pairs where fewer than 5 seeds are common."
)
RANKING_TESTS = "p: Wilcoxon's signed ranks by seed, or Mann and Whitney's; Holm's correction is over the arms."


def _ranking_table(found: Answer) -> "pd.DataFrame":
    import pandas as pd

    base = found.study.base

    def tests(line: ArmLine) -> dict[str, object]:
        p = {"p": line.p, "p (Holm)": line.p_holm} if found.ranking_tests else {}
        return {name: None if math.isnan(value) else value for name, value in p.items()}

    return pd.DataFrame(
        {
            "arm": line.arm + (" (base)" if line.arm == base != "base" else ""),
            "n": line.n,
            "interquartile mean [95 %]": line.interval,
            "P(better) [95 %]": line.better,
            "mean difference by seed [95 %]": line.difference,
            **tests(line),
            "diverged": line.diverged,
        }
        for line in found.lines
    )


# --- divergence -------------------------------------------------------------------------------------------


def _survival(study: StudyFrame, figures: Path) -> list[PageBlock]:
    arms = {arm: times_of(study.arm(arm)) for arm in study.arms}
    horizon = float(study.trials["planned"].max())
    table = survival_table(arms, study.base, horizon)
    blocks: list[PageBlock] = [Heading("Time to divergence"), Text(_survival_text(arms)), Table(table, "divergence")]
    if rescued := int(((study.trials["rollbacks"] > 0) & ~study.trials["diverged"]).sum()):
        blocks.append(Text(f"Rolled back to a checkpoint on the way, and not diverged: {rescued} of the runs."))
    blocks += [Text(line) for line in told(study.trials)]
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
    "Share diverged, those that never were whole among them: Clopper–Pearson. A fall is dated by its first bad "
    "evaluation, and began after the one before. Hazard ratio: Firth's penalised likelihood with its profile interval, "
    "finite also where an arm has no or only events; – where nothing diverged. Mean steps without divergence: area "
    "under the Kaplan–Meier curve up to the planned end. p: log-rank against the base, uncorrected."
)


def told(trials: "pd.DataFrame") -> list[str]:
    """What the counts of failures do not show: how many began before any evaluation, never were whole, or recovered."""
    lost = trials[trials["diverged"]]
    counted = {
        "fell from their start, before their first evaluation": lost[(lost["kind"] == FALL) & (lost["after"] == 0)],
        "never were whole: the judge's accuracy was below its floor at every evaluation":
            lost[lost["kind"] == NEVER_WHOLE],
        "recovered: at the last evaluation they were not bad any more; they count as failed": lost[lost["recovered"]],
    }  # fmt: skip
    return [f"{len(runs)} of {len(lost)} {what}: {_arms_of(runs)}." for what, runs in counted.items() if len(runs)]


def _arms_of(trials: "pd.DataFrame") -> str:
    return ", ".join(telling.counted(arm, len(runs), len(trials)) for arm, runs in trials.groupby("arm", sort=False))


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


# --- critical learning rates ------------------------------------------------------------------------------


def _critical(study: StudyFrame, figures: Path) -> list[PageBlock]:
    """Critical learning rates: of ``twinrl ablate margin``, else where the learning rate is a factor of the study."""
    rates, base = (study.critical, study.base) if study.critical else _from_factor(study)
    if not any(rate.bracketed for rate in rates):
        return []
    import pandas as pd

    names = list(dict.fromkeys(rate.arm for rate in rates))
    found = {name: critical_margin(rates, name, base) for name in names if name != base}
    rows = [_critical_row(name, rates, base, found.get(name)) for name in names]
    blocks: list[PageBlock] = [Heading("Critical learning rate"), Table(pd.DataFrame(rows), "critical")]
    if shown := {name: margin for name, margin in found.items() if margin is not None}:
        figure = plots.forest(shown, f"margin over {base} (doublings of the learning rate)", reference=0.0)
        blocks.append(Picture(plots.save(figure, figures / "margins.svg")))
    return [*blocks, Text(CRITICAL_NOTE, note=True)]


CRITICAL_NOTE = (
    "Geometric middle of the bracket between the largest healthy and the smallest diverging rate, and its mean over "
    "seeds; a margin of +1 means that twice the rate is survived. Paired by seed; the interval has Student's law over "
    "seeds and the part of the brackets' width that seeds share. Seeds whose bracket is open are left out."
)


def _from_factor(study: StudyFrame) -> tuple[Sequence[margins.Critical], str]:
    """Critical rates where the learning rate is a factor beside others, arms being the others' levels."""
    if LR_KEY not in study.factors:
        return [], ""
    others = [factor for factor in study.factors if factor != LR_KEY]
    trials = study.trials.copy()
    trials["arm"] = [" ".join(f"{f}={row[f]}" for f in others) or "all" for _, row in trials.iterrows()]
    return margins.critical_rates(trials, LR_KEY), trials.loc[study.trials["arm"] == study.base, "arm"].iloc[0]


def critical_margin(rates: Sequence[margins.Critical], arm: str, base: str) -> Interval | None:
    """The margin of an arm over the base; None where no seed has both brackets."""
    try:
        return margins.margin(rates, arm, base)
    except InputError:
        return None


def _critical_row(arm: str, rates: Sequence[margins.Critical], base: str, margin: Interval | None) -> dict[str, object]:
    mine = [rate for rate in rates if rate.arm == arm]
    closed = [rate for rate in mine if rate.bracketed]
    beyond = [f"{sum(is_open)} {word}" for word, is_open in (
        ("above", [math.isinf(rate.broken) for rate in mine]), ("below", [rate.healthy == 0 for rate in mine])
    ) if any(is_open)]  # fmt: skip
    rate = margins.critical_rate(rates, arm) if closed else None
    return {
        "arm": arm,
        "seeds bracketed": f"{len(closed)} of {len(mine)}" + (f" ({', '.join(beyond)})" if beyond else ""),
        "critical rate [95 %]": Interval(2**rate.estimate, 2**rate.low, 2**rate.high, rate.n, rate.method)
        if rate else None,
        f"margin over {base} (log₂) [95 %]": margin,
    }  # fmt: skip


# --- reward, prompts, cost --------------------------------------------------------------------------------


def _reward(study: StudyFrame, figures: Path) -> list[PageBlock]:
    known = [name for name in study.metrics if study.trials[name].notna().any()]
    rewards = [name for prefix in REWARD_METRICS for name in known if name.startswith(prefix)]
    recalls = [name for name in study.metrics if name.startswith("val/recall")]
    if not rewards or not recalls:
        return []
    blocks: list[PageBlock] = [Heading("Reward against recall")]
    for k, reward in enumerate(rewards[:MOST_REWARDS]):
        figure = plots.trade_off(study.trials, reward, recalls[0], study.arms)
        blocks.append(Picture(plots.save(figure, figures / f"reward-{k}.svg")))
    return [*blocks, Text("A reward that rises while recall falls was bought with diversity.", note=True)]


def _prompts(study: StudyFrame, figures: Path) -> list[PageBlock]:
    """Prompts (classes) that the judge no longer recognises in runs that did not diverge as a whole."""
    accuracy = per_prompt(study)
    if accuracy.empty:
        return []
    figure = plots.save(plots.prompts(accuracy), figures / "prompts.svg")
    table = collapses(study).rename(
        columns={"runs": "runs judged", "collapsed": "with a collapsed prompt", "share": "share [95 %]",
                 "prompts": "which, in how many"}
    )  # fmt: skip
    caption = "Judge accuracy by prompt, mean over the runs that did not diverge."
    note = (
        f"Collapsed: below {percent(COLLAPSED)} of its samples are recognised, or nan, as samples of it were not "
        "finite. Diverged runs are not counted here."
    )
    return [Heading("Prompts"), Table(table, "prompts"), Picture(figure, caption), Text(note, note=True)]


def _cost(study: StudyFrame) -> list[PageBlock]:
    """Time of each arm, as such and against the base."""
    import pandas as pd

    if study.trials["seconds"].isna().all():
        return []
    rows = []
    for arm in study.arms:
        trials = study.arm(arm)
        per_step = 1000 * trials["seconds"] / trials["step"]
        dear = answer.time_ratio(study, arm) if arm != study.base else None
        rows.append({
            "arm": arm,
            "seconds a run (median)": float(trials["seconds"].median()),
            "ms a step (median)": float(per_step.median()),
            f"time a step × {study.base} [95 %]": telling.known(dear),
            "hours in all": float(trials["seconds"].sum() / 3600),
        })  # fmt: skip
    note = "Training steps, without validation. The ratio is paired by seed; it means something on one machine only."
    return [Heading("Cost"), Table(pd.DataFrame(rows), "cost"), Text(note, note=True)]


# --- samples and links ------------------------------------------------------------------------------------


def newest_grid(run: Run) -> Path | None:
    """The run's final sample grid, else its newest one."""
    for pattern in GRIDS:
        if found := sorted((run.path / layout.SAMPLES).glob(pattern)):
            return found[-1]
    return None


def _samples(study: StudyFrame, figures: Path) -> list[PageBlock]:
    """The grids of one seed that all arms have, side by side."""
    grids = {(study.trials.loc[k, "arm"], study.trials.loc[k, "seed"]): newest_grid(r) for k, r in study.runs.items()}
    with_grid = {key: path for key, path in grids.items() if path is not None}
    if not with_grid:
        return []
    counts: dict[int, int] = {}
    for _, seed in with_grid:
        counts[seed] = counts.get(seed, 0) + 1
    chosen = max(sorted(counts), key=lambda seed: counts[seed])
    shown = [arm for arm in study.arms if (arm, chosen) in with_grid]
    folder = figures / "samples"
    folder.mkdir(exist_ok=True)
    pictures = [
        Picture(_top(with_grid[arm, chosen], folder / f"arm-{k}.png"),
                f"{arm}, seed {chosen}{_end(study, arm, chosen)}", with_grid[arm, chosen])
        for k, arm in enumerate(shown)
    ]  # fmt: skip
    return [Gallery(pictures, low=len(pictures) <= plots.MOST_ARMS)]


def _top(grid: Path, target: Path) -> Path:
    """The grid's first images, half as high as wide, in few colours: what a first look takes."""
    picture = opened(grid)
    left, top = origin(picture)
    width = min(picture.width - left, THUMBNAIL)
    part = picture.convert("RGB").crop((left, top, left + width, min(picture.height, top + width // 2)))
    with files.publishing(target) as new:
        part.quantize(64).save(new, "PNG", optimize=True)
    return target


def origin(picture: "Image.Image") -> tuple[int, int]:
    """Where the images of a grid begin, in pixels; (0, 0) where it does not say so."""
    found = re.fullmatch(r"(\d{1,5}) (\d{1,5})", str(picture.info.get(layout.GRID_ORIGIN, "")))
    left, top = (int(found[1]), int(found[2])) if found else (0, 0)
    return (left, top) if left < picture.width and top < picture.height else (0, 0)


def _end(study: StudyFrame, arm: str, seed: int) -> str:
    """Whether a run fell, and when."""
    mine = study.arm(arm)
    (run,) = mine[mine["seed"] == seed].to_dict("records")
    return f": fell, seen at step {run['time']:,.0f}" if run["diverged"] else ""


def _links(study: StudyFrame) -> list[PageBlock]:
    links = mlflow_links(list(study.runs.values()))
    if not links:
        return []
    return [Heading("MLflow"), Text("Served by `twinrl ui` unless the store is a server.", note=True), Links(links)]
