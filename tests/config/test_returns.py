"""Own components whose methods return something else: one line that names the method, with its file and line.

The components are those of docs/extending.md, each with one method replaced.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests import pages
from tests.fake_source import SMALL, register
from twinrl import cli

SECTIONS = pages.sections("extending")
METHODS = {
    "Loss term": ("Smoothness", ("query", "target", "loss", "loss_parts")),
    "Per-sample loss": ("PseudoHuber", ("__call__",)),
    "Reward": ("Symmetry", ("__call__", "state", "modules")),
    "Gradient estimator": ("Normalised", ("pixel_gradient",)),
    "Renoise family": ("Power", ("at",)),
    "Schedule": ("Wave", ("value", "span", "extremes")),
    "Gradient rule": ("WarmUp", ("state",)),
    "Optimizer": ("SGD", ("make",)),
    "Learning-rate policy": ("InverseRoot", ("factor", "state")),
    "Data source": (
        "Bars",
        ("latents", "encode", "decode", "prompts", "condition", "null_condition", "to"),
    ),
}
"""Section → its class, and what of it is replaced."""
WRONG = ("None", "__import__('torch').zeros(3, 5)", "'text'", "float('nan')", "[]")
OTHERS = [
    ("Renoise family", "PowerLaw", "sample"), ("Renoise family", "PowerLaw", "parameters"),
    ("Data source", "Judge", "features"), ("Data source", "Judge", "logits"),
]  # fmt: skip
CASES = [(section, cls, method) for section, (cls, methods) in METHODS.items() for method in methods] + OTHERS
EACH = [
    pytest.param(*case, wrong, marks=[pytest.mark.campaign] * (wrong not in WRONG[:2] and case[2] != "factor"))
    for case in CASES
    for wrong in WRONG
]


@pytest.mark.slow
@pytest.mark.parametrize(("section", "cls", "method", "wrong"), EACH)
def test_what_is_returned_is_told(
    section: str, cls: str, method: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    register(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    ((file, text),) = pages.files(SECTIONS[section]).items()
    module = f"wrong_{abs(hash((section, method, wrong)))}"
    made = f"lambda *given, **more: {wrong}"
    if method in ("extremes", "mean"):
        made = f"property({made})"
    text = text.replace(Path(file).stem, module) + f"\n\n{cls}.{method} = {made}\n"
    (tmp_path / f"{module}.py").write_text(text)
    (command,) = pages.commands(SECTIONS[section])
    command = command.replace(Path(file).stem, module)
    tiny = [setting for setting in SMALL if setting.partition("=")[0] not in command]
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), *tiny, "train.steps=2", "run.dir=runs"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    last = said.splitlines()[-1]
    assert re.search(rf"{module}\.{cls}\.{method}", last), said
    assert f"{module}.py:{len(text.splitlines())}" in last


MISTAKES = {
    "own losses of other arguments": (
        "A term with a network of its own",
        "def own_losses(self, rows, ctx, update):",
        "def own_losses(self, rows, ctx):",
        "own_losses takes (self, rows, ctx)",
    ),
    "own losses of another network": (
        "A term with a network of its own",
        "return mean_square(ctx.own(self, interpolate(samples, noise, t), t, t, rows.c),",
        "return mean_square(ctx.student(interpolate(samples, noise, t), t, t, rows.c),",
        "losses that depend on ctx.own",
    ),
    "a loss without a gradient": (
        "Per-sample loss",
        "(mean_square(F, target)",
        "(mean_square(F.detach(), target)",
        "losses that depend on F",
    ),
    "times of another format": (
        "Renoise family",
        "return u **",
        "return u.double() **",
        "torch.float32, as of its argument",
    ),
    "times out of range": ("Renoise family", "return u **", "return 3 * u **", "times in [0, 1]"),
    "a source without a place": ("Data source", "def __init__(self, root):", "def __init__(self):", "expected (place)"),
    "a metric of the trainer's": (
        "Loss term",
        "query.r, query.c))",
        "query.r, query.c), {'loss/total': query.t})",
        "begins otherwise than loss/",
    ),
    "half of the parameters": ("Optimizer", "SGD(parameters,", "SGD(parameters[:2],", "one over all"),
    "a negative factor": ("Learning-rate policy", "return super()", "return -super()", "a number ≥ 0"),
}
"""What → section, what stands there, what stands there instead, what is said."""


@pytest.mark.slow
@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_told_in_one_line(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    section, right, wrong, said = MISTAKES[what]
    ((file, text),) = pages.files(SECTIONS[section]).items()
    assert text.count(right) == 1
    name, module = Path(file).stem, f"mistake_{list(MISTAKES).index(what)}"
    (tmp_path / f"{module}.py").write_text(text.replace(right, wrong).replace(f"{name}.", f"{module}."))
    command = next(line for line in pages.commands(SECTIONS[section]) if "train lab" in line).replace(
        f"{name}.", f"{module}."
    )
    if section == "Renoise family":
        command += " renoise.placement=training"
    tiny = [setting for setting in SMALL if setting.partition("=")[0] not in command]
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), *tiny, "train.steps=2", "evaluation.every=0"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in told
    assert told.startswith("twinrl: ")
