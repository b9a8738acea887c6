"""A training step at the size of SD3.5-medium on one GPU, beside a step of three networks as DMD2 takes it.

    python benchmarks/large_model.py [--batch 16] [--micro-batch 4] [--steps 10] [--peak-tflops 989]
    python benchmarks/large_model.py --fit                                   # as much of it as the GPU has room for
    python benchmarks/large_model.py --tiny --device cpu --steps 2           # the same code in seconds, without a GPU

The transformer is built from SD3.5-medium's configuration with random weights in bf16, latents are random, of 1024²
pixels: neither a download nor data are needed. In the same run, with the same rows, precision and checkpointing:

*TwinFlow*: the real Trainer's ``train_step`` under the ``sd35`` preset: one network is trained, its average is the
teacher. *Three networks* (DMD2, arXiv:2405.14867): a student, a frozen teacher, and a trained fake-score network. Its
step makes one-step samples, asks teacher (with guidance: twice) and fake network for their velocities there, updates
the student by the difference, and updates the fake network once on new samples (DMD2 itself updates it five times).

*Model FLOPs* are counted by torch in one forward pass on the meta device, f for a row. A row costs f without gradient
and 3·f with (backward is twice the forward); recomputation under gradient checkpointing takes time and is not counted.
Utilisation is model FLOPs over time and the device's peak in dense bf16. Peak memory is the allocator's;
``simulated.py`` puts what ``twinrl doctor --simulate`` says beside it.
"""

import argparse
import gc
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
from random_model import SD3, SIZES, TEXT, RandomLatents, describe, overrides_of, settings_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from twinrl.commands.simulate import Simulator
from twinrl.config.errors import InputError
from twinrl.machine.simulated.work import GPUS
from twinrl.training import assembly
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig
from twinrl.training.trainer import Trainer

FITTING = (("medium", 16, 4), ("medium", 4, 1), ("half", 8, 2), ("small", 8, 4), ("small", 4, 1), ("tiny", 8, 4))
"""Size, batch and micro-batch, the largest first."""
SPARE = 1.25
"""Three networks take more than TwinFlow's step, and so does a device than its tensors."""


# --- TwinFlow -------------------------------------------------------------------------------------------


def twinflow(settings: RunConfig, source: RandomLatents, device: torch.device) -> Callable[[], object]:
    """One step of the real trainer."""
    run = RunDirectory(settings.directory)
    run.start(settings, fresh=True)
    trainer = Trainer(settings, run, source, device, lambda network, step: {})  # type: ignore[arg-type]
    return lambda: trainer.train_step()


def twinflow_rows(settings: RunConfig) -> tuple[int, int]:
    """Rows of a step with and without gradient: see ``step_time.py``, whose tests count them in the real trainer."""
    import step_time

    passes = step_time.joined(settings)
    return sum(passes.with_backward), sum(passes.forward)


# --- three networks -------------------------------------------------------------------------------------


class ThreeNetworks:
    """A DMD2-style step: student, frozen teacher, trained fake-score network.

    Arguments:
        settings: batch, micro-batch, learning rate and precision of the TwinFlow step.
        source: networks, latents and conditions.
        device: of all three networks.
    """

    def __init__(self, settings: RunConfig, source: RandomLatents, device: torch.device):
        self.settings, self.source, self.device = settings, source, device
        self.student, self.fake, self.teacher = (
            source.family.network(settings.model.pretrained).to(device) for _ in range(3)
        )
        self.teacher.requires_grad_(False)
        self.optimizers = {
            network: torch.optim.AdamW(network.parameters(), settings.optim.lr, settings.optim.betas)
            for network in (self.student, self.fake)
        }

    def __call__(self) -> None:
        """Update the student, then the fake-score network."""
        for network, loss in ((self.student, self.generator_loss), (self.fake, self.fake_loss)):
            for rows in torch.arange(self.settings.train.batch).split(self.settings.train.micro_batch or 1):
                loss(len(rows)).backward()
            self.optimizers[network].step()
            self.optimizers[network].zero_grad(set_to_none=True)

    def generator_loss(self, n: int) -> Tensor:
        """‖x̂ − sg(x̂ − (v_fake − v_real))‖² at renoised one-step samples; the real velocity is guided."""
        x = self.sampled(n)
        x_t, t = self.renoised(x.detach())
        with torch.no_grad():
            real, empty, fake = (self.at(network, x_t, t, t) for network in (self.teacher, self.teacher, self.fake))
        return (x - (x.detach() - (fake - 2 * real + empty))).square().mean()

    def fake_loss(self, n: int) -> Tensor:
        """Flow matching of the fake network on one-step samples."""
        with torch.no_grad():
            x = self.sampled(n)
        z = torch.randn_like(x)
        t = torch.rand(n, device=self.device)
        x_t = t.view(-1, 1, 1, 1) * z + (1 - t.view(-1, 1, 1, 1)) * x
        return (self.at(self.fake, x_t, t, t) - (z - x)).square().mean()

    def sampled(self, n: int) -> Tensor:
        """x̂ = z − F(z, 1, 0)."""
        z = torch.randn(n, *self.source.latent_shape, device=self.device)
        ones = torch.ones(n, device=self.device)
        return z - self.at(self.student, z, ones, 0 * ones)

    def renoised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.rand(len(x), device=self.device)
        return t.view(-1, 1, 1, 1) * torch.randn_like(x) + (1 - t.view(-1, 1, 1, 1)) * x, t

    def at(self, network: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            velocity: Tensor = network(x, t, r, self.source.null(len(x)))
        return velocity.float()

    @staticmethod
    def rows(settings: RunConfig) -> tuple[int, int]:
        """Rows of a step with and without gradient: student and fake; teacher twice, fake, and the second samples."""
        return 2 * settings.train.batch, 4 * settings.train.batch


# --- measuring ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One way's line.

    Attributes:
        seconds: median of a step.
        flops: model FLOPs of a step.
        utilisation: of the device's peak; None where that is unknown.
        memory: bytes at the peak; None without an allocator that counts.
        waits: lines of a step at which torch says that the host waits for the device; None where it says nothing.
    """

    name: str
    seconds: float
    flops: float
    utilisation: float | None
    memory: int | None
    waits: list[str] | None = None


def flops_of_a_row(config: dict[str, Any]) -> int:
    """Floating-point operations of one forward pass of one row, counted without values."""
    with torch.device("meta"):
        network = SD3.NETWORK(SD3.TRANSFORMER(**config))
        side, t = config["sample_size"], torch.zeros(1)
        x = torch.zeros(1, config["in_channels"], side, side)
        told = {
            "text": torch.zeros(1, TEXT, config["joint_attention_dim"]),
            "pooled": torch.zeros(1, config["pooled_projection_dim"]),
        }
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            network(x, t, t, told)
    return counter.get_total_flops()


def measure(
    name: str,
    build: Callable[[], Callable[[], object]],
    flops: float,
    steps: int,
    device: torch.device,
    peak: float | None,
) -> Measured:
    """Build, take two steps untimed and ``steps`` timed, and let go of the memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = build()
    for _ in range(2):
        step()
    seconds = measuring.median([measuring.clocked(step, device).wall for _ in range(steps)]).value
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    waits = waits_of(step) if device.type == "cuda" else None
    del step
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Measured(name, seconds, flops, flops / seconds / peak if peak else None, memory, waits)


def waits_of(step: Callable[[], object]) -> list[str]:
    """The lines at which a step waits for a GPU, as torch's own watch says."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in said if "synchroniz" in str(w.message)]


def peak_flops(device: torch.device, given: float | None) -> float | None:
    """The device's peak in FLOP/s, of dense bf16 products."""
    if given is not None:
        return given * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((gpu.half for known, gpu in GPUS.items() if known in name), None)


def fitting(device: torch.device) -> tuple[str, int, int]:
    """The largest of :data:`FITTING` whose simulated peak, and some spare, the device has free; else the last one."""
    if device.type != "cuda":
        return FITTING[-1]
    free, _ = torch.cuda.mem_get_info(device)
    with Simulator() as simulator:
        for size, batch, micro_batch in FITTING[:-1]:
            with tempfile.TemporaryDirectory() as place:
                describe(SIZES[size][1], Path(place))
                report = simulator.report("sd35", overrides_of(batch, micro_batch, Path(place), "cuda"))
            if SPARE * report.peak.bytes <= free:
                return size, batch, micro_batch
    return FITTING[-1]


# --- output ---------------------------------------------------------------------------------------------


def table(result: dict[str, Any], lines: Sequence[Measured]) -> str:
    """The result as Markdown."""
    rows = [
        (
            line.name, f"{line.seconds:.3f}", f"{line.flops / 1e12:.3g}",
            "–" if line.utilisation is None else f"{line.utilisation:.1%}",
            "–" if line.memory is None else f"{line.memory / 1e9:.1f}",
        )
        for line in lines
    ]  # fmt: skip
    head = (
        f"# A step of {result['model']}\n\n{result['parameters'] / 1e9:.3g} B parameters in bf16, batch "
        f"{result['batch']} in micro-batches of {result['micro_batch']}, {result['machine']['device']}, torch "
        f"{result['machine']['torch']}; medians over {result['steps']} steps.\n\nOne row forward: "
        f"{result['flops_of_a_row'] / 1e12:.3g} TFLOP. Rows of a step with / without gradient (3× / 1×): "
        + ", ".join(f"{name} {a} / {b}" for name, (a, b) in result["rows"].items())
        + ".\n\n"
    )
    columns = ("step", "seconds", "model TFLOP", "utilisation", "peak memory (GB)")
    return head + measuring.markdown(columns, rows)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="medium", help="of the transformer")
    parser.add_argument("--tiny", action="store_const", dest="size", const="tiny", help="seconds on a CPU")
    parser.add_argument("--fit", action="store_true", help="size and batch by the memory that the device has free")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step, a multiple of 4")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows of a forward pass with gradient")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each")
    parser.add_argument("--device", default="cuda", help="cuda, or with --tiny cpu")
    parser.add_argument("--peak-tflops", type=float, default=None, help="the device's, dense bf16, if it is not known")
    parser.add_argument("--out", type=Path, help="files to write, no suffix; default: results/large_model[_tiny]")
    given = parser.parse_args(arguments)
    small = given.device == "cpu" and (given.fit or given.size == "tiny")
    if not small and not torch.cuda.is_available():
        raise SystemExit("large_model.py needs a CUDA device of about 80 GB; fix: --tiny --device cpu tries it out")
    try:
        if given.fit:
            given.size, given.batch, given.micro_batch = fitting(torch.device(given.device))
        print(run(given))
    except InputError as error:
        raise SystemExit(str(error)) from error


def run(given: argparse.Namespace) -> str:
    """Measure, write the files, and return the table."""
    model, config = SIZES[given.size]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        describe(config, folder)
        settings = settings_of(given.batch, given.micro_batch, folder, given.device)
        device = assembly.device_of(settings)
        source, peak, row = RandomLatents(config, device), peak_flops(device, given.peak_tflops), flops_of_a_row(config)
        ways = {
            "TwinFlow": (lambda: twinflow(settings, source, device), twinflow_rows(settings)),
            "three networks": (lambda: ThreeNetworks(settings, source, device), ThreeNetworks.rows(settings)),
        }
        lines = [
            measure(name, build, (3 * trained + plain) * row, given.steps, device, peak)
            for name, (build, (trained, plain)) in ways.items()
        ]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in SD3.TRANSFORMER(**config).parameters())
    result = {
        "model": model,
        "size": given.size,
        "parameters": parameters,
        "batch": given.batch,
        "micro_batch": given.micro_batch,
        "steps": given.steps,
        "flops_of_a_row": row,
        "rows": {name: rows for name, (_, rows) in ways.items()},
        "machine": measuring.machine(device),
        "ways": [asdict(line) for line in lines],
    }
    text = table(result, lines)
    name = "large_model" if given.size == "medium" else f"large_model_{given.size}"
    measuring.write(given.out or measuring.RESULTS / name, result, text)
    return text


if __name__ == "__main__":
    main()
