"""What a simulation says, of every preset at small sizes: it runs, and the host waits no more often than it may."""

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tests.backends.families import tiny
from tests.fake_source import SMALL
from tests.fake_source import small as small_run
from tests.rewards import tiny as tiny_rewards
from tests.training.allocator import allocated
from twinrl import config
from twinrl.backends.families import FAMILIES
from twinrl.commands.simulate import Simulator, simulate
from twinrl.config.errors import InputError
from twinrl.data.dataset import CACHE_FORMAT, MANIFEST, BucketRow, Manifest
from twinrl.training import schema
from twinrl.training.simulated import Report

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("simulated")]

QUICK = ("recommended", "tutorial", "sd35")
WAITS, QUEUED = 8, 2
"""Most waits of a step, and most of them with work queued."""
NETWORK = [SMALL[2], "data.source=tests.fake_source.ByPath", "train={steps: 40, batch: 16}"]
REWARD = ["terms.reward={branches: [e2e]}", "reward={model: brightness}", "gradients.terms.reward.clip.max_norm=1"]


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    with Simulator() as running:
        yield running


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Descriptions of a tiny pipeline of every family, and of a tiny CLIP."""
    base = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        tiny.build(name).save_pretrained(base / name)
    described = base / "z_image" / "transformer" / "config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"axes_lens": [1024, 128, 128]}))
    tiny_rewards.hf_clip().save_pretrained(base / "clip")
    return base


def small(preset: str, models: Path) -> list[str]:
    """What makes a preset's run a small one."""
    settings = schema.load(preset)
    if not settings.model.is_pretrained:
        forward = [
            f"terms.{n}.derivative=difference" for n, term in settings.terms.items() if hasattr(term, "derivative")
        ]
        return [*NETWORK, *forward, *(["reward.model=brightness"] if settings.reward else [])]
    family = str(settings.model.family)
    given = [f"model.path={models / family}", "train={batch: 8, micro_batch: null}"]
    clip = f"reward.model={{kind: clipscore, checkpoint: {models / 'clip'}}}"
    return [*given, *([clip] if settings.reward else [])]


def check_waits(report: Report) -> None:
    """Fails with the lines that are waited at."""
    lines = "\n".join(f"{wait.times} {wait.kind} {wait.line}" for wait in report.waits)
    assert report.waited <= WAITS, lines
    assert report.queued <= QUEUED, lines


def _presets() -> Iterator[object]:
    """Those that differ most are quickly proved, the others in a campaign."""
    for preset in config.presets():
        yield pytest.param(preset, marks=[] if preset in QUICK else pytest.mark.campaign)


@pytest.mark.parametrize("preset", _presets())
def test_every_preset(simulator: Simulator, models: Path, preset: str) -> None:
    report = simulator.report(preset, small(preset, models))
    assert report.flops > 0
    assert report.peak.bytes >= sum(report.held.values()) > 0
    check_waits(report)


@pytest.mark.parametrize(
    "family", ["qwen_image", *(pytest.param(name, marks=pytest.mark.campaign) for name in ("sd3", "z_image"))]
)
def test_ranks(simulator: Simulator, models: Path, family: str) -> None:
    overrides = [f"model={{family: {family}, path: {models / family}, gradient_checkpointing: true}}", *REWARD,
                 "data={source: folder}", "train={batch: 32, micro_batch: 4, steps: 40, precision: bf16}"]  # fmt: skip
    report = simulator.report("twinflow", overrides, processes=8)
    check_waits(report)
    assert set(report.messages) == {"gather", "reduce-scatter", "all-reduce", "broadcast"}


@pytest.mark.campaign
def test_more_ranks_hold_less_of_the_states(simulator: Simulator, models: Path) -> None:
    overrides = [
        f"model={{family: sd3, path: {models / 'sd3'}}}",
        "data={source: folder}",
        "train={batch: 16, steps: 9}",
    ]
    alone, four = (simulator.report("twinflow", overrides, processes=n) for n in (1, 4))
    for owner in ("student", "average", "optimizer"):
        assert four.held[owner] < alone.held[owner] / 2  # tensors are padded to 512 bytes each


SIZES = {
    "mlp": "{kind: mlp, width: 512, depth: 3, condition_width: 256}",
    "dit": "{kind: dit, patch: 2, width: 256, depth: 3, heads: 4, condition_width: 64}",
}


@pytest.mark.parametrize("network", SIZES)
def test_bytes_are_those_that_the_allocator_gives_out(simulator: Simulator, tmp_path: Path, network: str) -> None:
    """On the CPU, in float32: there a device's attention has no kernel, and other operations are cast."""
    overrides = [
        f"model.network={SIZES[network]}", NETWORK[1], "train={batch: 256, steps: 40, init: random}",
        "gradients.telemetry={shares_every: 0, cosines_every: 0}",  # whose gradients are on the host, here the device
    ]  # fmt: skip
    report = simulator.report("twinflow", overrides)
    states = sum(report.peak.owners[owner] for owner in ("student", "average", "optimizer"))
    assert report.peak.bytes - states == pytest.approx(allocated(small_run(tmp_path, *overrides)), rel=0.05)


def test_what_fails_on_a_device_is_said_with_its_line(simulator: Simulator) -> None:
    overrides = [*NETWORK, "terms={mixed: {kind: tests.training.mixed.Mixed, branches: [any]}}", "branches={any: 1}"]
    with pytest.raises(InputError, match=r"tests/training/mixed\.py:\d+.*device"):
        simulator.report("twinflow", overrides)


def _memory(said: str) -> list[str]:
    return said[: said.index("in all")].splitlines()


def test_the_command_says_all_of_it_or_the_memory() -> None:
    shown = Console(width=200, file=StringIO())
    assert simulate("twinflow", NETWORK, 2, shown, "H200") == 0
    said = shown.file.getvalue()  # type: ignore[attr-defined]
    memory = ("on 2 GPUs", "peak of memory", "optimizer", "backward")
    others = ("FLOP", "on an H200", "reduce-scatter", "waits of the host")
    for part in (*memory, *others):
        assert part in said, part
    shown = Console(width=200, file=StringIO())
    assert simulate("twinflow", NETWORK, 2, shown) == 0
    told = shown.file.getvalue()  # type: ignore[attr-defined]
    assert [part in told for part in (*memory, *others)] == [True] * len(memory) + [False] * len(others)
    assert _memory(told) == _memory(said)


def test_latents_beyond_a_models_positions(simulator: Simulator, models: Path, tmp_path: Path) -> None:
    bucket = BucketRow(name="8192x8192", width=8192, height=8192, latent_shape=(4, 1024, 1024))
    made = Manifest(format=CACHE_FORMAT, encoder="x", content_hash="x", images=True, lengths={}, buckets=[bucket])
    (tmp_path / MANIFEST).write_text(made.model_dump_json())
    given = [f"model={{family: sd3, path: {models / 'sd3'}}}", f"data={{source: folder, root: {tmp_path}}}"]
    with pytest.raises(InputError, match=r"the simulation ends at twinrl/\S+:\d+.*; got .*(height|exceed|size)"):
        simulator.report("twinflow", [*given, "train={batch: 8, steps: 9}"])


@pytest.mark.campaign
def test_judges_are_there_in_every_step_and_equal_ones_once(simulator: Simulator, models: Path) -> None:
    clip = f"kind: clipscore, checkpoint: {models / 'clip'}"
    run = [f"model={{family: sd3, path: {models / 'sd3'}}}", "data={source: folder}", "train={batch: 8, steps: 9}",
           REWARD[0], f"reward={{model: {{{clip}}}, held_out: {{same: {{{clip}}}}}}}"]  # fmt: skip
    half = f"judges.half={{{clip}, dtype: bf16}}"
    alike, another, never = (
        simulator.report("twinflow", [*run, *more]).held for more in ([], [half], [half, "evaluation.every=0"])
    )
    assert "judges" not in alike
    assert another["judges"] == pytest.approx(alike["reward"] / 2, rel=0.2)  # tensors are padded to 512 bytes each
    assert "judges" not in never


@pytest.mark.parametrize("option", ["fsdp.cpu_offload=true", "machine.compile=inductor", "optim.kind=adamw8bit"])
def test_what_cannot_be_simulated_is_said(simulator: Simulator, option: str) -> None:
    with pytest.raises(InputError, match=option.partition("=")[0].replace(".", r"\.") + ".* is not simulated"):
        simulator.report("twinflow", [*NETWORK, option], processes=2)


def test_forward_mode_is_not_simulated(simulator: Simulator) -> None:
    with pytest.raises(InputError, match=r"terms\.mean_flow\.derivative=forward is not simulated"):
        simulator.report("meanflow", NETWORK)


@pytest.mark.campaign
def test_models_that_wait_on_the_host_are_simulated(simulator: Simulator, models: Path) -> None:
    """The VAE is on the device while the reward is computed, and not between steps."""
    clip = f"reward={{model: {{kind: clipscore, checkpoint: {models / 'clip'}}}}}"
    run = [f"model={{family: sd3, path: {models / 'sd3'}}}", "data={source: folder}", "train={batch: 8, steps: 9}",
           REWARD[0], clip]  # fmt: skip
    here, there = (simulator.report("twinflow", [*run, f"machine.offload={on}"]) for on in ("false", "true"))
    frozen = here.held["VAE"] + here.held["reward"]
    assert sum(there.held.values()) == sum(here.held.values()) - frozen
    assert there.peaks["reward"].bytes == pytest.approx(here.peaks["reward"].bytes, rel=0.02)
