"""A study's YAML and the arms that it stands for.

    base: lab                        # a preset or a YAML file
    set: {train.steps: 1000}         # for every arm
    factors:
      teacher:
        live: {teacher.decay: 0.0, teacher.allow_live: true}
        ema:  {teacher.decay: 0.995}
      rate:
        full:  {optim.lr: 1.0e-3}
        tenth: {optim.lr: 1.0e-4}
    design: {kind: grid}
    seeds: 3

The seed is a factor that crosses every arm. All of twinrl's draws are keyed by (seed, purpose, step), so arms of one
seed are paired: the same initial weights, data order, times and noise.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from ablations.design import DESIGNS, Factors
from twinrl.config import PRESETS, Settings, component, load_mapping, nearest, read_yaml, validate
from twinrl.config.errors import InputError
from twinrl.run import names
from twinrl.training import schema
from twinrl.training.schema import RunConfig

if TYPE_CHECKING:
    DesignSettings: TypeAlias = Any
else:
    DesignSettings = component(DESIGNS)

STUDIES = Path(__file__).parent / "studies"
MOST_TRIALS = 100_000
LONGEST_NAME = 100
SET_BY_STUDY = ("seed", "name", "run", "tracking", "machine", "launch")
"""First keys of the configuration that a study sets by itself."""


class Resources(Settings):
    """What one trial occupies."""

    cpus: int = Field(1, ge=1, description="CPU cores, and threads, of each process")
    gpus: float = Field(0, ge=0, description="GPUs of each process; below 1, trials share one")
    workers: int = Field(1, ge=1, description="processes of a trial, placed together on one machine; its ranks")


class Budget(Settings):
    """When `run` stops starting trials; what is in flight is checkpointed, and the next `run` goes on."""

    trials: int | None = Field(None, ge=1, description="most new trials of one `run`")
    minutes: float | None = Field(None, gt=0, description="wall-clock minutes of one `run`")


class Stop(Settings):
    """What may end a trial before its last step."""

    kind: Literal["divergence", "asha"] = Field(
        "divergence",
        description="divergence: only the trainer's own policies; asha: also successive halving, which censors",
    )
    grace_steps: int = Field(500, ge=1, description="asha: steps that no trial is denied")
    reduction: int = Field(3, ge=2, description="asha: one in this many goes on at each rung")


class Margin(Settings):
    """Bisection for the largest healthy learning rate (`ablate margin`)."""

    low: float = Field(1e-5, gt=0, description="a learning rate believed healthy")
    high: float = Field(1e-1, gt=0, description="a learning rate believed too large")
    tolerance: float = Field(1.25, gt=1, description="ends when the bracket's ratio is below this")
    steps: int = Field(1000, ge=1, description="steps that an arm must survive")
    warmup_steps: int = Field(
        0, ge=0, description="steps of the base configuration that every probe of a seed starts from; 0: its own start"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "Margin":
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        return self


class StudyConfig(Settings):
    """What a study's YAML may say."""

    name: str = Field(description="names its folder and its tags in MLflow; default: the file's name")
    question: str = Field("", description="what the study is to answer, in a sentence")
    base: str = Field("lab", description="preset or YAML file that every arm starts from")
    set: dict[str, Any] = Field(default_factory=dict, description="key.path: value for every arm")
    factors: dict[str, dict[str, dict[str, Any]]] = Field(
        default_factory=dict, description="factor → level → {key.path: value}"
    )
    design: DesignSettings = Field(default="grid", validate_default=True, description="which combinations to run")
    seeds: list[int] = Field([0], description="seeds of every arm: a number of them, or a list")
    metric: str = Field(names.VAL_QUALITY, description="logged metric shown for each arm; smaller is better")
    resources: Resources = Resources()
    budget: Budget = Budget()
    stop: Stop = Stop()
    retries: int = Field(1, ge=0, description="further attempts for a trial whose process failed")
    margin: Margin = Margin()

    @field_validator("seeds", mode="before")
    @classmethod
    def _a_number_of_seeds(cls, value: object) -> object:
        return seed_list(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("seeds")
    @classmethod
    def _usable_seeds(cls, value: list[int]) -> list[int]:
        if not value or min(value) < 0 or len(set(value)) < len(value):
            raise ValueError(f"expected distinct seeds ≥ 0, at least one, got {value}")
        return value

    @field_validator("name")
    @classmethod
    def _usable_name(cls, value: str) -> str:
        return _plain(value, "name of a study")

    @field_validator("factors", mode="before")
    @classmethod
    def _levels_have_names(cls, value: object) -> object:
        """Numbers may name levels (``1e-3: {optim.lr: 1e-3}``); words that YAML takes for true and false may not."""
        if not isinstance(value, Mapping) or not all(isinstance(levels, Mapping) for levels in value.values()):
            return value
        for name in (*value, *(level for levels in value.values() for level in levels)):
            if isinstance(name, bool) or name is None:
                raise ValueError(f"a name reads as {name}: YAML takes on, off, yes, no and null so; put it in quotes")
        return {str(factor): {str(level): own for level, own in levels.items()} for factor, levels in value.items()}

    @field_validator("factors")
    @classmethod
    def _several_levels(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for factor, levels in value.items():
            _plain(factor, "name of a factor")
            if len(levels) < 2:
                raise ValueError(f"factor {factor} has {len(levels)} level, expected two or more")
            if factor == "seed":
                raise ValueError("seed is no factor of its own; `seeds: 5` crosses every arm with seeds 0 to 4")
            for level in levels:
                _printable(level, f"name of a level of {factor}")
        return value

    @model_validator(mode="after")
    def _not_too_many(self) -> "StudyConfig":
        combinations = math.prod(len(levels) for levels in self.factors.values())
        arms = combinations if self.design.kind == "grid" else 1
        if (trials := arms * len(self.seeds)) > MOST_TRIALS:
            raise ValueError(
                f"{arms:,} arms of {len(self.seeds):,} seeds are {trials:,} trials, expected at most {MOST_TRIALS:,}"
            )
        return self


def _plain(name: str, what: str) -> str:
    """A name that is a folder's and a parameter's in MLflow, too."""
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_. -]*[A-Za-z0-9_-])?", name):
        raise ValueError(f"{name!r} can't be the {what}: use letters a to z, digits, spaces and _ . - inside")
    return name


def _printable(name: str, what: str) -> str:
    """A name that is one line, in tables and in MLflow, and no path."""
    if not name or len(name) > LONGEST_NAME or not name.isprintable() or re.search(r"[/\\]", name):
        raise ValueError(
            f"{name[:LONGEST_NAME]!r} can't be the {what}: use at most {LONGEST_NAME} characters of one line without "
            "slashes"
        )
    return name


def seed_list(number: int) -> list[int]:
    """Seeds 0 … number − 1. Raises InputError for less than one, and for more than a study can have trials."""
    if not 1 <= number <= MOST_TRIALS:
        raise InputError(
            "a study needs seeds, not too many", got=f"{number:,}", expected=f"1 to {MOST_TRIALS:,}",
            fix="seeds: 5 makes seeds 0 to 4",
        )  # fmt: skip
    return list(range(number))


@dataclass(frozen=True)
class Arm:
    """One configuration of a study, whatever the seed.

    Attributes:
        name: in tables and MLflow.
        levels: factor → level, as far as the arm has them.
        settings: its configuration with seed 0, before anything that belongs to the machine.
    """

    name: str
    levels: Mapping[str, str]
    settings: RunConfig

    @cached_property
    def hash(self) -> str:
        """Of its settings."""
        return self.settings.hash


@dataclass(frozen=True)
class Study:
    """A validated study: every arm's configuration loads, and no two are equal.

    Arguments:
        config: as written.
        folder: of its file; ``base`` may be a file beside it.
    """

    config: StudyConfig
    folder: Path = field(default_factory=Path)

    @property
    def name(self) -> str:
        """The study's name."""
        return self.config.name

    @property
    def factors(self) -> Factors:
        """Factor → names of its levels."""
        return {factor: tuple(levels) for factor, levels in self.config.factors.items()}

    @cached_property
    def design(self) -> Any:
        """The design."""
        return DESIGNS.build(self.config.design)

    @cached_property
    def arms(self) -> list[Arm]:
        """The arms in the design's order. Raises InputError where one can't be built, or two are equal."""
        arms = [self._arm(name, chosen) for name, chosen in self.design.arms(self.factors).items()]
        self._check_levels_differ(arms[0])
        _check_distinct(arms)
        return arms

    @property
    def unwatched(self) -> str:
        """The arms that are judged at their end alone, where a fall has no date and may not be seen, and why."""
        arms = [a.name for a in self.arms if not 0 < a.settings.evaluation.every < a.settings.train.steps]
        if not arms:
            return ""
        named = "every arm" if len(arms) == len(self.arms) else ", ".join(arms[:3]) + ", …" * (len(arms) > 3)
        return f"{named}: evaluation.every gives no evaluation before the last step"

    @cached_property
    def _base(self) -> tuple[dict[str, Any], str]:
        """What the base says, and its name."""
        beside = self.folder / self.config.base
        preset = (PRESETS / f"{self.config.base}.yaml").is_file()
        base = str(beside) if not preset and beside.is_file() else self.config.base
        return load_mapping(base), Path(base).stem

    def base(self, overrides: Mapping[str, Any] | None = None) -> RunConfig:
        """The configuration that arms start from, with ``{key.path: value}`` laid over it."""
        values = {**self.config.set, **(overrides or {})}
        return schema.made(*self._base, [_assignment(key, value) for key, value in values.items()])

    def _arm(self, name: str, chosen: Mapping[str, Any]) -> Arm:
        if not name or not name.isprintable():
            raise InputError(
                f"study {self.name}: {name!r:.100} can't be the name of an arm", expected="one line of text"
            )
        levels = {factor: str(level) for factor, level in chosen.items() if factor in self.factors}
        own = {key: value for key, value in chosen.items() if key not in self.factors}
        return Arm(name, levels, self._load(f"arm {name}", self._overrides(levels) | own))

    def _overrides(self, levels: Mapping[str, str]) -> dict[str, Any]:
        """The levels' overrides, later factors over earlier ones where two set the same key."""
        parts = (self.config.factors[factor][level] for factor, level in levels.items())
        return {key: value for part in parts for key, value in part.items()}

    def _load(self, where: str, overrides: Mapping[str, Any]) -> RunConfig:
        try:
            return self.base(overrides)
        except InputError as error:
            raise InputError(f"study {self.name}, {where}: {error}") from error

    def _check_levels_differ(self, arm: Arm) -> None:
        """Raises InputError where two levels of a factor give one configuration, all else as in ``arm``."""
        for factor in arm.levels:
            seen: dict[str, str] = {}
            for level in self.config.factors[factor]:
                levels = {**arm.levels, factor: level}
                found = self._load(f"factor {factor}, level {level}", self._overrides(levels)).hash
                if found in seen:
                    raise InputError(
                        f"study {self.name}: level {level} of factor {factor} changes nothing",
                        got=f"the same configuration as level {seen[found]}, all else as in arm {arm.name}",
                        fix="give it other values, or remove it",
                    )  # fmt: skip
                seen[found] = level


def _check_distinct(arms: list[Arm]) -> None:
    names: dict[str, str] = {}
    for arm in arms:
        same = names.setdefault(found := arm.hash, arm.name)
        if same != arm.name:
            raise InputError(
                f"arms {same} and {arm.name} are equal", got=f"the same configuration {found}",
                fix="remove one, or let them differ",
            )  # fmt: skip


def _assignment(key: str, value: Any) -> str:
    """``key.path=value`` as the command line takes it; JSON is YAML."""
    if key.split(".")[0] in SET_BY_STUDY:
        raise InputError(f"a study can't set {key}", fix="use seeds, resources and the command line's options")
    try:
        return f"{key}={json.dumps(value, allow_nan=False)}"
    except (TypeError, ValueError) as error:
        raise InputError(f"the value of {key} can't be used", got=value, expected="finite numbers and text") from error


def shipped() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def load(name: str, seeds: int | None = None) -> Study:
    """The study of a YAML file or of a shipped study's name; ``seeds`` replaces the file's by 0 … seeds − 1.

    Raises:
        InputError: one line saying what is wrong with it.
    """
    path = STUDIES / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        raise InputError(f"no study {name!r}", fix=f"{nearest(name, dict.fromkeys(shipped()))}, or name a YAML file")
    mapping = read_yaml(path)
    mapping.setdefault("name", path.stem)
    if seeds is not None:
        mapping["seeds"] = seed_list(seeds)
    study = Study(validate(StudyConfig, mapping), path.parent)
    _ = study.arms
    _check_halving(study)
    return study


def _check_halving(study: Study) -> None:
    """Raises InputError where successive halving would wait for validations that never come in time."""
    stop = study.config.stop
    for arm in study.arms if stop.kind == "asha" else []:
        every = arm.settings.evaluation.every
        if every == 0 or every > stop.grace_steps:
            raise InputError(
                f"study {study.name}: asha compares validations, and arm {arm.name} has none within grace_steps",
                got=f"evaluation.every {every}", expected=f"1 to {stop.grace_steps}",
            )  # fmt: skip
