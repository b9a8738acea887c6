"""The autopsy's interventions: steps of recorded runs again, each with one thing changed, into papers/results/autopsy.

    python papers/autopsy_replays.py replays runs/ablations     the steps around large spikes, without each suspect
    python papers/autopsy_replays.py falls runs/ablations …     the steps into falls without a live teacher, and past
    them

Rows of events whose run directories are not here are kept; what is there already is not made again.
"""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

import pandas as pd
import torch
from autopsy_runs import BROKEN, FALLS, REPLAYS, run_chosen, trials_of

from analysis.frames import Run, load_run, run_divergence
from twinrl.run import names
from twinrl.stability.events import SPIKE
from twinrl.training import schema
from twinrl.training.assembly import load_source, provider_of
from twinrl.training.capsules import Capsules
from twinrl.training.replay import Replay, ReplayValidation, Trace, changed, replay_each
from twinrl.training.runs import RunDirectory

# --- spikes -----------------------------------------------------------------------------------------------

PLACEBOS = {"rate_less": ["optim.lr=0.99e-3"], "rate_more": ["optim.lr=1.01e-3"]}
INTERVENTIONS = {
    "reward_off": ["reward.schedule.weight.final=0"],
    "baseline_decoded": ["reward.gradient.baseline=decoded"],
    "teacher_ema": ["teacher={kind: ema, decay: 0.99}"],
    "float32": ["train.precision=float32"],
    "lr_tenth": ["optim.lr=1e-4"],
    "own_clip": ["gradients.terms.reward={relative: {ratio: 0.1}}"],
    **PLACEBOS,
}
"""Suspect → what removes it for the steps around a spike; placebos remove none, and show what any change does."""
SPIKE_KEY = ["study", "arm", "seed", "event"]
NO_HELP = ("sigmoid start", "smaller eta", "exact pixel gradient", "one-step sample")
"""Arms of autopsy-suspects that fall apart as the published one does, and later than before the reward."""
SPIKED = {"regime": (BROKEN,), "plateau": (BROKEN,), "suspects": NO_HELP}
"""Study → arms whose spikes are replayed."""
LARGE = 10.0
"""Spikes that are looked at: this many times what was usual."""


def replays(root: Path, most: int = 24) -> None:
    """Replays large spikes of runs with the published reward under each intervention, and adds their heights.

    Arguments:
        root: folder of run directories with capsules (``stability.capsules``).
        most: spikes of each study, shared by its runs.
    """
    device = torch.device("cpu")
    source = load_source(schema.load("published"), device)
    table = pd.read_csv(REPLAYS) if REPLAYS.exists() else pd.DataFrame(columns=SPIKE_KEY)
    for study, arms_of in SPIKED.items():
        names_of = {run.path: arm.name for arm, _, run in trials_of(study, root) if arm.name in arms_of}
        for run, number in chosen_spikes(map(load_run, names_of), most):
            key = (study, names_of[run.path], int(run.config["seed"]), number)
            same = [tuple(known) == key for known in table[SPIKE_KEY].itertuples(index=False)]
            known = {} if not any(same) else table[same].iloc[0].dropna().to_dict()
            left = {name: change for name, change in INTERVENTIONS.items() if name not in known}
            if not left:
                continue
            found = replay_each(RunDirectory(run.path), number, list(left.values()), lambda _: (source, device), 5)
            peaks = [found.peak(trace) for trace in found.traces]
            event = {"step": found.event.step, "series": found.event.series, "usual": found.event.reference}
            heights = {"exact": found.exact, "unchanged": peaks[0]} | dict(zip(left, peaks[1:], strict=True))
            row = known | dict(zip(SPIKE_KEY, key, strict=True)) | event | heights
            print(row, flush=True)
            table = pd.concat([table[[not one for one in same]], pd.DataFrame([row])], ignore_index=True)
            table.sort_values(SPIKE_KEY).to_csv(REPLAYS, index=False, float_format="%.6g")


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


# --- falls ------------------------------------------------------------------------------------------------

CHANGES = {
    "rectify_clip": ["gradients.terms.rectify={relative: {ratio: 0.3}}"],
    "rectify_half": ["gradients.terms.rectify={scale: {factor: 0.5}}"],
    "adversarial_half": ["gradients.terms.adversarial={scale: {factor: 0.5}}"],
    "base_half": ["gradients.terms.base={scale: {factor: 0.5}}"],
    "rate_half": ["optim.lr=5.0e-4"],
    "fake_rows": ["branches={e2e: 1, mul: 1, any: 1, adv: 2}"],
    "reward_off": ["gradients.terms.reward={scale: {factor: 0}}"],
    **PLACEBOS,
}
"""What is changed from a state before a fall on: a term's force, the rate, the branch's rows, the reward; placebos."""
FALLEN = {
    "causes": ("teacher=ema reward=corrected", "teacher=ema reward=published"),
    "unclipped": ("lr=1e-3",),
    "unclipped-control": ("lr=1e-3",),
}
"""Study → arms with an EMA teacher some of whose runs fall apart."""
WELL = 0.9
"""Judge accuracy from which an evaluation is one of a run that is well."""
PAST, EVERY = 250, 50
"""Steps beyond the last evaluation that was well, and steps between two looks at samples on the way."""


def falls(roots: Sequence[Path]) -> None:
    """Goes on from the last state of a run that was well, under each change, and adds where that ends.

    Of the runs that fell apart or ended unwell.
    """
    device = torch.device("cpu")
    source = load_source(schema.load("published"), device)
    table = pd.read_csv(FALLS) if FALLS.exists() else pd.DataFrame(columns=["study", "arm", "seed", "change"])
    for study, arms_of in FALLEN.items():
        for arm, seed, run in (trial for root in roots for trial in trials_of(study, root)):
            known = set(table.change[(table.study == study) & (table.arm == arm.name) & (table.seed == seed)])
            left = {name: change for name, change in CHANGES.items() if name not in known}
            if arm.name not in arms_of or not left or (well := well_until(run)) is None:
                continue
            number = last_state(run, well)
            if number is None:
                continue
            settings = RunDirectory(run.path).settings()
            protocol = provider_of(settings, source, device).protocol("validation")
            judge = ReplayValidation(EVERY, lambda network, step, protocol=protocol: protocol.evaluate(network))
            event, _ = Capsules(run.path, settings.stability.capsules).load(number)
            after = well + PAST - event.step
            tried = {name: change for name, change in left.items() if changed(settings, change) != settings}
            if not tried:
                continue
            found = replay_each(
                RunDirectory(run.path), number, list(tried.values()), lambda _: (source, device), after, judge=judge
            )
            made = [
                {"study": study, "arm": arm.name, "seed": seed, "change": name} | lived(found, trace)
                for name, trace in zip(("nothing", *tried), found.traces, strict=True)
                if name not in known
            ]
            print(pd.DataFrame(made).to_string(), flush=True)
            table = pd.concat([table, pd.DataFrame(made)], ignore_index=True)
            table.to_csv(FALLS, index=False, float_format="%.6g")


def well_until(run: Run) -> int | None:
    """The last evaluation before a fall or an unwell end that was well; None of a run that ends well."""
    judged = [(int(row["step"]), row[names.val("accuracy", 1)]) for row in run.rows if names.VAL_QUALITY in row]
    fall = run_divergence(run)
    if fall is None and judged[-1][1] >= WELL:
        return None
    end = fall.step if fall is not None else judged[-1][0]
    return max((step for step, accuracy in judged if step < end and accuracy >= WELL), default=None)


def last_state(run: Run, latest: int) -> int | None:
    """Number of the event with the last state that was taken at step ``latest`` or before."""
    kept = Capsules(run.path, RunDirectory(run.path).settings().stability.capsules)
    states = [(kept.load(number)[1].state["step"], number) for number in kept.numbers()]
    return max((state for state in states if state[0] <= latest), default=(0, None))[1]


def lived(found: Replay, trace: Trace) -> dict[str, object]:
    """Where a run that goes on as the trace ends."""
    fall = found.fell(trace)
    last = [row for row in trace.rows if names.VAL_QUALITY in row][-1]
    return {
        "exact": found.exact,
        "from": trace.rows[0]["step"] - 1,
        "to": trace.rows[-1]["step"],
        "fell": fall.step if fall is not None else None,
        "accuracy": min(row[names.val("accuracy", 1)] for row in trace.rows if names.VAL_QUALITY in row),
        "final_fd": last[names.val("fd", 1)],
        "norm": max(row[names.GRAD_TOTAL_RAW] for row in trace.rows),
    }


if __name__ == "__main__":
    run_chosen(__doc__, {replays: None, falls: "+"})
