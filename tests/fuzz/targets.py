"""What is damaged: runs, a study, images, a prepared folder, the laboratory and configurations; and who reads it."""

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests.fuzz import mutations

Answer = Callable[[Path, str], Mapping[str, object]]
"""Facts, by name, that a command has told: of the folder that it ran in and of what it printed."""

RUN, STUDY, PREPARED, PIPELINE, IMAGES, CONFIG = "run", "study.yaml", "prepared", "pipeline", "images", "config.yaml"
OUT, ADAPTERS = "out", "adapters"
FAST = [
    "model.network={kind: mlp, width: 8, depth: 1, condition_width: 8}", "optim.lr=3e-3", "train.batch=16",
    "evaluation={every: 4, n: 20, nfe: [1], teacher_steps: 1, velocity_rows: 5, grid_samples: 1}",
    "tracking.mlflow=false", "run.dir=.", "machine.threads=1",
]  # fmt: skip
KEPT, LAST = 8, 12
"""Steps of the checkpoint from which the cut run goes on, and of the whole run's last one."""
EVENT = [
    f"train.steps={LAST}", "checkpoint={every: 4, keep: 9}",
    "terms.planted={at: 6, size: 1000, branches: [any], row: 9}",
    "stability={capsules: {every: 2, before: 2}, watch: {spike: {warmup: 4}}}",
]  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command on a folder.

    Attributes:
        words: of the command line.
        answer: what it tells.
        shown: patterns of files whose content the answer is made of; damage that stays readable may change it.
        may_end_badly: whether it trains and may diverge. may_be_long: whether it may be asked for a long training.
    """

    words: tuple[str, ...]
    answer: Answer
    shown: tuple[str, ...] = ()
    may_end_badly: bool = False
    may_be_long: bool = False


@dataclass(frozen=True)
class Target:
    """A folder to damage.

    Attributes:
        build: makes it in an empty folder, by commands of its own (given as ``train``, ``command`` do).
        damaged: patterns of the files to damage.
        share: of all mutations.
        fake: whether the data are the fake source's, which takes no time to load.
        environment: variables of its commands; ``{here}`` is the folder.
    """

    build: Callable[[Path, Callable[..., None]], None]
    commands: tuple[Command, ...]
    damaged: tuple[str, ...]
    share: float
    fake: bool = True
    environment: Mapping[str, str] = ()  # type: ignore[assignment]


# --- answers ----------------------------------------------------------------------------------------------


def flat(value: Any, name: str = "") -> dict[str, object]:
    """Nested values by dotted name."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {key: inner for k, v in entries for key, inner in flat(v, f"{name}.{k}" if name else str(k)).items()}
    return found if isinstance(value, dict | list) else {name: value}


def rows_after(step: int, pattern: str = "*/log.jsonl") -> Answer:
    """The rows of logs that a command has made."""

    def answer(folder: Path, printed: str) -> dict[str, object]:
        logs = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
        rows = [json.loads(line) for path in logs for line in path.read_text().splitlines()[step:]]
        return flat({f"step {row['step']}": row for row in rows})

    return answer


def text_of(*patterns: str) -> Answer:
    """The lines of text files, and what was printed."""

    def answer(folder: Path, printed: str) -> dict[str, object]:
        found = {"printed": printed.splitlines()}
        found |= {str(p.relative_to(folder)): p.read_text().splitlines() for e in patterns for p in folder.glob(e)}
        return flat(found)

    return answer


def picture(folder: Path, printed: str) -> dict[str, object]:
    """The pixels of the picture that was written."""
    from PIL import Image

    return {"pixels": Image.open(folder / "out.png").tobytes()}


def table(folder: Path, printed: str) -> dict[str, object]:
    """What an evaluation has found."""
    return flat(json.loads((folder / RUN / "evaluation" / "table.json").read_text()))


def in_mlflow(folder: Path, printed: str) -> dict[str, object]:
    """What the store has of the run: parameters, tags, and every point with its step; nothing of one that was made
    anew, whose ids are others each time."""
    with closing(sqlite3.connect(f"file:{folder / 'mlflow.db'}?mode=ro", uri=True)) as store:
        asked = "SELECT run_uuid FROM runs WHERE lifecycle_stage = 'active'"
        ((run,),) = store.execute(asked).fetchall()
        points = store.execute("SELECT key, step, is_nan, value FROM metrics WHERE run_uuid = ?", (run,)).fetchall()
        words = [
            store.execute(f"SELECT key, value FROM {table} WHERE run_uuid = ?", (run,)).fetchall()
            for table in ("params", "tags")
        ]
    told = {f"{key} at {step}": None if is_nan else value for key, step, is_nan, value in points}
    return told | {f"{key} is": value for found in words for key, value in found if key != "twinrl.key"}


def exported(folder: Path, printed: str) -> dict[str, object]:
    """Digests of the files of an exported folder, but of its card, which names the run's configuration."""
    out = folder / OUT
    found = (p for p in sorted(out.rglob("*")) if p.is_file() and p.name != "README.md")
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def silence(folder: Path, printed: str) -> dict[str, object]:
    """No facts: any readable change may change what is told."""
    return {}


# --- runs and studies ---------------------------------------------------------------------------------------


def build_run(folder: Path, command: Callable[..., None]) -> None:
    command("train", "twinflow", *FAST, *EVENT, "name=run")
    (made,) = [path.parent for path in folder.glob("*/config.yaml")]
    made.rename(folder / RUN)


def build_cut_run(folder: Path, command: Callable[..., None]) -> None:
    """As a kill leaves it, four steps before its end."""
    build_run(folder, command)
    run = folder / RUN
    shutil.rmtree(run / "checkpoints" / f"step-{LAST:08d}")
    for name in ("result.json", "metrics.parquet"):
        (run / name).unlink()


def build_published(folder: Path, command: Callable[..., None]) -> None:
    """With its view in a store beside it."""
    build_run(folder, command)
    command("publish", RUN)


def checkpoint(step: int) -> tuple[str, ...]:
    """What a checkpoint holds is what its files say: readable damage is other weights, which are another answer."""
    return (f"{RUN}/checkpoints/step-{step:08d}/*",)


TOLD = ("*/log.jsonl", "*/events.jsonl", "*/config.yaml", "*/result.json", "*/start.json", "*/env.json")

REPORTED = (*TOLD, "*/samples/*")
"""What a report of a run is made of."""

OFTEN = (f"{RUN}/*", *TOLD * 4, "*/state.json", "*/event.json")
"""What of a run is damaged; what is read by most is damaged most."""

STUDY_CONTENT = {
    "base": "twinflow",
    "set": {
        "train": {"steps": 8, "batch": 16}, "checkpoint": {"every": 4, "keep": 9}, "optim.lr": 1e-3,
        "model.network": {"kind": "mlp", "width": 8, "depth": 1, "condition_width": 8},
        "evaluation": {"every": 4, "n": 20, "nfe": [1], "teacher_steps": 1, "velocity_rows": 5, "grid_samples": 1},
    },
    "factors": {"rate": {"small": {"optim.lr": 1e-4}, "large": {"optim.lr": 3e-3}}},
    "seeds": 2,
}  # fmt: skip


def build_study(folder: Path, command: Callable[..., None]) -> None:
    """Trained in this process, without Ray."""
    (folder / STUDY).write_text(yaml.safe_dump(STUDY_CONTENT, sort_keys=False))
    command("ablate", "fuzz-study")


def train_study() -> None:
    """What ``build_study`` runs in a fork: all trials, their ledger and the study's own file."""
    from dataclasses import replace

    from rich.console import Console

    from ablations import plan as plans
    from ablations import runner
    from ablations import study as studies
    from ablations.plan import Workspace
    from ablations.trial import record
    from twinrl.commands.train import train

    made = plans.make(studies.load(STUDY), Workspace(Path("runs"), (Path("ledger.jsonl"),)))
    for trial in made.trials:
        train(trial.settings, True, Console(quiet=True))
        made.workspace.ledger.append(replace(record(runner.task_of(trial, made))))


WHERE = ("--root", "runs", "--ledger", "ledger.jsonl")

# --- pretrained families ------------------------------------------------------------------------------------

SIZES = ("buckets.sizes=[[32,32],[64,32]]", "buckets.multiple=8", "validation=0.3", "buckets.max_upscale=2")
FAMILY = [
    f"model={{family: sd3, path: {PIPELINE}}}", f"data={{source: folder, root: {PREPARED}}}", "tracking.mlflow=false",
    "evaluation={every: 0, n: 20, nfe: [1], grid_samples: 1, batch: 20, velocity_rows: 4}",
    "train={steps: 1, batch: 4}", "run.dir=.", "name=x", "machine.threads=1",
]  # fmt: skip


def build_prepared(folder: Path, command: Callable[..., None]) -> None:
    from tests.data.tiny import write_pairs

    write_pairs(folder / IMAGES, [(32, 32), (64, 32)] * 5)
    command("build-pipeline")
    command("data", "prepare", IMAGES, "--model", PIPELINE, "--to", PREPARED, "--device", "cpu", *SIZES)


def save_pipeline() -> None:
    """What ``build_prepared`` runs in a fork."""
    from tests.backends.families import tiny

    tiny.build("sd3").save_pretrained(PIPELINE)


def build_students(folder: Path, command: Callable[..., None]) -> None:
    """Two runs of one pretrained model: of all its weights, and of adapters."""
    build_prepared(folder, command)
    for name, more in ((RUN, ()), (ADAPTERS, ("model.lora.rank=2",))):
        command("train", "twinflow", *FAMILY, *more, f"name={name}")
        (made,) = folder.glob(f"{name}-*-s0")
        made.rename(folder / name)


def build_images(folder: Path, command: Callable[..., None]) -> None:
    from tests.data.tiny import write_pairs

    write_pairs(folder / IMAGES, [(32, 32), (64, 32)] * 3)
    rows = [{"file_name": f"{i:03}.png", "text": f"picture {i}"} for i in range(3)]
    other = folder / "described"
    shutil.copytree(folder / IMAGES, other)
    for path in other.glob("*.txt"):
        path.unlink()
    (other / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- the laboratory and configurations ------------------------------------------------------------------------


IN_LAB = ("train", "lab", *FAST, "train.steps=1", "name=x")


def build_lab(folder: Path, command: Callable[..., None]) -> None:
    """With what a first training has kept of judging it, which takes as long as a command may."""
    command("copy-lab")
    command(*IN_LAB)
    for made in folder.glob("x-*"):
        shutil.rmtree(made)


def copy_lab() -> None:
    """What ``build_lab`` runs in a fork: the laboratory of the usual cache, built if it is not there."""
    from twinrl.lab import load_lab
    from twinrl.lab.load import DEFAULT
    from twinrl.machine.files import cache_dir

    here = os.environ.pop("TWINRL_CACHE")
    load_lab(progress=False)
    name = f"digits-{DEFAULT.hash()[:12]}"
    shutil.copytree(cache_dir() / name, Path(here) / name)


def build_config(folder: Path, command: Callable[..., None]) -> None:
    """The whole configuration of a small run with a reward, every key written out but those of several processes."""
    command("write-config")


def write_config() -> None:
    """What ``build_config`` runs in a fork."""
    from twinrl.training import schema

    reward = ("reward.model=brightness", "reward.held_out={}")
    settings = schema.load("recommended", [*FAST, *reward, "train.steps=2", "name=x"])
    Path(CONFIG).write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude={"launch"}), sort_keys=False))


DESCRIBED = ("*.safetensors", f"{PIPELINE}/*", "*/config.yaml")
"""What an exported student is made of."""

TARGETS = {
    "cut run": Target(
        build_cut_run, (Command(("resume", RUN), rows_after(KEPT), checkpoint(KEPT)),),
        OFTEN, 0.22,
    ),
    "run": Target(
        build_run,
        (
            Command(("analyze", RUN, "--out", "report", "--no-mlflow"), text_of("report/*.md"), REPORTED),
            Command(("sample", RUN, "-n", "1", "--out", "out.png"), picture, checkpoint(LAST)),
            Command(("evaluate", RUN), table, checkpoint(LAST)),
            Command(("replay", RUN), text_of(), ("*/events.jsonl",)),
            Command(("replay", RUN, "--event", "1", "--after", "1"), text_of(), (*TOLD, f"{RUN}/capsules/*")),
            Command(("resume", RUN), text_of(), TOLD),
        ),
        OFTEN, 0.24,
    ),
    "study": Target(
        build_study,
        (
            Command(("ablate", "status", STUDY, *WHERE), text_of(), (STUDY, "ledger.jsonl")),
            Command(("ablate", "report", STUDY, *WHERE, "--out", "report"), text_of("report/*.md"), ("*",)),
            Command(("analyze", "ledger.jsonl", "--out", "report", "--no-mlflow"), text_of("report/*.md"), ("*",)),
        ),
        (*[STUDY, "ledger.jsonl"] * 6, *TOLD), 0.16,
    ),
    "published run": Target(
        build_published, (Command(("publish", RUN), in_mlflow, (*TOLD, "*/mlflow.json", "mlflow.db")),),
        (*OFTEN, *["*/mlflow.json"] * 12, *["mlflow.db"] * 3), 0.06,
    ),
    "students": Target(
        build_students,
        (
            Command(("export", RUN, OUT), exported, DESCRIBED),
            Command(("export", ADAPTERS, OUT), exported, DESCRIBED),
            Command(("export", ADAPTERS, OUT, "--lora"), exported, DESCRIBED),
        ),
        (*["*/config.yaml", "*/state.json", "*/student.safetensors", "*/ema.safetensors"] * 4, f"{PIPELINE}/*"),
        0.06, fake=False,
    ),
    "images": Target(
        build_images,
        (
            Command(("data", "prepare", IMAGES, *SIZES, "--to", "out"), silence),
            Command(("data", "prepare", "described", *SIZES, "--to", "out"), silence),
        ),
        ("*",), 0.08,
    ),
    "prepared": Target(
        build_prepared,
        (
            Command(("train", "twinflow", *FAMILY), rows_after(0), ("*.safetensors",)),
            Command(("doctor", "--plan", "twinflow", *FAMILY), silence),
        ),
        (f"{PREPARED}/*", f"{PREPARED}/*", f"{PIPELINE}/*/config.json", f"{PIPELINE}/*.json"), 0.08, fake=False,
    ),
    "laboratory": Target(
        build_lab,
        (Command(("doctor",), silence), Command(IN_LAB, rows_after(0))),
        ("cache/*",), 0.04, fake=False, environment={"TWINRL_CACHE": "{here}/cache"},
    ),
    "configuration": Target(
        build_config,
        (Command(("train", CONFIG), silence, may_end_badly=True, may_be_long=True),),
        (CONFIG,), 0.14,
    ),
    "planned configuration": Target(  # in a process that builds the laboratory, and takes seconds
        build_config, (Command(("doctor", "--plan", CONFIG), silence),), (CONFIG,), 0.04,
    ),
}  # fmt: skip


def remove(path: Path) -> None:
    """Whatever it is."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def files(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    """The files of a folder that a pattern names, as often as patterns name them."""
    names = sorted(os.path.relpath(os.path.join(at, n), folder) for at, _, found in os.walk(folder) for n in found)
    return [name for pattern in patterns for name in names if fnmatch(name, pattern)]


def damage(target: Target, folder: Path, rng: Random) -> tuple[str, str]:
    """Damage one file of a target's folder: its name, and how."""
    name = rng.choice(files(folder, target.damaged))
    return name, mutations.damage(folder / name, rng)
