"""Own components that are wrong: as files, as classes of every registry, in what they return and where they raise."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ablations.design import DESIGNS
from tests.fake_source import TEXT, Dropping, FakeSource, register, small
from tests.objectives import batch_of, counts_of
from twinrl import cli
from twinrl.backends.embedding import Spec
from twinrl.backends.families import family_class
from twinrl.commands import doctor
from twinrl.config import Settings
from twinrl.config.components import ComponentError, Registry, failures_named, own
from twinrl.config.errors import InputError
from twinrl.flow.schedules import Schedule
from twinrl.flow.source import scored
from twinrl.rewards.latent import KeyedRows, LatentReward, LatentRewardConfig
from twinrl.terms import Target, Term
from twinrl.terms.losses import SampleLoss
from twinrl.terms.term import own as own_point
from twinrl.training import assembly, schema, sources
from twinrl.training.optim import LearningRatePolicy, Optimizer

REGISTRIES: dict[str, Registry] = {r.what: r for r in [*doctor.COMPONENTS.values(), DESIGNS]}
EVERY = pytest.mark.parametrize("what", REGISTRIES)
HERE = f"{__name__}.Own"


def refused(registry: Registry, cls: object, monkeypatch: pytest.MonkeyPatch) -> str:
    """The line that refuses a class of this module."""
    monkeypatch.setattr(sys.modules[__name__], "Own", cls, raising=False)
    with pytest.raises(InputError) as caught:
        registry.find(HERE)
    message = str(caught.value)
    assert message.startswith(f"{registry.what} {HERE!r}")
    assert "\n" not in message
    return message


def filled(base: type) -> dict[str, Any]:
    """Bodies for the abstract methods and properties of a base, with its arguments."""
    bodies = {name: lambda self, *arguments: None for name in getattr(base, "__abstractmethods__", ())}
    return {name: body if callable(getattr(base, name)) else property(body) for name, body in bodies.items()}


# --- classes ------------------------------------------------------------------------------------------------


def test_the_registries_are_all_of_different_kinds() -> None:
    assert len(REGISTRIES) == len(doctor.COMPONENTS) + 1 == 11


@EVERY
def test_a_class_of_another_base(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = REGISTRIES[what]
    message = refused(registry, type("Own", (), {"Config": Settings}), monkeypatch)
    assert f"is no {what}; got the class Own; fix: derive it from {registry.bases[0].__module__}." in message
    assert "got function" in refused(registry, filled, monkeypatch)


@EVERY
def test_abstract_methods_left(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = REGISTRIES[what]
    for base in registry.bases:
        if left := sorted(getattr(base, "__abstractmethods__", ())):
            assert f"lacks {', '.join(left)}; fix: write what" in refused(registry, _under(base), monkeypatch)
    assert left or what == "learning-rate policy"  # whose base is whole


def _under(base: type, **members: Any) -> type:
    """A class that derives from ``base``; of a schedule, which is its own settings, with the annotations it needs."""
    return type(base)("Own", (base,), {"__module__": __name__, **members})


@EVERY
def test_settings_without_kind_or_of_another_base(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = REGISTRIES[what]
    for base in registry.bases:
        if issubclass(base, Schedule):
            continue  # it is its own settings, and has a kind
        config: type = base.Config  # type: ignore[attr-defined]
        plain = type(config)("Config", (config,), {"__module__": __name__, "__qualname__": "Own.Config"})
        message = refused(registry, _under(base, **filled(base), Config=dict), monkeypatch)
        assert f"has no nested Config class; fix: derive it from {config.__module__}.{config.__name__}" in message
        if "kind" not in config.model_fields:  # type: ignore[attr-defined]
            message = refused(registry, _under(base, **filled(base), Config=plain), monkeypatch)
            assert "has a Config without `kind`; fix: declare `kind: str` in it" in message


@EVERY
def test_methods_with_other_arguments(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = REGISTRIES[what]
    for base in registry.bases:
        for name in getattr(base, "__abstractmethods__", ()):
            if callable(getattr(base, name)):
                other = filled(base) | {name: lambda self: None}
                message = refused(registry, _under(base, **other), monkeypatch)
                assert f": {name} takes (self) at tests/config/test_components.py:" in message
                assert "expected (" in message


def test_what_needs_not_be_written_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    terms, schedules = REGISTRIES["term"], REGISTRIES["schedule"]
    flagged = _under(Term, **filled(Term), wants_reward=True)
    assert ": wants_reward takes (True); expected (config)" in refused(terms, flagged, monkeypatch)
    bare = _under(Schedule, **filled(Schedule) | {"extremes": lambda self: None})
    assert ": extremes is a method at tests/config/test_components.py:" in refused(schedules, bare, monkeypatch)


def test_a_constructor_with_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(LearningRatePolicy):
        class Config(LearningRatePolicy.Config):
            kind: str

        def __init__(self, config: Any):
            super().__init__(config, 1)

    monkeypatch.setattr(sys.modules[__name__], "Own", Own, raising=False)
    registry = REGISTRIES["learning-rate policy"]
    with pytest.raises(InputError, match=r"takes \(config\); expected \(Config, int\)"):
        registry.build(Own.Config(kind=HERE), 100)


PLACES = {
    "terms.mine": "terms.mine={{kind: {}}}",
    "terms.base.loss": "terms.base.loss={}",
    "model.network": "model.network={}",
    "renoise": "renoise={}",
    "renoise.alpha": "renoise={{kind: beta, alpha: {{kind: {}}}}}",
    "gradients.total.mine": "gradients.total.mine={}",
    "optim": "optim={}",
    "lr_policy": "lr_policy={}",
    "reward.model": "reward.model={}",
    "judges.mine": "judges.mine={}",
    "reward.gradient.estimator": "reward.gradient.estimator={}",
}


@pytest.mark.parametrize("key", PLACES)
def test_the_configuration_says_where(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "Own", nn.Linear, raising=False)
    with pytest.raises(InputError) as caught:
        schema.load("lab", [PLACES[key].format(HERE)])
    assert str(caught.value).startswith(f"{key}: ")
    assert f"{HERE!r} is no " in str(caught.value)


# --- sources and families -----------------------------------------------------------------------------------


class Sourceless:
    """Encodes, and no more."""

    def encode(self, pixels: Any) -> Any: ...


class Misread(FakeSource):
    def latents(self) -> Any: ...  # type: ignore[override]


class Nameless(FakeSource):
    def __init__(self, root: Path | None):
        super().__init__()
        del self.judge


def test_a_source_of_ones_own() -> None:
    loaded = schema.load("lab", [f"data.source={__name__}.Nameless"])
    with pytest.raises(ComponentError, match=r"Nameless' has no judge; expected what docs/extending.md lists"):
        sources.load(loaded.data.source, None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Sourceless", "lacks latents, prompts, teacher_weights, to, decode, condition, null_condition"),
        ("Misread", "latents takes (self)"),
        ("Missing", "cannot be imported"),
    ],
)
def test_a_source_that_is_none(name: str, words: str) -> None:
    with pytest.raises(InputError, match=r"data\.source: data source") as caught:
        schema.load("lab", [f"data.source={__name__}.{name}"])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_family_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from twinrl.backends.families.family import Family

    monkeypatch.setattr(sys.modules[__name__], "Own", nn.Linear, raising=False)
    with pytest.raises(InputError, match=r"model.family: family .* is no family; got the class Linear"):
        schema.load("twinflow", [f"model={{family: {HERE}, path: x}}", "data={source: folder, root: x}"])
    monkeypatch.setattr(sys.modules[__name__], "Own", _under(Family), raising=False)
    with pytest.raises(InputError, match="lacks _encode_prompts"):
        family_class(HERE)
    monkeypatch.setattr(sys.modules[__name__], "Own", _under(Family, **filled(Family)), raising=False)
    with pytest.raises(InputError, match="lacks NAME, PIPELINE, TRANSFORMER, NETWORK, LORA_TARGETS, BLOCKS"):
        family_class(HERE)


# --- files --------------------------------------------------------------------------------------------------

FILES = {
    "syntax": ("class Near(:\n    pass\n", "SyntaxError: invalid syntax (own_syntax.py:1)"),
    "exit": ("import sys\nsys.exit(3)\n", "SystemExit: 3 (own_exit.py:2)"),
    "raises": ("\nraise RuntimeError('no licence file')\n", "RuntimeError: no licence file (own_raises.py:2)"),
    "without": ("", "module 'own_without' has no attribute 'Near'"),
    "inner": ("import no_such_package\n", "No module named 'no_such_package' (own_inner.py:1)"),
}


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_cannot_be_imported(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, words = FILES[file]
    (tmp_path / f"own_{file}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError) as caught:
        schema.load("lab", [f"terms.near={{kind: own_{file}.Near}}"])
    assert f"terms.near: term 'own_{file}.Near' cannot be imported; got " in str(caught.value)
    assert words in str(caught.value)


def test_a_path_to_no_file() -> None:
    with pytest.raises(InputError, match="fix: check the dotted path"):
        own("no_such_folder.terms.Near", "term", {})


# --- what they return ---------------------------------------------------------------------------------------


class Near(Term):
    """Says what each case makes it say."""

    def query(self, rows: Any, ctx: Any) -> Any:
        return SAYS.get("query", own_point)(rows)

    def target(self, rows: Any, query: Any, F: torch.Tensor, ctx: Any) -> Any:
        return SAYS.get("target", Target)(0 * F)

    def loss(self, rows: Any, query: Any, F: torch.Tensor, target: torch.Tensor) -> Any:
        return SAYS.get("loss", lambda x: x.square().flatten(1).mean(1))(F - target)


SAYS: dict[str, Callable[[Any], Any]] = {}

WRONG = {
    "no query": ({"query": lambda rows: None}, "Near.query returns None"),
    "query of other rows": (
        {"query": lambda rows: dataclasses.replace(own_point(rows), t=rows.t[:1])},
        "Near.query.t returns Tensor of shape (1,)",
    ),
    "bare tensor": ({"target": lambda F: F}, "Near.target returns Tensor of shape (8, 2, 4, 4)"),
    "target of another shape": (
        {"target": lambda F: Target(F[:, :1])},
        "Near.target.value returns Tensor of shape (8, 1",
    ),
    "no loss": ({"loss": lambda x: None}, "Near.loss returns None"),
    "text": ({"loss": lambda x: "small"}, "Near.loss returns str 'small'"),
    "no row axis": ({"loss": lambda x: x.square().mean()}, "Near.loss returns Tensor of shape ()"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_term_that_returns_something_else(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says, words = WRONG[case]
    monkeypatch.setattr(sys.modules[__name__], "SAYS", says)
    with pytest.raises(ComponentError) as caught:
        _losses(Near(Near.Config(loss="l2")), tmp_path)
    method = words.split(".")[1].split()[0]
    assert f"{__name__}.{words}" in str(caught.value)
    line = getattr(Near, method).__code__.co_firstlineno
    assert f" at tests/config/test_components.py:{line}; expected " in str(caught.value)


def _losses(term: Term, tmp_path: Path, network: nn.Module | None = None) -> object:
    """The losses of a term alone on a small network, or on the given one."""
    settings, source = (
        small(tmp_path, "branches=null", "branches={any: 1}", "train.batch=8", preset="rcgm"),
        FakeSource(),
    )
    student = network or Dropping(Dropping.Config(p=0.0), Spec(source.latent_shape, text_width=TEXT))
    x, prompts = source.latents("train")[:8], source.prompts(torch.zeros(8, dtype=torch.long), 0, 0)
    batch = batch_of(settings, x, source.condition(prompts), source.null_condition(8))
    provider = assembly.provider_of(settings, source, torch.device("cpu"))
    objective = dataclasses.replace(assembly.objective_of(provider, student), terms={"near": term})
    return objective.evaluate(batch, counts_of(batch)).losses()


def test_a_loss_without_rows(tmp_path: Path) -> None:
    class Mean(SampleLoss):
        def __call__(self, F: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return (F - target).square().mean()

    term = Near(Near.Config(loss="l2"))
    object.__setattr__(term, "row_loss", Mean(None))
    with pytest.raises(ComponentError, match=r"Mean.__call__ returns Tensor of shape \(\)"):
        Term.loss(term, None, None, torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 2, 2))  # type: ignore[arg-type]


def test_a_network_of_another_shape(tmp_path: Path) -> None:
    class Flat(Dropping):
        def forward(self, *told: Any) -> torch.Tensor:
            return super().forward(*told).flatten(1)

    network = Flat(Flat.Config(p=0.0), Spec((2, 4, 4), text_width=TEXT))
    with pytest.raises(ComponentError, match=r"Flat.forward returns Tensor of shape \(8, 32\) at tests"):
        _losses(Near(Near.Config(loss="l2")), tmp_path, network)


def test_a_reward_and_an_estimator() -> None:
    with pytest.raises(ComponentError, match=r"function.__call__ returns Tensor of shape \(2, 1\); .*expected Tensor"):
        scored(lambda images, prompts: torch.zeros(2, 1), torch.zeros(2, 3, 4, 4), ["", ""])  # type: ignore[arg-type]
    latent = LatentReward(LatentRewardConfig(estimator="vae_backprop"))

    class Silent(type(latent.estimator)):  # type: ignore[misc]
        def latent_gradient(self, *told: Any) -> Any:
            return None

    latent.estimator = Silent(None)
    with pytest.raises(
        ComponentError, match=r"Silent.latent_gradient returns None at tests/config/test_components.py:\d+"
    ):
        latent.gradient(torch.zeros(2, 2, 4, 4), ["", ""], FakeSource(), None, KeyedRows(0, 0, (0, 1)))  # type: ignore[arg-type]


def test_an_optimizer_that_makes_none() -> None:
    class Lazy(Optimizer):
        @staticmethod
        def make(parameters: Any, config: Any) -> Any:
            return len(parameters)

    with pytest.raises(ComponentError, match=r"Lazy.make returns 1 at .* expected torch.optim.optimizer.Optimizer"):
        Lazy.build(None, [nn.Parameter(torch.zeros(1))])  # type: ignore[arg-type]


class Speechless(Schedule):
    kind: str
    says: Any = None

    def value(self, step: int, steps: int, renoise_end: Any = None) -> Any:
        return self.says

    def span(self, steps: int, renoise_end: Any = None) -> Any:
        return 0, steps

    @property
    def extremes(self) -> Any:
        return 1, 1


def test_a_schedule_without_numbers_is_refused_with_the_configuration() -> None:
    with pytest.raises(
        InputError,
        match=r"Speechless.value returns None at tests/config/test_components.py:\d+; expected a finite number",
    ):
        schema.load("lab", [f"renoise={{kind: beta, alpha: {{kind: {__name__}.Speechless}}}}"])
    schema.load("lab", [f"renoise={{kind: beta, alpha: {{kind: {__name__}.Speechless, says: 1}}}}"])


# --- where they raise ---------------------------------------------------------------------------------------

OWN = """from twinrl.terms import Target, Term, TermConfig
from twinrl.terms.term import own


class Near(Term):
    class Config(TermConfig):
        kind: str

    def query(self, rows, ctx):
        return own(rows)

    def target(self, rows, query, F, ctx):
        {line}
"""


def failing(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[str, int]:
    """What `twinrl train` says of a term with this line in it, and where the line is."""
    register(monkeypatch)
    name = f"failing_{abs(hash(line))}"
    text = OWN.format(line=line)
    (folder / f"{name}.py").write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    settings = f"terms.near={{kind: {name}.Near}}", "run.dir=runs", "tracking.mlflow=false", "evaluation.n=20"
    monkeypatch.setattr(sys, "argv", ["twinrl", *options, "train", "lab", "train.batch=16", *settings])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    return name, text.splitlines().index(f"        {line}") + 1


@pytest.mark.slow
@pytest.mark.parametrize("line", ["return Target(F / F.no_such)", "raise SystemExit(0)"])
def test_a_failing_step_is_one_line(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, number = failing(line, tmp_path, monkeypatch)
    error = capsys.readouterr().err
    (said,) = [one for one in error.splitlines() if one.startswith("twinrl: ")]
    assert said.startswith(f"twinrl: {name}.Near.target fails; got ")
    assert f"({name}.py:{number}); fix: --debug shows the traceback" in said
    assert "Traceback" not in error


@pytest.mark.slow
def test_debug_shows_the_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, number = failing("return 1 / 0", tmp_path, monkeypatch, "--debug")
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert f'{name}.py", line {number}, in target' in error
    assert error.splitlines()[-1].startswith(f"twinrl: {name}.Near.target fails; got ZeroDivisionError")


def test_failures_of_twinrl_keep_their_type() -> None:
    with pytest.raises(AttributeError, match="NoneType"):
        failures_named()(schema.load)("lab", [None])  # type: ignore[list-item]
