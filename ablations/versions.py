"""Which version of the code a study's report is about.

A trial counts for the sources, data, torch and threads that made it; releases that give the same numbers are one. After
any other update a study's trials are missing again, as far as ``twinrl ablate run`` is concerned. A report about them
is still worth reading, as long as it says whose they are and does not mix versions within an arm.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ablations.ledger import TrialRecord
from ablations.plan import Plan


@dataclass(frozen=True)
class Version:
    """What a report reads.

    Attributes:
        fingerprints: configuration's hash → fingerprint, for every arm.
        missing: trials of the study that it does not have.
        note: what a reader must know; empty where today's version made all that is read.
    """

    fingerprints: Mapping[str, str]
    missing: int
    note: str = ""


def to_report(plan: Plan) -> Version:
    """Today's version, unless others have finished more of the study: then in each arm the one with the most seeds."""
    today = {trial.config_hash: trial.fingerprint for trial in plan.trials}
    own = sum(plan.record(trial) is not None for trial in plan.trials)
    older = _older(plan, today)
    made = [record for records in older.values() for record in records]
    if own >= len(made):
        return Version(today, len(plan.trials) - own)
    chosen = today | {config: records[0].fingerprint for config, records in older.items() if records}
    return Version(chosen, len(plan.trials) - len(made), _note(plan, made, own))


def hint(plan: Plan) -> str:
    """What to say where a study's trials are missing only as far as today's version is concerned; else empty."""
    if not to_report(plan).note:
        return ""
    return (
        "Another version of twinrl, its data, torch or threads has finished more of this study: report shows that; "
        "run makes today's."
    )


def _older(plan: Plan, today: Mapping[str, str]) -> dict[str, Sequence[TrialRecord]]:
    """Of each arm the finished trials by the other version that has most of them, of several the latest."""
    seeds = {trial.settings.seed for trial in plan.trials}
    found: dict[str, dict[str, list[TrialRecord]]] = {config: {} for config in today}
    for record in plan.records.values():
        config, made_by = record.config_hash, record.fingerprint
        if config in found and record.seed in seeds and made_by != today[config] and plan.counts(record):
            found[config].setdefault(made_by, []).append(record)
    return {config: max(versions.values(), key=_most, default=[]) for config, versions in found.items()}


def _most(records: Sequence[TrialRecord]) -> tuple[int, str]:
    return len(records), max(map(_at, records))


def _at(record: TrialRecord) -> str:
    return str(record.where.get("at", ""))


def _note(plan: Plan, made: Sequence[TrialRecord], own: int) -> str:
    revisions = _distinct(str(r.where.get("revision") or "unknown") for r in made)
    names = ", ".join(revision[:8] + revision[40:] for revision in revisions)
    text = (
        f"Another version of twinrl, its data, torch or threads than today's: the {len(made)} trials shown were "
        f"finished up to {max(map(_at, made))[:10]} at revision {names}. Today's version has {own} of the study's "
        f"{len(plan.trials)}; the study's run command makes the others."
    )
    if len(revisions) > 1:
        text += " With several revisions, a difference between arms may be one of the code."
    return text


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
