"""The measured tables of papers/published-run.md.

    python papers/published_run.py collect runs/ablations     finished trials of its studies, into papers/results
    python papers/published_run.py                            the page's tables, from there

The studies are ``corrected``, ``reward-early`` and ``reward-routes``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from autopsy_runs import judged

from ablations.study import load
from analysis.frames import hash_of, load_run, run_folders
from analysis.intervals import mean_t

PAGE = Path(__file__).parent / "published-run.md"
TRIALS = Path(__file__).parent / "results" / "published_run.csv"
STUDIES = ("corrected", "reward-early", "reward-routes")
MEASURED = {
    "hps": "reward (`lab_hps`)", "judge": "held-out judge's reward (`lab_judge`)", "recall": "recall",
    "fd": "Fréchet distance",
}  # fmt: skip
"""Column of the final table at one network evaluation → what the page calls it."""


def collect(roots: Sequence[Path]) -> None:
    """Writes a row for each finished trial of the studies: its levels and its samples' metrics on the test split."""
    arms = {(study, arm.settings.hash): arm for study in STUDIES for arm in load(study).arms}
    made = []
    for folder in (folder for root in roots for folder in run_folders(root)):
        for study in STUDIES:
            arm = arms.get((study, hash_of(folder)))
            if arm is not None and (run := load_run(folder)).result:
                key = {"study": study, "arm": arm.name, "seed": int(run.config["seed"])}
                made.append(key | dict(arm.levels) | judged(run))
    table = pd.DataFrame(made).drop_duplicates(["study", "arm", "seed"], keep="last")
    table.sort_values(["study", "arm", "seed"]).to_csv(TRIALS, index=False, float_format="%.6g")
    print(table.groupby("study").size().to_string())


def tables(trials: pd.DataFrame) -> dict[str, str]:
    """The page's tables by the name of their study."""
    by_study = {study: found.set_index("seed") for study, found in trials.groupby("study")}
    return {
        "corrected": corrected(by_study["corrected"]),
        "reward-early": early(by_study["reward-early"]),
        "reward-routes": routes(by_study["reward-routes"]),
    }


def corrected(trials: pd.DataFrame) -> str:
    """Teacher, one-step samples without and with the reward, and the paired difference; a line for each metric."""
    without, with_reward = (trials[trials.reward == level] for level in ("without", "with"))
    lines = ["| | 50-step teacher | without reward | with reward | difference |", "|---|--:|--:|--:|--:|"]
    for metric, words in MEASURED.items():
        ours = [found[f"test1_{metric}"] for found in (without, with_reward)]
        cells = [f"{trials[f'teacher_{metric}'].mean():.3g}", *(str(mean_t(values)) for values in ours)]
        lines.append(f"| {words} | {' | '.join(cells)} | {mean_t((ours[1] - ours[0]).dropna())} |")
    return "\n".join(lines)


def early(trials: pd.DataFrame) -> str:
    """Score of one-step samples for each sign of the reward, and the paired difference from none."""
    scores = {level: found.test1_hps for level, found in trials.groupby("reward")}
    lines = ["| reward | `lab_hps` | − that without |", "|---|--:|--:|"]
    for level in ("up", "down", "off"):
        moved = "" if level == "off" else str(mean_t((scores[level] - scores["off"]).dropna()))
        lines.append(f"| {level} | {mean_t(scores[level])} | {moved} |")
    return "\n".join(lines)


def routes(trials: pd.DataFrame) -> str:
    """For each route, what up and down differ by in the reward's model and in the held-out judge."""
    lines = [
        "| route | `lab_hps` up | its sign flipped | difference | `lab_judge`, difference |",
        "|---|--:|--:|--:|--:|",
    ]
    for route in ("generator", "fake_target"):
        up, down = (trials[(trials.route == route) & (trials.sign == sign)] for sign in ("up", "down"))
        moved = [mean_t((up[metric] - down[metric]).dropna()) for metric in ("test1_hps", "test1_judge")]
        lines.append(f"| `{route}` | {mean_t(up.test1_hps)} | {mean_t(down.test1_hps)} | {moved[0]} | {moved[1]} |")
    return "\n".join(lines)


def render(page: str, made: dict[str, str]) -> str:
    """The page with each table between ``<!-- study -->`` and ``<!-- / -->``; indented as the first mark is."""
    for study, table in made.items():
        before, mark, rest = page.partition(f"<!-- {study} -->\n")
        _, end, after = rest.partition("<!-- / -->")
        if not mark or not end:
            raise ValueError(f"{PAGE.name} has no place for the table of {study}")
        indent = before.rpartition("\n")[2]
        page = before + mark + "".join(f"{indent}{line}\n" for line in table.splitlines()) + indent + end + after
    return page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["collect"], help="without it the page's tables are written")
    parser.add_argument("roots", nargs="*", type=Path, help="folders of run directories")
    chosen = parser.parse_args()
    if chosen.command:
        collect(chosen.roots)
    else:
        PAGE.write_text(render(PAGE.read_text(), tables(pd.read_csv(TRIALS))))
