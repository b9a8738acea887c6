"""``twinrl doctor --schema``: whatever a configuration says is among the printed keys, whole and with a meaning."""

from collections.abc import Iterator, Mapping
from io import StringIO
from typing import Any

import pytest
from pydantic import BaseModel
from rich.cells import cell_len
from rich.console import Console

from twinrl import config
from twinrl.commands import doctor
from twinrl.commands.doctor import COMPONENTS, Key
from twinrl.data.settings import PrepareConfig
from twinrl.training import schema


def parts(value: Any) -> Iterator[tuple[str, BaseModel]]:
    """Settings in a value, with the place of names of one's own before them."""
    if isinstance(value, BaseModel):
        yield "", value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from ((f".<name>{between}", inner) for between, inner in parts(item))


def is_component(settings: BaseModel) -> bool:
    return any(
        getattr(kind, "Config", None) is type(settings) for known in COMPONENTS.values() for kind in known.values()
    )


def leaves(settings: BaseModel, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all values; what is inside a component belongs to its kind."""
    for key, value in settings:
        inside = [(between, inner) for between, inner in parts(value) if not is_component(inner)]
        yield from () if inside else (f"{prefix}{key}",)
        for between, inner in inside:
            yield from leaves(inner, f"{prefix}{key}{between}.")


def components(settings: BaseModel) -> Iterator[Any]:
    """Components at any depth."""
    for _, value in settings:
        for _, inner in parts(value):
            yield from [inner] if is_component(inner) else []
            yield from components(inner)


def named(keys: Iterator[Key] | list[Key]) -> set[str]:
    return {key.name for key in keys}


@pytest.mark.parametrize("preset", config.presets())
def test_every_key_of_a_preset_is_explained(preset: str) -> None:
    settings = schema.load(preset)
    assert set(leaves(settings)) - named(doctor.keys(schema.RunConfig)) == set()
    for part in components(settings):
        known = next(
            known for known in COMPONENTS.values() if getattr(known.get(part.kind), "Config", None) is type(part)
        )
        assert set(leaves(part)) - named(doctor.kinds(known)[part.kind]) == {"kind"}


def every_key() -> Iterator[Key]:
    yield from doctor.keys(schema.RunConfig)
    yield from doctor.keys(PrepareConfig)
    for known in COMPONENTS.values():
        for own in doctor.kinds(known).values():
            yield from own


def test_every_key_has_a_meaning() -> None:
    assert [key.name for key in every_key() if not key.meaning] == []


def test_keys_are_printed_whole() -> None:
    output = StringIO()
    doctor.doctor(True, Console(file=output, soft_wrap=True))
    lines = output.getvalue().splitlines()
    words = {line.split()[0] for line in lines if line.strip()}
    assert named(every_key()) - words == set()
    assert {kind for known in COMPONENTS.values() for kind in known} - words == set()
    assert max(map(cell_len, lines)) <= 120


@pytest.mark.parametrize(
    ("name", "default", "words"),
    [
        ("model.lora.rank", "64", "rank of the update"),
        ("evaluation.guided.nfe", "8", "few-step evaluations"),
        ("stability.policy", "stop", "one of record, zero, skip, cut_lr, cut_lr+skip, rollback, stop"),
        ("train.micro_batch", "null", "null = all at once"),
        ("data.images", "true", "image-free training"),
    ],
)
def test_a_line(name: str, default: str, words: str) -> None:
    (found,) = (key for key in doctor.keys(schema.RunConfig) if key.name == name)
    assert found.default == default
    assert words in found.meaning
