"""Updates strand nobody: runs and ledgers of every version go on, whatever keys and defaults have come since."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from pydantic import Field, ValidationError
from rich.console import Console

from ablations import fingerprint
from ablations import versions as reported
from tests import logs, versions
from twinrl import config
from twinrl.commands.train import resume
from twinrl.config import Settings, first_keys
from twinrl.config.components import Registry
from twinrl.config.errors import InputError
from twinrl.run.layout import CONFIG
from twinrl.training import schema
from twinrl.training.optim import AdamW, Optimizer
from twinrl.training.runs import RunDirectory, check_unchanged, dump

FIXTURES = sorted(path for path in versions.VERSIONS.iterdir() if path.is_dir())
VERSION = pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.name)


class Swap(Settings):
    """A section that a later version adds."""

    __module__ = schema.__name__

    every: int = Field(4, ge=1)


class LaterTrain(schema.TrainConfig):
    """A key that a later version adds to a section."""

    __module__ = schema.__name__

    patience: int = 3


class LaterAdamW(AdamW.Config):
    """A key that a later version adds to a component."""

    __module__ = AdamW.__module__

    decoupled: bool = True


class LaterRun(schema.RunConfig):
    """A later version's configuration."""

    __module__ = schema.__name__

    train: LaterTrain = LaterTrain()
    swap: Swap = Swap()
    ladder: config.component(Registry("ladder", Optimizer, {"adamw": AdamW})) = Field(
        default="adamw", validate_default=True
    )  # type: ignore


KEYS = {
    "train.patience": 4,
    "swap.every": 5,
    "optim.decoupled": False,
    "ladder": {"kind": "adamw", "decoupled": False},
}
"""Every later key with another value than its default."""


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """This version with later keys."""
    monkeypatch.setattr(AdamW, "Config", LaterAdamW)
    monkeypatch.setattr(schema, "RunConfig", LaterRun)


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch, later: None) -> None:
    """The later version after that, in which some defaults have changed; the later keys came with other ones."""
    for key, default in {"LaterTrain.patience": 2, "Swap.every": 3, "LaterAdamW.decoupled": False}.items():
        monkeypatch.setitem(first_keys.CHANGED_DEFAULTS, key, default)


@pytest.fixture
def working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder of a process that knows a fixture's source of data."""
    versions.prepare(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def copied(fixture: Path) -> Path:
    """The fixture's run directory where its configuration says that it is."""
    kept = versions.run_of(fixture)
    path = Path(shutil.copytree(kept, kept.relative_to(fixture)))
    (path / "samples").mkdir()  # git keeps no empty folder
    return path


# --- what older versions have made --------------------------------------------------------------------------


@pytest.mark.slow
@VERSION
@pytest.mark.parametrize("update", [None, "later", "change"])
def test_a_run_of_an_older_version_goes_on(
    fixture: Path, update: str | None, working: Path, request: pytest.FixtureRequest
) -> None:
    """From its checkpoint, and its numbers are those that the older version has logged itself."""
    if update is not None:
        request.getfixturevalue(update)
    path, kept = copied(fixture), versions.run_of(fixture)
    assert RunDirectory(path).settings().directory == path
    assert resume(path, Console(quiet=True)) == 0
    assert logs.rows(path)[: versions.KEPT] == logs.rows(kept)[: versions.KEPT]
    assert versions.differing(path, kept) == ""


@VERSION
@pytest.mark.parametrize("update", [None, "later"])
def test_a_ledger_of_an_older_version_is_recognised(
    fixture: Path, update: str | None, working: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Its trials are done where the releases give the same numbers, and reported as another version's where not."""
    if update is not None:
        request.getfixturevalue(update)
    path = copied(fixture)
    torch = json.loads((path / "env.json").read_text())["packages"]["torch"]
    monkeypatch.setattr(fingerprint.metadata, "version", lambda name: torch)
    released(working / "releases.yaml", fixture.name, monkeypatch)
    plan = versions.plan_of(fixture)
    assert plan.missing == []
    assert path in [trial.run.path for trial in plan.trials]
    changed = [{"other": ["numbers"] * 4, "today": fingerprint.digests()}]
    (working / "releases.yaml").write_text(yaml.safe_dump(changed))
    plan = versions.plan_of(fixture)
    assert plan.missing == plan.trials
    assert reported.to_report(plan).missing == 0


def released(path: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Note in a file of one's own that today's sources give the numbers of ``version``."""
    (group,) = (group for group in fingerprint.releases_by_numbers() if version in group)
    path.write_text(yaml.safe_dump([{**group, "today": fingerprint.digests()}], sort_keys=False))
    monkeypatch.setattr(fingerprint, "RELEASES", path)


@VERSION
def test_later_keys_stand_for_what_they_stood_for(fixture: Path) -> None:
    """A default that is changed without an entry in ``CHANGED_DEFAULTS`` gives another number the same hash."""
    path, today = fixture / versions.LATER_KEYS, versions.later_keys()
    known = yaml.safe_load(path.read_text()) if path.exists() else {}  # the first version has none
    assert {key: today.get(key, absent) for key, absent in known.items()} == known


def test_the_first_keys_are_keys() -> None:
    """A class that is renamed takes its first keys along."""
    keys = {f"{cls.__qualname__}.{key}" for cls in versions.settings_classes() for key in cls.model_fields}
    assert first_keys.FIRST_KEYS - keys == set()


# --- what later versions add --------------------------------------------------------------------------------


def hashes() -> dict[str, str]:
    """Of the lab's presets, with a component of each kind."""
    return {preset: schema.load(preset).hash for preset in ("twinflow", "lab", "published", "simpletuner")}


def test_a_later_key_changes_no_hash(request: pytest.FixtureRequest) -> None:
    before = hashes()
    request.getfixturevalue("later")
    assert schema.load("twinflow").model_dump()["swap"] == {"every": 4}, "the later version"
    assert hashes() == before


def test_a_later_key_with_another_value_counts(later: None, tmp_path: Path) -> None:
    plain = schema.load("twinflow")
    found = [schema.load("twinflow", [f"{key}={json.dumps(value)}"]) for key, value in KEYS.items()]
    assert len({plain.hash, *(settings.hash for settings in found)}) == 1 + len(KEYS)
    state = {"config": plain.numeric() | {"seed": 0}, "content_hash": "data"}
    for key, settings in zip(KEYS, found, strict=True):
        with pytest.raises(InputError, match="other values of " + key.partition(".")[0]):
            check_unchanged(settings, "data", state)
        again = {"config": settings.numeric() | {"seed": 0}, "content_hash": "data"}
        check_unchanged(stored(settings, tmp_path / key), "data", again)


def stored(settings: schema.RunConfig, folder: Path, without: tuple[str, ...] = ()) -> schema.RunConfig:
    """The settings, read from a run directory, in whose file keys are missing."""
    plain = yaml.safe_load(dump(settings))
    for path in without:
        *sections, key = path.split(".")
        section = plain
        for name in sections:
            section = section[name]
        del section[key]
    folder.mkdir()
    (folder / CONFIG).write_text(yaml.safe_dump(plain))
    return RunDirectory(folder).settings()


def test_a_changed_default_is_another_configuration(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Where a run has stored no such key, it means the default that the key came with."""
    before = schema.load("twinflow")
    request.getfixturevalue("change")
    came = ("train.patience=2", "swap.every=3", "optim.decoupled=false", "ladder={kind: adamw, decoupled: false}")
    assert schema.load("twinflow", list(came)).hash == before.hash
    assert len({before.hash, *(schema.load("twinflow", [*came[:k], *came[k + 1 :]]).hash for k in range(4))}) == 5
    today = schema.load("twinflow")
    assert (today.train.patience, today.swap.every, today.optim.decoupled) == (3, 4, True)
    old = stored(today, tmp_path / "old", ("train.patience", "swap", "optim.decoupled", "ladder"))
    assert (old.train.patience, old.swap.every, old.optim.decoupled, old.ladder.decoupled) == (2, 3, False, False)
    assert old.hash == before.hash
    assert stored(today, tmp_path / "new") == today


def test_a_key_of_ones_own_class_always_counts() -> None:
    """Its runs keep their hashes, too, and its source says what has changed."""

    class Own(LaterAdamW):
        size: int = 1

    assert "size" not in Own.later_keys()
    assert Own().model_dump(context=config.IDENTITY).keys() >= {"size", "lr"}
    with pytest.raises(ValidationError):
        Own(sizes=1)


# --- releases -----------------------------------------------------------------------------------------------


def test_releases_of_the_same_numbers_count_as_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [{"1": ["a", "b"], "2": ["c", "d"]}, {"3": ["e", "b"]}, {"4": ["f", "g"], "5": ["h", "g"]}]
    (tmp_path / "releases.yaml").write_text(yaml.safe_dump(groups))
    monkeypatch.setattr(fingerprint, "RELEASES", tmp_path / "releases.yaml")
    found = {digest: fingerprint.first_with_its_numbers(digest) for digest in "abcdefghx"}
    assert "".join(found.values()) == "ababefgfx", "of each, in order"


@pytest.mark.slow
def test_a_release_joins_the_last_one_only_with_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, (last, *_) = tmp_path / "releases.yaml", reversed(FIXTURES)
    shutil.copytree(last, tmp_path / last.name)
    path.write_text(yaml.safe_dump([{last.name: ["a", "b", "c", "d"]}]))
    monkeypatch.setattr(fingerprint, "RELEASES", path)
    assert versions.release("next", False, tmp_path) == ""
    assert fingerprint.releases_by_numbers() == [{last.name: ["a", "b", "c", "d"], "next": fingerprint.digests()}]
    log = versions.run_of(tmp_path / last.name) / "log.jsonl"
    log.write_text(log.read_text().replace('"loss/total": ', '"loss/total": 1'))
    assert versions.release("next", False, tmp_path).startswith("loss/total at step 1")
    assert versions.release("next", True, tmp_path) == ""
    assert fingerprint.releases_by_numbers()[1] == {"next": fingerprint.digests()}
