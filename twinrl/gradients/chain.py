"""Chains of rules as configured: one for each term, one for the sum."""

from collections.abc import Mapping
from fractions import Fraction
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from twinrl.config import Settings, component, named
from twinrl.config.components import checked
from twinrl.flow.schedules import Schedule
from twinrl.gradients.gradient import Gradient
from twinrl.gradients.transforms import TRANSFORMS, RuleContext, Transform

if TYPE_CHECKING:
    Rule: TypeAlias = Any
else:
    Rule = component(TRANSFORMS)


class TelemetryConfig(Settings):
    """What is measured beside norms and clip coefficients, which are free."""

    shares_every: int = Field(
        1,
        ge=0,
        description="steps between signed shares g_i·g/‖g‖²; needs one gradient buffer per term, which of a GPU "
        "lies in the host's memory; 0 = never",
    )
    cosines_every: int = Field(
        10, ge=0, description="steps between pairwise cosines of the terms; same buffers as shares; 0 = never"
    )
    rms_every: int = Field(1, ge=0, description="steps between RMS_t from Adam's state; no buffer; 0 = never")
    update_every: int = Field(10, ge=0, description="steps between update/weight ratios; one buffer; 0 = never")

    def due(self, what: Literal["shares", "cosines", "rms", "update"], step: int) -> bool:
        """Whether something is measured at this step."""
        every: int = getattr(self, f"{what}_every")
        return every > 0 and step % every == 0


class GradientsConfig(Settings):
    """Per-term gradients: where they are taken apart, what changes them, what is measured.

    A chain is a mapping from the rule's name to its settings, in order: ``{zclip: {}, clip: {max_norm: 1}}``.
    """

    space: Literal["parameter", "output", "none"] = Field(
        "parameter",
        description="parameter: exact gradient of each term (one buffer more); output: each term's gradient at the "
        "predictions, one backward; none: the sum alone",
    )
    terms: dict[str, dict[str, Rule]] = Field(default_factory=dict, description="rules of single terms, by term")
    each: dict[str, Rule] = Field(default_factory=dict, description="rules of every term that has none of its own")
    total: dict[str, Rule] = Field(default_factory=dict, description="rules of the summed gradient")
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="before")
    @classmethod
    def _kind_defaults_to_name(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        for key in ("each", "total"):
            if isinstance(value.get(key), Mapping):
                value[key] = named(value[key])
        if isinstance(value.get("terms"), Mapping):
            value["terms"] = {
                term: named(rules) if isinstance(rules, Mapping) else rules
                for term, rules in value["terms"].items()
                if rules is not None
            }
        return value

    @model_validator(mode="after")
    def _possible(self) -> "GradientsConfig":
        chains = [*self.terms.values(), self.each]
        if self.space == "none" and any(chains):
            raise ValueError("rules of single terms need gradients.space=parameter or output, got none")
        rules = [(name, TRANSFORMS.find(rule.kind)) for chain in chains for name, rule in chain.items()]
        for name, rule in rules:
            if rule.needs_parameters and self.space == "output":
                raise ValueError(f"{name} compares with the weights; it needs gradients.space=parameter, got output")
        for name, rule in self.total.items():
            if TRANSFORMS.find(rule.kind).needs_others:
                raise ValueError(f"total.{name} compares a term with the others; put it under gradients.terms")
        return self

    def check_terms(self, known: tuple[str, ...]) -> None:
        """Raises ValueError where a rule is for a term that is not there, or all terms wait for each other."""
        for name in self.terms:
            if name not in known:
                raise ValueError(f"gradients.terms.{name}: there is no such term; terms: {', '.join(known)}")
        if self.space != "none" and known and all(self.needs_others(name) for name in known):
            raise ValueError("gradients: every term has a rule relative to the others; leave one without")

    def check_schedules(self, steps: int, renoise_end: Fraction | None) -> None:
        """Raises InputError where a scheduled rule ends before it starts in a run of ``steps``."""
        for chain in (*self.terms.values(), self.each, self.total):
            for rule in chain.values():
                for _, value in rule:
                    if isinstance(value, Schedule):
                        value.check(steps, renoise_end)

    def rules(self, term: str) -> Mapping[str, Any]:
        """The chain of a term's gradient."""
        return self.terms.get(term, self.each)

    def needs_others(self, term: str) -> bool:
        """Whether the term's rules need the sum of the others first."""
        return any(TRANSFORMS.find(rule.kind).needs_others for rule in self.rules(term).values())

    @property
    def separate(self) -> bool:
        """Whether forward passes should serve one set of terms each."""
        return self.space == "parameter"

    @property
    def order(self) -> dict[str, list[str]]:
        """Chain → its rules' names in order: what a hash over sorted keys does not see."""
        chains = {f"terms.{term}": rules for term, rules in self.terms.items()}
        return {name: list(rules) for name, rules in {**chains, "each": self.each, "total": self.total}.items()}


class Chain:
    """Rules applied one after the other."""

    def __init__(self, rules: Mapping[str, Any]):
        self.rules: dict[str, Transform] = {name: TRANSFORMS.build(rule) for name, rule in rules.items()}

    def __call__(self, gradient: Gradient, context: RuleContext) -> None:
        """Change ``gradient`` in place."""
        for rule in self.rules.values():
            returned: Any = rule(gradient, context)
            checked(returned, NoneType, rule, "__call__")  # in place: a gradient that is returned would be lost

    def state(self) -> dict[str, Any]:
        """State of the rules with memory, by name."""
        return {name: state for name, rule in self.rules.items() if (state := rule.state())}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        for name, values in state.items():
            if name in self.rules:
                self.rules[name].load(values)
