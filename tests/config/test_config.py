"""Configuration: strict loading with one-line errors, overrides, components by dotted path, and the hash."""

import copy
import inspect
import os
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, Field
from torch import Tensor

from twinrl import config
from twinrl.backends import NETWORKS
from twinrl.config import Settings
from twinrl.config.errors import InputError
from twinrl.flow.branches import Rows
from twinrl.terms import TERMS, Query, Target, Term, TermConfig
from twinrl.terms.losses import LOSSES
from twinrl.terms.term import own
from twinrl.training import runs, schema
from twinrl.training.optim import LR_POLICIES, OPTIMIZERS

PRESET = pytest.mark.parametrize("preset", config.presets())


def refused(name: str, *overrides: str) -> str:
    """The message that refuses a configuration; one line always."""
    with pytest.raises(InputError) as caught:
        schema.load(name, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


# --- extends and merge --------------------------------------------------------------------------------------


def test_extends_lays_key_over_key(tmp_path: Path) -> None:
    write(tmp_path, "first.yaml", "extends: twinflow\noptim: {lr: 1e-3, eps: 2e-8}\nseed: 4\n")
    loaded = schema.load(write(tmp_path, "second.yaml", "extends: first.yaml\noptim: {eps: 1e-8}\n"))
    assert (loaded.optim.lr, loaded.optim.eps, loaded.seed, loaded.name) == (1e-3, 1e-8, 4, "second")
    assert loaded.terms == schema.load("twinflow").terms


def test_extended_paths_are_relative_to_the_extending_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    write(tmp_path / "inside", "base.yaml", "extends: rcgm\nseed: 7\n")
    write(tmp_path, "base.yaml", "extends: rcgm\nseed: 8\n")
    top = write(tmp_path / "inside", "top.yaml", "extends: base.yaml\n")
    monkeypatch.chdir(tmp_path)
    assert schema.load(top).seed == 7


def test_circular_extends_names_the_circle(tmp_path: Path) -> None:
    write(tmp_path, "one.yaml", "extends: two.yaml\n")
    path = write(tmp_path, "two.yaml", "extends: one.yaml\n")
    assert "circle; got two → one → two" in refused(path)
    assert "circle" in refused(write(tmp_path, "self.yaml", "extends: self.yaml\n"))


def test_null_removes_a_mapping_and_unsets_a_value() -> None:
    assert list(schema.load("tutorial", ["terms.rectify=null", "terms.adversarial=null"]).terms) == [
        "base", "real_velocity", "one_step_consistency",
    ]  # fmt: skip
    assert schema.load("twinflow", ["terms.rectify.clamp=null"]).terms["rectify"].clamp is None


def test_settings_of_the_default_network_need_no_kind() -> None:
    assert schema.load("twinflow", ["model.network.width=64"]).model.network.width == 64
    assert schema.load("twinflow", ["model.network.kind=mlp"]).hash == schema.load("twinflow").hash
    assert "unknown key model.network.wdith; did you mean width?" in refused("twinflow", "model.network.wdith=3")


def test_another_kind_replaces_all_settings_of_the_old_one() -> None:
    """Settings of one kind mean nothing to another: ``clamp`` must not leak into real_velocity."""
    changed = schema.load("twinflow", ["terms.rectify={kind: real_velocity, branches: [mul]}"]).terms["rectify"]
    assert changed == TERMS["real_velocity"].Config(branches=("mul",))
    loss = schema.load("twinflow", ["terms.base.loss.c=0.1", "terms.base.loss={kind: l2}"]).terms["base"].loss
    assert loss == LOSSES["l2"].Config()


@pytest.mark.parametrize(
    ("key", "kind", "setting"),
    [("terms.base", "base", "weight: 2"), ("optim", "adamw", "eps: 2e-8"), ("lr_policy", "constant", "warmup: 2")],
)
def test_naming_the_kind_that_is_meant_anyway_changes_nothing(key: str, kind: str, setting: str) -> None:
    first = ["optim.lr=0.5"]
    said = schema.load("twinflow", [*first, f"{key}={{kind: {kind}, {setting}}}"])
    assert said == schema.load("twinflow", [*first, f"{key}={{{setting}}}"])
    assert said.terms["base"].branches == ("e2e", "mul", "any")
    assert said.optim.lr == 0.5


def test_settings_may_be_laid_over_a_bare_name() -> None:
    """``loss: barron`` in the preset, ``loss.c`` in an override."""
    loss = schema.load("twinflow", ["terms.base.loss.c=0.01"]).terms["base"].loss
    assert loss == LOSSES["barron"].Config(c=0.01)


def test_merge_leaves_its_arguments_alone() -> None:
    base, over = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 3}, "d": None}
    before = copy.deepcopy((base, over))
    assert config.merge(base, over) == {"a": {"b": 3, "c": [1]}, "d": None}
    assert (base, over) == before


# --- overrides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["5e-4", "5.e-4", "5.0e-4", ".0005", "+5E-4", "0.0005"])
def test_scientific_notation_is_a_number(text: str) -> None:
    assert schema.load("twinflow", [f"optim.lr={text}"]).optim.lr == 5e-4
    assert config.override({}, [f"a.b={text}"]) == {"a": {"b": 5e-4}}


def test_values_keep_their_types() -> None:
    given = ["a=3", "b=true", "c=null", "d=e5", "e=[1, 2e0]", "f={g: 1e1}", "h=x=y", "i=", "j=1-2"]
    expected = {"a": 3, "b": True, "c": None, "d": "e5", "e": [1, 2.0], "f": {"g": 10.0}, "h": "x=y", "i": None}
    assert config.override({}, given) == expected | {"j": "1-2"}


def test_later_overrides_win() -> None:
    assert schema.load("twinflow", ["optim.lr=1", "optim.lr=2"]).optim.lr == 2


@pytest.mark.parametrize("text", ["optim.lr", "=3", "--fresh"])
def test_not_an_assignment(text: str) -> None:
    assert "expected key.path=value" in refused("twinflow", text)


def test_malformed_value() -> None:
    assert "malformed value" in refused("twinflow", "optim.betas=[1,")


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("optm.lr=1", "optm", "optim"),
        ("optim.lrr=1", "optim.lrr", "lr"),
        ("train.stps=5", "train.stps", "steps"),
        ("terms.base.wieght=2", "terms.base.wieght", "weight"),
        ("terms.base.loss={kind: barron, alfa: 1}", "terms.base.loss.alfa", "alpha"),
        ("model.network={kind: mlp, widht: 3}", "model.network.widht", "width"),
        ("lr_policy={kind: plateau, patiense: 3}", "lr_policy.patiense", "patience"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, key: str, hint: str) -> None:
    assert refused("twinflow", override) == f"unknown key {key}; did you mean {hint}?"


def test_unknown_key_with_nothing_near_lists_the_valid_ones() -> None:
    known = "every, keep, asynchronous, on_error"
    assert refused("twinflow", "checkpoint.zzz=1") == f"unknown key checkpoint.zzz; valid keys: {known}"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.steps=many", ["train.steps: input should be a valid integer", "'many'"]),
        ("train.steps=0", ["train.steps: input should be greater than or equal to 1, got 0"]),
        ("train.steps=1.5", ["train.steps", "1.5"]),
        ("optim.lr=-1", ["optim.lr: input should be greater than 0, got -1"]),
        ("optim.lr=.nan", ["optim.lr", "nan"]),
        ("optim.betas=[0.9, 1]", ["optim.betas", "less than 1, got 1"]),
        ("train=5", ["train: ", "got 5"]),
        ("train.precision=fp16", ["train.precision", "'float32', 'bf16' or 'float64'", "'fp16'"]),
        ("teacher.decay=1.2", ["teacher.decay", "less than or equal to 1"]),
        ("guidance.range=[1, 0]", ["guidance: range (1.0, 0.0) is empty; expected lo < hi"]),
        ("terms.adversarial.time_range=[0.9, 0.1]", ["terms.adversarial: time_range (0.9, 0.1)", "lo < hi"]),
        ("terms.base.order=0", ["terms.base.order", "greater than or equal to 1, got 0"]),
        ("terms.base.loss=hubber", ["terms.base.loss: unknown loss 'hubber'; expected one of l2, barron"]),
        ("terms.base=7", ["terms.base: expected a name or a mapping with `kind`"]),
        ("terms.bse={}", ["terms.bse: unknown term 'bse'; expected one of base, "]),
        ("optim.kind=sgd", ["optim: unknown optimizer 'sgd'; expected one of adam, adamw, adamw8bit, radam"]),
        ("branches.anny=1", ["branches.anny is unknown; did you mean any?"]),
        ("branches.adv=-1", ["finite shares ≥ 0"]),
        ("branches.adv=.nan", ["finite shares ≥ 0"]),
        ("branches.adv=.inf", ["finite shares ≥ 0"]),
        ("branches.adv=0", ["terms.adversarial.branches: branch adv has no rows in the mix; the mix has e2e, mul"]),
        ("terms.base.branches=[]", ["terms.base.branches", "at least 1 item"]),
        ("train.batch=3", ["train.batch is too small", "branch adv gets no row", "got 3 rows", "raise train.batch"]),
        ("teacher.kind=live", ["teacher: a live-student teacher", "teacher.kind=ema", "teacher.allow_live=true"]),
        ("teacher.guidance=live", ["teacher.allow_live=true"]),
        ("name=a/b", ["name: ", "'a/b'"]),
        ("data.source=imagenet", ["data.source", "one of digits, lab, mnist, folder, prompts"]),
    ],
)  # fmt: skip
def test_wrong_values_say_where_what_and_what_is_expected(override: str, parts: list[str]) -> None:
    message = refused("twinflow", override)
    assert all(part in message for part in parts), message


def test_live_teacher_with_its_waiver() -> None:
    loaded = schema.load("twinflow", ["teacher.kind=live", "teacher.allow_live=true"])
    assert loaded.teacher.kind == "live"


def test_no_terms() -> None:
    assert "terms is empty" in refused("flow_matching", "terms.base=null")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "did you mean twinflow?" in refused("twinflw")
    assert "no configuration at" in refused(str(tmp_path / "none.yaml"))
    assert "is not a mapping; got list" in refused(write(tmp_path, "list.yaml", "[1, 2]\n"))
    assert "is not valid YAML" in refused(write(tmp_path, "broken.yaml", "a: [1\n"))
    assert "key seed twice" in refused(write(tmp_path, "twice.yaml", "seed: 1\nseed: 2\n"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    assert "cannot be read" in refused(str(tmp_path / "binary.yaml"))


# --- components by dotted path ------------------------------------------------------------------------------

OWN = """
from typing import Literal
from pydantic import Field
from torch import Tensor
from twinrl.config import Settings
from twinrl.terms.losses import SampleLoss
from twinrl.terms.term import Target, Term, TermConfig, own

class Pull(Term):
    class Config(TermConfig):
        kind: str
        strength: float = Field(1.0, gt=0, description="of the pull")

    def query(self, rows, ctx):
        return own(rows)

    def target(self, rows, query, F, ctx):
        return Target(self.config.strength * rows.v)

class Absolute(SampleLoss):
    class Config(Settings):
        kind: str

    def __call__(self, F: Tensor, target: Tensor) -> Tensor:
        return (F - target).abs().flatten(1).mean(1)

class Kindless(Pull):
    Config = TermConfig

class Bare:
    pass
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_users_terms.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "a_users_terms"


def test_dotted_path_brings_its_own_parameters(own_module: str) -> None:
    given = [f"terms.mine={{kind: {own_module}.Pull, strength: 3, branches: [mul]}}"]
    loaded = schema.load("twinflow", given)
    assert loaded.terms["mine"].strength == 3
    term = TERMS.build(loaded.terms["mine"])
    assert isinstance(term, Term)
    assert type(term).__name__ == "Pull"
    again = config.validate(schema.RunConfig, yaml.load(runs.dump(loaded), config.loading._Loader))
    assert again == loaded
    assert loaded.hash != schema.load("twinflow", [given[0].replace("3", "4")]).hash


def test_dotted_path_as_a_key(own_module: str) -> None:
    """On the command line, where keys are divided at dots, it means what it means inside YAML."""
    path = f"{own_module}.Pull"
    inside = [f"terms={{{path}: {{strength: 3, branches: [mul]}}}}"]
    divided = [f"terms.{path}.strength=3", f"terms.{path}.branches=[mul]"]
    loaded = schema.load("twinflow", divided)
    assert loaded == schema.load("twinflow", inside)
    assert (loaded.terms[path].kind, loaded.terms[path].strength) == (path, 3)
    again = schema.load("twinflow", [*inside, f"terms.{path}.strength=4"]).terms[path]
    assert (again.strength, again.branches) == (4, ("mul",))


@pytest.mark.parametrize(
    ("key", "form"),
    [
        ("optim.mine.SGD.lr=1", "unknown key optim.mine; a class of your own is a value: kind=mine.SGD"),
        ("lr_policy={mine.rates.Fall: {}}", "unknown key lr_policy.mine.rates.Fall; .* kind=mine.rates.Fall"),
        ("judges.mine.Judge={}", "judges.mine: expected a name .*as in kind=my_file.MyClass"),
        ("data.source.mine.Data={}", "data.source: input should be a valid string, without keys .*; fix: data.source="),
        ("gradients.total.mine.Rule={}", "gradients.total.mine.Rule: .*'mine.Rule' cannot be imported"),
    ],
)
def test_dotted_path_where_none_can_be(key: str, form: str) -> None:
    assert re.match(form, refused("lab", key))


def test_dotted_path_of_a_loss_is_built_by_the_term(own_module: str) -> None:
    loaded = schema.load("rcgm", [f"terms.base.loss={own_module}.Absolute"])
    term = TERMS.build(loaded.terms["base"])
    assert type(term.row_loss).__name__ == "Absolute"


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("Pull, strength: -1", "terms.mine.strength: input should be greater than 0"),
        ("Pull, strenth: 1", "unknown key terms.mine.strenth; did you mean strength?"),
        ("Missing", "cannot be imported"),
        ("Bare", "is no term"),
        ("Kindless", "declare `kind: str`"),
    ],
)
def test_dotted_path_that_is_wrong(own_module: str, path: str, part: str) -> None:
    message = refused("rcgm", f"terms.mine={{kind: {own_module}.{path}}}")
    assert part in message
    assert "terms.mine" in message


def test_dotted_path_to_no_module() -> None:
    assert "cannot be imported" in refused("rcgm", "terms.base.kind=no.such.Term")


def test_dotted_path_to_this_module() -> None:
    """A class of a module that is already loaded, named as it names itself."""
    loaded = schema.load("rcgm", [f"terms.mine={{kind: {__name__}.Doubled}}"])
    assert isinstance(TERMS.build(loaded.terms["mine"]), Doubled)


class Doubled(Term):
    class Config(TermConfig):
        kind: str
        factor: float = Field(2.0, description="of the velocity")

    def query(self, rows: Rows, ctx: Any) -> Query:
        return own(rows)

    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Any) -> Target:
        return Target(self.config.factor * rows.v)


# --- presets, round trip, hash ------------------------------------------------------------------------------


@PRESET
def test_every_preset_survives_its_own_yaml(preset: str, tmp_path: Path) -> None:
    loaded = schema.load(preset)
    assert loaded.name == preset
    dumped = runs.dump(loaded)
    again = schema.load(write(tmp_path, "other-name.yaml", dumped))
    assert again == loaded
    assert again.hash == loaded.hash
    assert runs.dump(again) == dumped


def test_presets_are_what_method_says() -> None:
    assert {"tutorial", "rcgm", "twinflow", "simpletuner", "flow_matching"} <= set(config.presets())
    assert list(schema.load("rcgm").terms) == ["base"]
    assert len({schema.load(preset).hash for preset in config.presets()}) == len(config.presets())


BOOKKEEPING = [
    "name=x", "seed=5", "run.dir=elsewhere", "tracking.mlflow=false", "tracking.experiment=e", "tracking.uri=u",
    "checkpoint.every=7", "checkpoint.keep=9", "machine.threads=3", "machine.device=cpu",
]  # fmt: skip


def test_hash_ignores_name_seed_and_bookkeeping() -> None:
    plain = schema.load("twinflow").hash
    assert {schema.load("twinflow", [change]).hash for change in BOOKKEEPING} == {plain}
    assert schema.load("twinflow", BOOKKEEPING).hash == plain


def test_hash_ignores_the_order_of_keys_because_the_numbers_do() -> None:
    reordered = ["branches=null", "branches={adv: 1, any: 1, e2e: 1, mul: 1}"]
    loaded = schema.load("twinflow", reordered)
    assert loaded.hash == schema.load("twinflow").hash
    assert list(loaded.branches) == ["e2e", "mul", "any", "adv"]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """All values of nested mappings and lists that are neither."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
        return
    for key, inner in items:
        yield from leaves(inner, (*path, key))


def altered(value: Any) -> list[Any]:
    """Other values of the same type, at least one of which should be valid."""
    if isinstance(value, bool):
        return [not value]
    others = [value + 1, value * 0.5, value * 0.5 + 0.25] if isinstance(value, int | float) else []
    return [other for other in others if other != value]


def replaced(value: Any, path: tuple[Any, ...], leaf: Any) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = leaf
    return value


@pytest.mark.parametrize("preset", ["tutorial", "twinflow", "simpletuner"])
def test_every_number_and_switch_changes_the_hash(preset: str) -> None:
    """Each numeric leaf outside the bookkeeping, altered alone, gives a new hash."""
    loaded = schema.load(
        preset, ["gradients.total.clip.max_norm=1", "terms.rectify.clamp=1", "lr_policy=plateau", "train.micro_batch=4"]
    )
    dumped, hashes, tried = loaded.model_dump(mode="json"), {loaded.hash}, []
    for path, value in leaves(dumped):
        if path[0] in schema.NOT_NUMERIC_KEYS:
            continue
        for other in altered(value):
            try:
                changed = schema.RunConfig.model_validate(replaced(dumped, path, other))
            except ValueError:
                continue
            assert changed.hash not in hashes, path
            hashes.add(changed.hash)
            tried.append(path)
            break
    numeric = [path for path, value in leaves(dumped) if path[0] not in schema.NOT_NUMERIC_KEYS and altered(value)]
    assert len(tried) > 0.9 * len(numeric) > 40, sorted(set(numeric) - set(tried))


def test_differing_keys() -> None:
    a, b = {"x": {"y": 1, "z": 2}, "w": [1]}, {"x": {"y": 1, "z": 3}, "w": [1], "v": None, "u": 0}
    assert config.differing_keys(a, b) == ["u", "x.z"]
    assert config.differing_keys(a, a) == []


# --- documentation ------------------------------------------------------------------------------------------


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A settings class and every settings class among its fields' types."""
    yield model
    for field in model.model_fields.values():
        for inner in settings_in(field.annotation):
            yield from sections(inner)


def settings_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, Settings):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from settings_in(argument)


def all_settings() -> list[type[BaseModel]]:
    registries = (TERMS, LOSSES, NETWORKS, OPTIMIZERS, LR_POLICIES)
    roots = [schema.RunConfig, *(cls.Config for registry in registries for cls in registry.values())]
    return list(dict.fromkeys(inner for root in roots for inner in sections(root)))


@pytest.mark.parametrize("model", all_settings(), ids=lambda model: model.__qualname__)
def test_every_field_is_documented_and_strict(model: type[BaseModel]) -> None:
    """``kind`` is the name in a registry and needs no words; a section is described by its class."""
    assert issubclass(model, Settings)
    assert model.model_config["frozen"]
    assert model.model_config["extra"] == "forbid"
    for name, field in model.model_fields.items():
        if name != "kind" and not any(settings_in(field.annotation)):
            assert field.description, f"{model.__qualname__}.{name}"


def test_the_walk_over_the_schema_reaches_everything() -> None:
    names = {model.__qualname__ for model in all_settings()}
    assert {"RunConfig", "GuidanceConfig", "EvaluationConfig", "EarlyStop.Config", "Barron.Config"} <= names
    assert {"Rectify.Config", "TimeLaw", "Plateau.Config", "MachineConfig"} <= names


# --- files that are no configuration ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a {b: *a}\n", "refers to itself"),
        ("a: &a [1, 1, 1]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: [*c, *c, *c, *c]\n", "refers to itself"),
        (f"extends: lab\nseed: {'7' * 5000}\n", "seed: unable to parse"),
        (f"extends: lab\nseed: {'7' * 400}\n", "seed: input should be less"),
        ("extends: lab\nmachine: {threads: 1000000}\n", "machine.threads: input should be less than or equal to 1024"),
        ("extends: lab\ntrain: null\n", "train: "),
        ("extends: lab\ntrain:\n- steps\n", "train: "),
        ("[" * 100_000, "not valid YAML"),
        ("name: 2026-13-45\n", "not valid YAML; got no timestamp: month must be in 1..12"),
        ("name: !!bool x\n", "not valid YAML; got no bool"),
        ("name: !!timestamp x\n", "not valid YAML; got no timestamp"),
        ("extends: lab\nterms: {rectify: {weight: " + "1" * 2_000_000 + "}}", "expected at most 1,000,000"),
    ],
)  # fmt: skip
def test_what_is_no_configuration_is_refused_in_one_short_line(text: str, words: str, tmp_path: Path) -> None:
    message = refused(write(tmp_path, "c.yaml", text))
    assert words in message
    assert len(message) < 600


def test_one_message_tells_of_every_mistake_or_how_many_there_are() -> None:
    message = refused("lab", "train.steps=many", "optim.lr=-1", "terms.rectify.clampp=1")
    assert "train.steps: input should be a valid integer" in message
    assert "unknown key terms.rectify.clampp" in message
    assert "optim.lr: input should be greater than 0, got -1" in message
    shares = ", ".join(f"{name}: x" for name in "abcdefghijk")
    assert refused("lab", f"branches={{{shares}}}").endswith(
        "branches.h: input should be a valid number, unable to parse string as a number, got 'x'; and 3 more"
    )


def test_a_section_that_is_a_list_is_not_mended_by_an_override(tmp_path: Path) -> None:
    name = write(tmp_path, "c.yaml", "extends: lab\ntrain:\n- steps\n")
    assert "train is a list and no section" in refused(name, "train.steps=4")


def test_a_null_takes_one_entry_away(tmp_path: Path) -> None:
    assert "rectify" not in schema.load(write(tmp_path, "c.yaml", "extends: twinflow\nterms: {rectify: null}\n")).terms


def test_a_pipe_and_a_name_that_no_file_can_have_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.yaml")
    assert "is no file" in refused(str(tmp_path / "c.yaml"))
    for name in ("n" * 400, f"{'n' * 400}.yaml"):
        assert "no preset or file 'nnn" in refused(name)
