"""The command line. Parsing only: what the commands do is in ``twinrl.commands``, imported when needed.

Exit codes: 0 ok, 1 the run failed or diverged under a stop policy, 2 the input was wrong (one line on stderr),
130 interrupted with a checkpoint written.
"""

import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Literal

import typer

from twinrl import __version__
from twinrl.config.components import ComponentError, failures_named, look_in
from twinrl.config.errors import DISK, InputError, of_system, of_threads
from twinrl.machine import streams
from twinrl.machine.memory import end_without_search, importing
from twinrl.tracking.store import without_password

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train few-step generators with TwinFlow, loss term by loss term, and find out what makes them diverge.\n\n"
    "Start with:  twinrl train lab  (with a reward: twinrl train recommended)",
)

DEBUG = "--debug"

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.PATH=VALUE]...", help="overrides, e.g. train.steps=2000 optim.lr=5e-4 seed=1"),
]
PrepareOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.PATH=VALUE]...",
        help="overrides, e.g. buckets.sizes=qwen-image read.caption_column=text batch=8",
    ),
]
RunArgument = Annotated[Path, typer.Argument(help="a run directory, e.g. runs/lab-1a2b3c4d-s0")]
StepOption = Annotated[int | None, typer.Option(help="checkpoint of this step instead of the newest")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"twinrl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(DEBUG, help="also show the traceback behind a one-line error")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="show the version", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """What every command takes, anywhere on its line; :func:`main` reads it."""


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="a preset (`twinrl doctor` lists them) or a YAML file")],
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over: delete this run's directory first")] = False,
) -> None:
    """Train a new run.

    It goes to runs/<name>-<hash>-s<seed>/ and ends in a table, sample grids and curves. Ctrl-C writes a
    checkpoint first; `twinrl resume` goes on from there, bit for bit.
    """
    with importing():
        from twinrl.training import schema
    settings = schema.load(config, overrides or [])
    with importing():
        from twinrl.commands.processes import train as command

    raise typer.Exit(command(settings, fresh, _console()))


@app.command()
def resume(run: RunArgument) -> None:
    """Continue an unfinished run from its newest checkpoint."""
    with importing():
        from twinrl.commands.processes import resume as command

    raise typer.Exit(command(run, _console()))


@app.command()
def sample(
    run: RunArgument,
    nfe: Annotated[int, typer.Option(min=1, help="network evaluations per sample")] = 1,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="what to draw; may be repeated; default: every class, of a family four validation prompts"),
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="samples per prompt, each from its own noise")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="of the noise")] = 0,
    out: Annotated[Path, typer.Option(help="picture to write")] = Path("samples.png"),
    best: Annotated[bool, typer.Option("--best", help="by the sampler that `twinrl sampler` has found")] = False,
    step: StepOption = None,
) -> None:
    """Draw samples of a run into a picture."""
    from twinrl.commands.inspect import sample as command

    raise typer.Exit(command(run, prompt or [], nfe, n, seed, out, step, best, _console()))


@app.command()
def sampler(
    run: RunArgument,
    nfe: Annotated[
        list[int] | None,
        typer.Option(min=2, help="network evaluations per sample; may be repeated; default: the run's own above 1"),
    ] = None,
    step: StepOption = None,
) -> None:
    """Search the sampler settings that suit a finished run: better samples without any training.

    Times, fresh noise and extrapolation are searched on validation images. What is found is compared with the usual
    settings on test images and fresh noise, and kept in the run. Then: `twinrl sample RUN --best --nfe 4`.
    """
    from twinrl.commands.inspect import sampler as command

    raise typer.Exit(command(run, nfe or [], step, _console()))


@app.command()
def evaluate(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="run directory; none with --pipeline")] = None,
    step: StepOption = None,
    prompts: Annotated[
        Path | None, typer.Option(help="prompts: lines, JSON, GenEval's metadata, a folder as DPG-Bench has it")
    ] = None,
    against: Annotated[Path | None, typer.Option(metavar="RUN", help="of --prompts: a run to compare with")] = None,
    pipeline: Annotated[
        str | None, typer.Option(metavar="PATH", help="of --prompts: a diffusers pipeline, alone or to compare with")
    ] = None,
    judge: Annotated[
        list[str] | None, typer.Option(metavar="KIND", help="of --prompts: hpsv2 or '{kind: …}'; default: the run's")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="of --prompts: images of a prompt")] = 4,
    nfe: Annotated[int, typer.Option(min=1, max=1000, help="of --prompts: network evaluations of an image")] = 4,
    guidance: Annotated[float | None, typer.Option(help="of --pipeline: default: its own")] = None,
    device: Annotated[str, typer.Option(help="of --pipeline: auto, cpu, cuda, …")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="of --prompts: a folder; default: in the run's evaluation, or beside you")
    ] = None,
) -> None:
    """Judge a run's samples, at every NFE of its evaluation.nfe, beside real images.

    On the test split, beside the teacher that it started from; a family's run on the validation split, without teacher.
    With --prompts: images of each prompt from keyed noise, judged, and compared with another run or pipeline.
    """
    if prompts is None:
        from twinrl.commands.inspect import evaluate as command

        given = {"--against": against, "--pipeline": pipeline, "--judge": judge, "--out": out, "--guidance": guidance}
        for option, value in given.items():
            if value is not None:
                raise InputError(f"{option} is of an evaluation on prompts", fix="add --prompts FILE")
        if run is None:
            raise InputError("no run is given", expected="a run directory")
        raise typer.Exit(command(run, step, _console()))
    from twinrl.commands.prompt_set import Models, evaluate_prompts

    models = Models(run, step, against, pipeline, nfe, guidance, device)
    raise typer.Exit(evaluate_prompts(models, prompts, judge or [], seeds, out, _console()))


@app.command()
def bench(
    run: RunArgument,
    rounds: Annotated[int, typer.Option(min=1, help="timed calls of each kind")] = 20,
    step: StepOption = None,
) -> None:
    """Time a run's sampling: latency at batch 1 and throughput at batch 10, per NFE."""
    from twinrl.commands.bench import bench as command

    raise typer.Exit(command(run, rounds, step, _console()))


@app.command()
def replay(
    run: RunArgument,
    overrides: Overrides = None,
    event: Annotated[int | None, typer.Option(min=1, help="number of the event; without it they are listed")] = None,
    after: Annotated[int, typer.Option(min=0, help="steps after the event")] = 20,
    judge: Annotated[int | None, typer.Option(min=1, help="judge samples every so many steps: does it fall?")] = None,
) -> None:
    """Run the steps around an event again, unchanged and with a change: a cause by intervention.

    Beside a change run two placebos, the learning rate × 0.99 and × 1.01: what they remove, too, hung on details.
    With `--after 300 --judge 50` it says whether the run would have lived.
    For example without the reward: `twinrl replay RUN --event 3 reward.schedule.weight=0`; in double precision:
    `train.precision=float64`; on another batch: `seed=1`.
    """
    from twinrl.commands.replay import replay as command

    raise typer.Exit(command(run, event, overrides or [], after, judge, _console()))


@app.command()
def publish(
    run: RunArgument,
    uri: Annotated[
        str | None, typer.Option("--tracking-uri", help="MLflow store; default: as before", callback=without_password)
    ] = None,
) -> None:
    """Bring a run's MLflow view up to date with its log, e.g. after MLflow was away."""
    from twinrl.tracking import mlflow_view

    _console().print(f"published as MLflow run {mlflow_view.publish(run, uri, final=True)}")


@app.command()
def ui(
    runs: Annotated[
        str, typer.Argument(metavar="[RUNS_OR_STUDY]", help="a run, a folder of runs, or a study's name or file")
    ] = "runs",
    port: Annotated[int, typer.Option(min=1, max=65535, help="a free one is taken if this is in use")] = 5000,
    uri: Annotated[
        str | None,
        typer.Option("--tracking-uri", help="MLflow store; default: the one of RUNS", callback=without_password),
    ] = None,
    show: Annotated[bool, typer.Option("--open/--no-open", help="open it in a browser, where there is one")] = True,
) -> None:
    """Open the MLflow pages of a folder of runs, or of a study, on this machine."""
    from twinrl.tracking import studies
    from twinrl.tracking.ui import serve

    where, study = studies.located(runs, uri)
    raise typer.Exit(serve(where, port, study=study, show=show))


@app.command()
def export(
    run: RunArgument,
    folder: Annotated[Path, typer.Argument(help="folder to write; new or empty")],
    lora: Annotated[bool, typer.Option("--lora", help="write the adapters alone, for a run with model.lora")] = False,
    dtype: Annotated[
        Literal["float32", "bf16"] | None, typer.Option(help="of the transformer; default: as trained")
    ] = None,
    push_to: Annotated[
        str | None, typer.Option("--push-to", metavar="OWNER/NAME", help="also upload, with the token in $HF_TOKEN")
    ] = None,
    step: StepOption = None,
) -> None:
    """Write a run's student as a diffusers pipeline that stock code samples, with a model card.

    Adapters are merged unless --lora keeps them apart. A new repository on the hub is private.
    """
    from twinrl.commands.export import export as command

    raise typer.Exit(command(run, folder, lora, dtype, push_to, step, _console()))


@app.command("import-simpletuner")
def import_simpletuner(
    config: Annotated[Path, typer.Argument(help="SimpleTuner's config.json with twinflow_enabled")],
    out: Annotated[Path | None, typer.Option("-o", help="YAML file to write; default: CONFIG's name here")] = None,
) -> None:
    """Turn a SimpleTuner configuration into one of twinrl, and say what differs."""
    from twinrl.commands.import_simpletuner import import_simpletuner as command

    raise typer.Exit(command(config, out, _console()))


data = typer.Typer(no_args_is_help=True, help="Prepare images and captions for a pretrained model.")
app.add_typer(data, name="data")


@data.command("prepare")
def data_prepare(
    path: Annotated[Path, typer.Argument(help="folder, parquet, tar, prompt list, or a data set's name on the hub")],
    overrides: PrepareOverrides = None,
    model: Annotated[
        str | None, typer.Option(help="diffusers pipeline, folder or hub name; without it: verify only")
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(help="of the model, e.g. your own by its dotted path; default: by the pipeline's class"),
    ] = None,
    to: Annotated[Path | None, typer.Option(help="prepared folder; default: prepared/<name of PATH>")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    dtype: Annotated[
        Literal["float32", "bf16"],
        typer.Option(help="of the model's weights; as model.frozen_dtype of the run, which the presets set to bf16"),
    ] = "float32",
) -> None:
    """Verify images and captions, and encode what is not encoded yet.

    Skipped files are listed with reasons in report.jsonl. May be stopped at any time and started again.
    """
    from twinrl.commands.data import EncodingOptions, prepare_data

    raise typer.Exit(prepare_data(path, model, to, overrides or [], EncodingOptions(device, dtype), _console(), family))


lab = typer.Typer(no_args_is_help=True, help="Build laboratories of pictures of your own.")
app.add_typer(lab, name="lab")


@lab.command("build")
def lab_build(
    path: Annotated[Path, typer.Argument(help="200 to 50,000 captioned pictures, as for `twinrl data prepare`")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.PATH=VALUE]...", help="how they are read, e.g. read.caption_column=title"),
    ] = None,
    to: Annotated[str | None, typer.Option(help="name or folder of the laboratory; default: the name of PATH")] = None,
    size: Annotated[Literal["32", "64"], typer.Option(help="pixels of a picture's side")] = "32",
    label: Annotated[
        str | None, typer.Option(help="column of a class's name, for the judge; default: clusters are found")
    ] = None,
    minutes: Annotated[
        int | None,
        typer.Option(min=1, max=1440, help="on two cores; codec and teacher train longer. Default: 30, at size 64 120"),
    ] = None,
) -> None:
    """Build a laboratory of a folder of captioned pictures: everything that the digits' laboratory has.

    May be stopped at any time and started again. Then: twinrl train lab 'data={source: lab, lab: NAME}'
    """
    from twinrl.commands.laboratory import build as command

    raise typer.Exit(command(path, to, int(size), label, minutes, overrides or [], _console()))


@app.command()
def doctor(
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="print every configuration key with its meaning")] = False,
    plan: Annotated[
        str | None, typer.Option("--plan", metavar="CONFIG", help="the memory of a run on GPUs, before there is one")
    ] = None,
    simulate: Annotated[
        str | None,
        typer.Option("--simulate", metavar="CONFIG", help="the same with work, messages and waits"),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="of --plan and --simulate: processes that share the model")] = 1,
    gpu: Annotated[str, typer.Option(help="of --simulate: H100, H200, A100 or 4090")] = "H100",
) -> None:
    """Check this machine: versions, devices, caches, presets; or see what a run takes before it is started."""
    if (config := plan if simulate is None else simulate) is not None:
        from twinrl.commands.simulate import simulate as simulated

        raise typer.Exit(simulated(config, overrides or [], processes, _console(), None if simulate is None else gpu))
    from twinrl.commands.doctor import doctor as command

    raise typer.Exit(command(schema, _console()))


def _console():  # no return type: it would import rich.console at start
    """Prints names and messages as they are."""
    from twinrl.machine.consoles import Console

    return Console(soft_wrap=True, markup=False, emoji=False)


def _register_subcommands() -> None:
    """Subcommands of packages beside twinrl (ablations, analysis), which twinrl itself does not know."""
    for entry in entry_points(group="twinrl.commands"):
        entry.load()(app)


def _find_own_classes() -> None:
    """Let dotted paths name classes beside the command, whichever way it was started."""
    try:
        here = os.getcwd()
    except OSError as error:
        raise InputError("the working directory is gone", got=error.strerror, fix="cd to another") from error
    if not sys.flags.safe_path:
        look_in(here)


def main() -> None:
    """Entry point: an :class:`InputError` becomes one line on stderr and exit code 2; so does what the system says of
    a file, with 1 where a disk is to blame, and that it starts no more threads or processes.

    Of the processes of a torchrun all end with 2 and the first one writes the line; of a failing component each does.
    """
    streams.prepare()
    end_without_search()
    debug, sys.argv = DEBUG in sys.argv, [argument for argument in sys.argv if argument != DEBUG]
    try:
        _register_subcommands()
        _find_own_classes()
        with failures_named():
            app()
    except InputError as error:
        if debug:
            streams.show_traceback(error)
        if os.environ.get("RANK", "0") == "0" or isinstance(error, ComponentError):
            streams.say(str(error))
        sys.exit(2)
    except OSError as error:
        if error.errno is None:  # of a library, which has its own words
            raise
        if debug:
            streams.show_traceback(error)
        streams.say(of_system(error))
        sys.exit(1 if error.errno in DISK else 2)
    except RuntimeError as error:
        if (said := of_threads(error)) is None:
            raise
        if debug:
            streams.show_traceback(error)
        streams.say(said)
        sys.exit(2)
