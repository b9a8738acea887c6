"""The whole configuration of a run, assembled from the components' own settings."""

import math
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from twinrl import config as configuration
from twinrl.backends import NETWORKS
from twinrl.backends.families import FAMILIES, family_class
from twinrl.backends.families.diffusion import check_bridge
from twinrl.backends.families.family import Family, FamilyConfig
from twinrl.backends.families.lora import LoraSettings
from twinrl.config import Settings, component, foreign
from twinrl.config.errors import InputError
from twinrl.evaluation import EvaluationConfig
from twinrl.flow.branches import BRANCHES, TimeLaw, allocate
from twinrl.flow.guidance import GuidanceConfig
from twinrl.flow.teacher import TeacherConfig
from twinrl.fsdp.config import FSDPConfig, LaunchConfig
from twinrl.gradients import GradientsConfig
from twinrl.renoise import RENOISE
from twinrl.rewards.guide import RewardConfig
from twinrl.rewards.reward import RewardSettings
from twinrl.run import layout
from twinrl.stability.policy import StabilityConfig
from twinrl.terms import TERMS, gradient_owners
from twinrl.terms.term import check_branches
from twinrl.tracking.store import without_password
from twinrl.training import sources
from twinrl.training.optim import LR_POLICIES, OPTIMIZERS, EarlyStop
from twinrl.training.sources import FAMILY_SOURCES, SOURCES

if TYPE_CHECKING:  # settings of any registered class, or of a user's own by dotted path
    NetworkSettings: TypeAlias = Any
    NetworkSettingsOrNone: TypeAlias = Any
    RenoiseSettings: TypeAlias = Any
    TermSettings: TypeAlias = Any
    OptimizerSettings: TypeAlias = Any
    LearningRateSettings: TypeAlias = Any
else:
    NetworkSettings = component(NETWORKS)
    NetworkSettingsOrNone = NetworkSettings | None
    RenoiseSettings = component(RENOISE)
    TermSettings = component(TERMS)
    OptimizerSettings = component(OPTIMIZERS)
    LearningRateSettings = component(LR_POLICIES)


class TrainConfig(Settings):
    """Length, batch and numbers of training."""

    steps: int = Field(2000, ge=1, description="optimizer steps")
    batch: int = Field(128, ge=1, description="rows of the global batch, all branches together")
    micro_batch: int | None = Field(
        None, ge=1, description="rows per forward pass; smaller batches are accumulated; null = all at once"
    )
    precision: Literal["float32", "bf16", "float64"] = Field(
        "float32", description="bf16 = autocast; times, predictions and residuals stay in float32"
    )
    init: str = Field(
        "teacher",
        description="start: teacher (the source's pretrained flow model), random, or a run directory",
    )
    draws: Literal["batch", "rows"] = Field(
        "batch",
        description="noise: one stream for the whole batch, which every process draws; or one for each row, of which a "
        "process draws its own",
    )


class ModelConfig(Settings):
    """The network and how it is called: a network of one's own, or a family of pretrained models."""

    network: NetworkSettingsOrNone = Field(
        default="mlp", validate_default=True, description="architecture by kind; null where a family is trained"
    )
    target_time: bool = Field(True, description="tell the network r; false sends 0 (SimpleTuner)")
    family: str | None = Field(None, description=f"pretrained model to train: {', '.join(FAMILIES)}")
    path: str | None = Field(None, description="family: folder of its diffusers pipeline, or its name on the hub")
    lora: LoraSettings | None = Field(None, description="family: train adapters only; null = all parameters")
    gradient_checkpointing: bool = Field(False, description="family: recompute blocks in the backward pass")
    dtype: Literal["float32", "bf16"] = Field(
        "float32", description="family: the transformer's weights; adapters are float32 always"
    )
    frozen_dtype: Literal["float32", "bf16"] = Field("float32", description="family: weights of text encoders and VAE")
    float8: bool = Field(
        False, description="family: matrix products of the blocks' linear layers in 8 bits; needs torchao and a GPU "
        "of compute capability 8.9 or newer",
    )  # fmt: skip
    embedded_guidance: float = Field(3.5, ge=0, description="family: guidance that FLUX.1-dev and FLUX.2-dev are told")
    prediction: Literal["epsilon", "v"] | None = Field(
        None, description="family: what a diffusion model predicts; null = the model is a flow"
    )
    diff2flow: bool = Field(
        False, description="family: train a diffusion model as a flow (Diff2Flow); goes with prediction"
    )

    @field_validator("family")
    @classmethod
    def _known_family(cls, value: str | None) -> str | None:
        if value is not None and value not in FAMILIES:
            try:
                family_class(value)
            except InputError as error:
                raise ValueError(str(error)) from error
        return value

    @property
    def is_pretrained(self) -> bool:
        """Whether a pretrained family is trained, not a network of one's own."""
        return self.family is not None

    @property
    def family_class(self) -> type[Family]:
        """The pretrained family."""
        return family_class(str(self.family))

    @property
    def pretrained(self) -> FamilyConfig:
        """The family's settings."""
        return FamilyConfig(**self.model_dump(include=set(FamilyConfig.model_fields)))

    @model_validator(mode="before")
    @classmethod
    def _a_family_has_its_own_network(cls, value: object) -> object:
        if isinstance(value, dict) and value.get("family") is not None:
            return {"network": None, **value}
        return value

    @model_validator(mode="after")
    def _one_or_the_other(self) -> "ModelConfig":
        if self.family is None:
            stray = [name for name in FAMILY_KEYS if getattr(self, name) != ModelConfig.model_fields[name].default]
            if stray:
                raise ValueError(f"{stray[0]} needs a pretrained family; fix: family={', '.join(FAMILIES)}")
            if self.network is None:
                raise ValueError("network is null; expected an architecture, or a family")
        elif self.network is not None:
            raise ValueError(f"network has no effect with family {self.family}; fix: remove it")
        elif self.path is None:
            raise ValueError(f"path is missing; expected the folder or hub name of a {self.family} pipeline")
        if self.float8 and (self.family is None or self.lora is not None):
            raise ValueError("float8 is for families of which all parameters are trained; fix: float8=false")
        if self.family is not None:
            try:
                check_bridge(self.family, self.prediction, self.diff2flow)
            except InputError as error:
                raise ValueError(str(error)) from error
        return self

    @field_validator("network", mode="before")
    @classmethod
    def _kind_defaults_to_mlp(cls, value: object) -> object:
        return configuration.with_kind(value, configuration.IMPLIED_KINDS["network"])


FAMILY_KEYS = tuple(FamilyConfig.model_fields)


class DataConfig(Settings):
    """Where samples come from."""

    source: str = Field(
        "digits", description="digits (embedded lab), lab (one of your own), mnist; for a family: folder, prompts"
    )
    root: Path | None = Field(None, description="folder of the data, where the source needs one")
    lab: str | None = Field(None, description="lab: name or folder of what `twinrl lab build` has made")
    rows: int | None = Field(
        None, ge=1, description="digits, lab, mnist: train on the first so many images; null = all"
    )
    row_multiple: int = Field(
        1, ge=1,
        description="family: rows of each branch are multiples of this in every bucket's batch, where train.batch "
        "allows it; set it to the number of processes",
    )  # fmt: skip
    images: bool = Field(
        True, description="false: image-free training on the student's own one-step samples of the prompts"
    )

    @property
    def place(self) -> Path | None:
        """Where the source lies."""
        return self.root if self.lab is None else Path(self.lab)

    @model_validator(mode="before")
    @classmethod
    def _prompts_have_no_images(cls, value: object) -> object:
        if isinstance(value, dict) and value.get("source") == "prompts":
            return {"images": False, **value}
        return value

    @model_validator(mode="after")
    def _images_where_there_are_some(self) -> "DataConfig":
        if self.source == "prompts" and self.images:
            raise ValueError("images is true, but data.source=prompts has none; fix: data.images=false")
        return self

    @model_validator(mode="after")
    def _a_lab_has_its_name(self) -> "DataConfig":
        if (self.source == "lab") != bool(self.lab):
            raise ValueError(
                f"source is {self.source} and lab is {self.lab or 'null'}; fix: data={{source: lab, lab: NAME}} of "
                "twinrl lab build FOLDER --to NAME"
            )
        return self


class CheckpointConfig(Settings):
    """When the run's state is saved."""

    every: int = Field(500, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    asynchronous: bool = Field(
        False, description="write while training goes on, from a copy in the host's memory; on disk at the next one"
    )
    on_error: Literal["stop", "continue"] = Field(
        "stop",
        description="when the disk is full or away: stop = end with exit code 1; continue = warn and train on, but "
        "the last state of a run must be written",
    )


class RunSection(Settings):
    """Where the run directory goes."""

    dir: Path = Field(Path("runs"), description="parent of the run directories")


class TrackingConfig(Settings):
    """The MLflow view of the run's log."""

    mlflow: bool = Field(True, description="publish the log to MLflow at checkpoints and at the end")
    uri: str | None = Field(None, description="tracking URI; null = $MLFLOW_TRACKING_URI, else sqlite in run.dir")
    experiment: str = Field("twinrl", description="MLflow experiment")

    @field_validator("uri")
    @classmethod
    def _without_password(cls, value: str | None) -> str | None:
        try:
            return without_password(value)
        except InputError as error:
            raise ValueError(str(error)) from error


class MachineConfig(Settings):
    """The device and its threads."""

    device: str = Field("auto", description="auto (a GPU where there is one), cpu, cuda, cuda:1, …")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads; null = torch's default")
    offload: bool = Field(
        False, description="families: VAE and reward models wait on the host and visit the device while they are used"
    )
    compile: str | None = Field(
        None, description="torch.compile every block of student and teachers with this backend, e.g. inductor"
    )


class RunConfig(Settings):
    """Everything that defines a run. ``twinrl doctor --schema`` prints all keys with their meaning."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="first part of the run directory")
    seed: int = Field(0, ge=0, lt=2**63, description="decides initial weights, data order, times and noise")
    train: TrainConfig = TrainConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    branches: dict[str, float] = Field({"any": 1.0}, description=f"share of each branch: {', '.join(BRANCHES)}")
    time: TimeLaw = TimeLaw()
    guidance: GuidanceConfig = GuidanceConfig()
    teacher: TeacherConfig = TeacherConfig()
    renoise: RenoiseSettings | None = Field(None, description="moving distribution of times, by kind; null = none")
    terms: dict[str, TermSettings] = Field(default_factory=dict, description="loss terms by name")
    reward: RewardConfig | None = Field(
        None, description="the reward that terms.reward or terms.adversarial.reward use"
    )
    judges: dict[str, RewardSettings] = Field(
        default_factory=dict, description="rewards by name that validation reports, beside reward.held_out"
    )
    gradients: GradientsConfig = GradientsConfig()
    optim: OptimizerSettings = Field(default="adamw", validate_default=True, description="optimizer by kind")
    lr_policy: LearningRateSettings = Field(
        default="constant", validate_default=True, description="learning-rate policy by kind"
    )
    early_stop: EarlyStop.Config = EarlyStop.Config()
    stability: StabilityConfig = StabilityConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    machine: MachineConfig = MachineConfig()
    launch: LaunchConfig = LaunchConfig()
    fsdp: FSDPConfig = FSDPConfig()
    run: RunSection = RunSection()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def _term_kind_defaults_to_its_name(cls, value: dict) -> dict:
        """``terms: {base: {…}}`` is short for ``{base: {kind: base, …}}``; the optimizer's kind for adamw."""
        value = dict(value)
        if isinstance(value.get("terms"), dict):
            value["terms"] = configuration.named(value["terms"])
        implied = configuration.IMPLIED_KINDS
        return value | {key: configuration.with_kind(value[key], kind) for key, kind in implied.items() if key in value}

    @model_validator(mode="before")
    @classmethod
    def _compile_was_a_key_of_fsdp(cls, value: dict) -> dict:
        """``fsdp.compile`` of older runs; a machine's own setting goes before."""
        if not isinstance(fsdp := value.get("fsdp"), dict) or "compile" not in fsdp:
            return value
        value = value | {"fsdp": {key: each for key, each in fsdp.items() if key != "compile"}}
        if fsdp["compile"] is None or not isinstance(machine := value.get("machine", {}), dict):
            return value
        return value | {"machine": {"compile": fsdp["compile"], **machine}}

    @field_validator("branches")
    @classmethod
    def _in_fixed_order(cls, value: dict[str, float]) -> dict[str, float]:
        """Branches divide the batch in this order, so the order in which they are written changes no number."""
        return {name: value[name] for name in BRANCHES if name in value} | value

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        unknown = [name for name in self.branches if name not in BRANCHES]
        if unknown:
            raise ValueError(f"branches.{unknown[0]} is unknown; {configuration.nearest(unknown[0], BRANCHES)}")
        if not all(0 <= share < math.inf for share in self.branches.values()) or not any(self.branches.values()):
            raise ValueError(f"branches need finite shares ≥ 0 with a positive sum, got {self.branches}")
        if not self.terms:
            raise ValueError("terms is empty; expected at least one loss term, see the presets")
        needs_quality = self.lr_policy.kind == "plateau" or self.early_stop.patience is not None
        if needs_quality and self.evaluation.every == 0:
            raise ValueError("evaluation.every is 0, but lr_policy plateau and early_stop wait for validations")
        if getattr(self.lr_policy, "monitor", "quality") == "objective" and not self.evaluation.objective:
            raise ValueError("lr_policy.monitor is objective, which needs evaluation.objective=true")
        if any(term.kind == "simpletuner_base" for term in self.terms.values()):
            foreign.check_steps(self.evaluation.nfe)
        for name, term in self.terms.items():
            try:
                check_branches(term, self.branches)
            except ValueError as error:
                raise ValueError(f"terms.{name}.branches: {error}") from error
        if self.stability.rolls_back and self.checkpoint.every >= self.train.steps:
            raise ValueError(
                f"stability: rollback has no checkpoint to return to; checkpoint.every {self.checkpoint.every} is not "
                f"below train.steps {self.train.steps}"
            )
        self._check_family()
        self._check_evaluation()
        self._check_reward()
        self.gradients.check_terms(tuple(self.gradient_owners))
        try:
            allocate(self.branches, self.train.batch)
        except InputError as error:
            raise ValueError(str(error)) from error
        return self

    def _check_family(self) -> None:
        """Raises ValueError where model, data and start do not belong together."""
        family, source = self.model.family, self.data.source
        if source in (SOURCES if family else FAMILY_SOURCES):
            wanted = SOURCES if family is None else FAMILY_SOURCES
            raise ValueError(
                f"data.source is {source}, which does not go with model.family={family or 'null'}; "
                f"expected {' or '.join(wanted)}"
                + ("; for pictures of your own: twinrl lab build FOLDER" if family is None else "")
            )
        try:
            sources.find(source, family is not None)
        except InputError as error:
            raise ValueError(f"data.source: {error}") from error
        if family is not None and self.data.rows is not None:
            raise ValueError(
                "data.rows is for laboratories and mnist; for a family prepare a smaller folder (twinrl data)"
            )
        if family is not None and self.train.init == "random":
            raise ValueError("train.init is random, but a family starts from its pretrained weights; fix: teacher")
        if self.machine.offload and self.fsdp.frozen == "sharded":
            raise ValueError(
                "machine.offload keeps VAE and reward models on the host and fsdp.frozen=sharded in parts on the "
                "device; fix: choose one"
            )

    def _check_evaluation(self) -> None:
        """Raises ValueError where validation is asked for what it has not."""
        if self.model.family is None and self.evaluation.reference is not None:
            raise ValueError("evaluation.reference is for families; the lab's images are compared by its own judge")
        if self.evaluation.inception is not None and self.evaluation.reference is None:
            raise ValueError("evaluation.inception needs evaluation.reference, a folder of images")
        twice = [name for name in self.judges if self.reward is not None and name in self.reward.held_out]
        if twice:
            raise ValueError(f"judges.{twice[0]} is in reward.held_out already; fix: give it another name")

    def _check_reward(self) -> None:
        """Raises ValueError where reward, terms and schedules do not belong together."""
        wanting = [n for n, term in self.terms.items() if TERMS.find(term.kind).wants_reward(term)]
        if wanting and self.reward is None:
            raise ValueError(f"terms.{wanting[0]} follows a reward and there is none; fix: reward.model=lab_hps")
        for name, term in self.terms.items():
            known = getattr(self.reward and self.reward.model, "rewards", {})
            if unknown := [member for member in getattr(term, "apart", ()) if member not in known]:
                raise ValueError(
                    f"terms.{name}.apart names {unknown[0]}, which is no member of reward.model; expected "
                    + (f"one of {', '.join(known)}" if known else "reward.model={kind: ensemble, rewards: {…}}")
                )
        if self.reward is not None and not wanting:
            raise ValueError(
                "reward is configured and no term follows it; fix: terms.reward={branches: [e2e]} or "
                "terms.adversarial.reward=one_step; to train without it: reward.schedule.weight=0"
            )
        try:
            end = self.renoise_end()
            for schedule in self.renoise.schedules().values() if self.renoise else ():
                schedule.check(self.train.steps)
            if self.reward is not None:
                self.reward.schedule.weight.check(self.train.steps, end)
            self.gradients.check_schedules(self.train.steps, end)
        except InputError as error:
            raise ValueError(str(error)) from error

    def renoise_end(self) -> Fraction | None:
        """The step at which the renoise schedule stands still; None where there is none."""
        if self.renoise is None:
            return None
        return RENOISE.build(self.renoise).end(self.train.steps)

    @property
    def gradient_owners(self) -> dict[str, tuple[str, ...]]:
        """The gradients that are taken apart, see :func:`twinrl.terms.gradient_owners`."""
        return gradient_owners(self.terms)

    @property
    def hash(self) -> str:
        """8 hex digits over what changes a run's numbers; seed, name and bookkeeping are left out."""
        return configuration.canonical_hash(self.numeric())

    def numeric(self) -> dict[str, Any]:
        """The settings that change a run's numbers, as plain JSON values; the seed is not among them.

        Nor are keys that came after the first ones, where they have their defaults (:class:`twinrl.config.Settings`).
        """
        plain = self.model_dump(mode="json", exclude=NOT_NUMERIC_KEYS, context=configuration.IDENTITY)
        plain["gradients"]["order"] = self.gradients.order  # sorted JSON would forget the order of a chain's rules
        unused = (*FAMILY_KEYS, "family") if self.model.family is None else ("network",)
        plain["model"] = {key: value for key, value in plain["model"].items() if key not in unused}
        if self.model.family is None:
            del plain["data"]["row_multiple"]
        return plain

    @property
    def directory(self) -> Path:
        """``<run.dir>/<name>-<hash>-s<seed>``."""
        return self.run.dir / layout.folder_name(self.name, self.hash, self.seed)


# data.root and model.path are where things lie, not what they are: checkpoints compare the content's hash
_BOOKKEEPING = ("name", "seed", "run", "tracking", "checkpoint", "machine", "launch", "fsdp")
NOT_NUMERIC_KEYS = dict.fromkeys(_BOOKKEEPING, True) | {
    "data": {"root"},
    "evaluation": {"reference", "inception"},
    "model": {"path", "gradient_checkpointing"},
}


def load(name: str, overrides: list[str] | None = None) -> RunConfig:
    """The run configuration of a preset or YAML file, with ``key.path=value`` overrides.

    Raises:
        InputError: one line naming the key, what was got and what is expected.
    """
    return made(configuration.load_mapping(name), Path(name).stem, overrides or [])


def made(mapping: dict[str, Any], name: str, overrides: list[str]) -> RunConfig:
    """:func:`load` given what the preset or file says, for many configurations of one; ``name`` where it has none."""
    mapping = {"name": name} | configuration.override(mapping, overrides)
    foreign.refuse(mapping)
    settings = configuration.validate(RunConfig, sources.with_network(mapping))
    sources.check_root(settings.data.source, settings.data.root)
    return settings
