"""From a folder or hub name to a checked pipeline: what is wrong with the input is said in one line."""

import hashlib
import inspect
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field
from torch import nn

from twinrl.config import stored
from twinrl.config.components import failures_named
from twinrl.config.errors import InputError
from twinrl.machine.compat import ensure_torchvision

INDEX = "model_index.json"
NO_PIPELINE = "None.py"
"""What diffusers looks for, and runs, where it was told of no code for the whole pipeline."""
AGAIN = "download or save the pipeline again"
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
"""Files that tokenizers are made from; without any, transformers makes an empty one without a word."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(path: str) -> Path:
    """The local folder of a diffusers pipeline given by folder or hub name; the latter is downloaded once.

    Raises:
        InputError: neither, or the hub cannot be reached and the pipeline is not in its cache.
    """
    if Path(path).is_dir():
        return Path(path)
    if not HUB_NAME.fullmatch(path):
        raise InputError(f"no folder {path}", expected="a diffusers folder or a hub name like owner/name")
    return _download(path)


def is_hub_name(path: str) -> bool:
    """Whether :func:`resolve` takes ``path`` for a name on the hub."""
    return not Path(path).is_dir() and HUB_NAME.fullmatch(path) is not None


def _download(name: str) -> Path:
    """The cached folder of a hub repository, with the components that its index names and nothing else."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=[INDEX]))
        parts = [f"{part}/*" for part in components(read_index(folder))]
        return Path(snapshot_download(name, allow_patterns=[INDEX, *parts]))
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{name} is no folder here, and the model hub cannot be reached",
            fix="give the folder of a downloaded pipeline, or fill the hub cache on a machine with network",
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"the hub gives no {name}", got=str(error).splitlines()[0]) from error


def read_index(folder: Path) -> dict[str, Any]:
    """``model_index.json`` of a pipeline folder.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} is no diffusers pipeline", expected=f"a file {INDEX} in it")
    index = _described(folder / INDEX)
    for name, entry in index.items():
        if isinstance(entry, list) and not (len(entry) == 2 and {type(one) for one in entry} < {str, type(None)}):
            raise InputError(f"{folder / INDEX} is damaged", got=f"{name}: {entry!r:.60}", expected="[library, class]")
    return index


def transformer_config(folder: Path, part: str = "transformer") -> dict[str, Any]:
    """``config.json`` of a pipeline folder's transformer (or whatever ``part`` is the network that is trained).

    Raises:
        InputError: there is none, or it cannot be read.
    """
    return _described(folder / part / "config.json")


def scheduler_config(folder: Path) -> dict[str, Any]:
    """``scheduler/scheduler_config.json`` of a pipeline folder.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    return _described(folder / "scheduler" / "scheduler_config.json")


def _described(file: Path) -> dict[str, Any]:
    """A JSON description of a diffusers class."""
    found = described(file)
    if not isinstance(found.get("_class_name"), str):
        raise InputError(f"{file} is damaged", expected="an object with _class_name")
    return found


def described(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a pipeline. Raises InputError where there is none."""
    try:
        found: dict[str, Any] = stored.read(file, dict[str, Any], AGAIN)
    except FileNotFoundError as error:
        raise InputError(f"{file} is missing", fix=AGAIN) from error
    return found


# --- values of descriptions -------------------------------------------------------------------------------

MOST_LAYERS = 1000
"""Of any part; a larger number is damage, and would take hours to build."""
COUNTS = re.compile(r"(num|n)_(\w+_)?layers|layers_per_block")


def check_values(folder: Path, without: Sequence[str] = ()) -> None:
    """Raises InputError where a component is described by a value of another type than its class takes.

    Arguments:
        folder: of the pipeline. without: components that do not count.
    """
    import diffusers

    for name, (library, cls) in ((name, entry) for name, entry in read_index(folder).items() if type(entry) is list):
        file = folder / name / "config.json"
        if name in without or not file.is_file():
            continue
        known = getattr(diffusers, cls, None) if library == "diffusers" else None
        taken = inspect.signature(known).parameters if known else {}
        for key, value in described(file).items():
            expected = _expected(value, _usual(taken[key])) if key in taken else None
            if COUNTS.fullmatch(key) and isinstance(value, int | float) and not 0 <= value <= MOST_LAYERS:
                expected = f"0 to {MOST_LAYERS}"
            if expected is not None:
                said = f"{file}: {key} is no value of {cls}"
                raise InputError(said, got=f"{value!r:.60}", expected=expected, fix=AGAIN)


def _usual(parameter: inspect.Parameter) -> object:
    """A parameter's default; a float where it is declared as one."""
    return float(parameter.default) if parameter.annotation is float else parameter.default


def _expected(value: object, default: object) -> str | None:
    """What stands where a class has this default, if ``value`` is something else; diffusers takes None and lists of
    what it takes. A default that is None says nothing."""
    if isinstance(default, list | tuple):
        found = value if value is None or isinstance(value, list) else None
        inner = [_expected(one, default[0]) for one in found or ()] if default else []
        return "a list" if found is None and value is not None else next(filter(None, inner), None)
    if value is None or default is None or default is inspect.Parameter.empty:
        return None
    if isinstance(value, list):
        return next(filter(None, (_expected(one, default) for one in value)), None)
    if isinstance(default, bool | str):
        return None if type(value) is type(default) else type(default).__name__
    whole = isinstance(default, int)
    if isinstance(value, float):
        fits = value.is_integer() if whole else math.isfinite(value)
    else:
        fits = isinstance(value, int) and not isinstance(value, bool)
    return None if fits else "a whole number" if whole else "a number"


def components(index: dict[str, Any]) -> list[str]:
    """The names of the components that a pipeline has; optional ones may be null."""
    return [name for name, entry in index.items() if isinstance(entry, list) and entry[:1] != [None]]


def left_out(index: dict[str, Any]) -> list[str]:
    """The names of the components that are null in the index; loading wants to be told so."""
    return [name for name, entry in index.items() if isinstance(entry, list) and entry[:1] == [None]]


def check_class(folder: Path, pipeline: str) -> None:
    """Raises InputError where ``folder`` is not a pipeline of the class named ``pipeline``."""
    found = read_index(folder)["_class_name"]
    if found != pipeline:
        raise InputError(f"{folder} is another family's", got=found, expected=pipeline, fix="change model.family")


def check(folder: Path, pipeline: str, unused: Sequence[str] = ()) -> None:
    """Raises InputError where ``folder`` is not a complete pipeline of the class named ``pipeline``."""
    check_class(folder, pipeline)
    check_values(folder, unused)
    index = read_index(folder)
    for name in components(index):
        if name not in unused:
            _check_library(folder, name, index[name][0])
        if name not in unused and not (folder / name).is_dir():
            raise InputError(
                f"{folder} lacks a component", got=f"no folder {name}", expected=", ".join(components(index))
            )
        if (folder / name / INDEX).exists():  # whose own index names classes of any module
            raise InputError(f"{folder / name} is a pipeline and no component", fix=AGAIN)
        if "Tokenizer" in str(index[name][1]) and not any((folder / name / file).is_file() for file in VOCABULARIES):
            raise InputError(
                f"{folder / name} has no vocabulary", got=", ".join(sorted(os.listdir(folder / name))) or "no files",
                expected=f"one of {', '.join(VOCABULARIES)}", fix=AGAIN,
            )  # fmt: skip


def _check_library(folder: Path, name: str, library: str) -> None:
    """Raises InputError where a component would have a module imported that nobody has asked for: one of the folder,
    which older versions of diffusers take for the library, or another library's."""
    import diffusers

    for code in (folder / name / f"{library}.py", folder / NO_PIPELINE):
        if code.exists():
            raise InputError(f"{folder} brings code that loading would run", got=code, fix="read it, and take it out")

    known = ("diffusers", "transformers", "twinrl")
    if library not in known and library not in sys.modules and not hasattr(diffusers.pipelines, library):
        raise InputError(
            f"{folder / INDEX} has {name} of another library", got=library, expected=", ".join(known),
            fix="import it first if you trust the folder",
        )  # fmt: skip


def content_hash(folder: Path, sample: int = 2**20) -> str:
    """Hex digest of a pipeline: names and sizes of the files of its components, and their first and last MiB.

    Weights of tens of gigabytes are sampled, not read: the start holds the index of a safetensors file, so other
    shapes, dtypes or versions differ, and so does almost every retraining.
    """
    digest = hashlib.sha256()
    parts = components(read_index(folder))
    for file in sorted(path for part in parts for path in (folder / part).rglob("*") if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(sample))
            stream.seek(max(0, size - sample))
            digest.update(stream.read(sample))
    return digest.hexdigest()


def load_pipeline(
    folder: Path,
    pipeline: str,
    dtype: torch.dtype,
    part: str | None = "transformer",
    unused: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """The pipeline of ``folder`` without transformer (``part``) and scheduler, which twinrl brings; None: whole.

    Components named in ``unused`` are not loaded either; ``settings`` are the pipeline's own.

    Raises:
        InputError: see :func:`check`; a component that cannot be read.
    """
    check(folder, pipeline, unused)
    ensure_torchvision()
    import diffusers

    index = read_index(folder)
    brought = [] if part is None else [part, "scheduler"]
    absent = [*brought, *left_out(index), *(name for name in unused if name in index)]
    parts = dict.fromkeys(absent) | dict(settings or {})
    with building(folder):
        loaded = getattr(diffusers, pipeline).from_pretrained(folder, **parts, torch_dtype=dtype)
    for name, component in loaded.components.items():
        if isinstance(component, nn.Module):
            _check_weights(folder / name, component)
    return loaded


def _check_weights(folder: Path, module: nn.Module) -> None:
    """Raises InputError where a component has parameters that its safetensors files lack: they would be random numbers.

    Libraries rename some on the way, so those of other names count as there if the files have as many numbers left.
    """
    from safetensors import safe_open

    stored: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):  # of tied ones the files have one
        names.setdefault(parameter, []).append(name)
    absent = {known[0]: value for value, known in names.items() if stored and stored.keys().isdisjoint(known)}
    own = {name for known in names.values() for name in known}
    left = sum(size for name, size in stored.items() if name not in own)
    if any(value.is_meta for value in names) or sum(value.numel() for value in absent.values()) > left:
        first = next(iter(absent), next(iter(names.values()))[0])
        raise InputError(f"{folder} lacks weights", got=f"no {first} ({len(absent)} in all)", fix=AGAIN)


def load_transformer(folder: Path, transformer: Any, dtype: torch.dtype, part: str = "transformer") -> Any:
    """The transformer (``part``) of ``folder`` as our subclass, with a second time and a sign.

    Raises:
        InputError: it cannot be read, or its weights do not fit.
    """
    with building(folder / part):
        loaded = transformer.from_pretrained(folder / part, torch_dtype=dtype)
        loaded.complete(str(folder))
    absent = [name for name, parameter in loaded.named_parameters() if parameter.is_meta]
    if absent:
        raise InputError(f"{folder / part} lacks weights", got=f"no {absent[0]} ({len(absent)} in all)")
    return loaded


class _WeightIndex(BaseModel):
    """Which file holds which tensor."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^[^/]+$")]]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model that diffusers has written into ``folder``: one, or as its index says.

    Raises:
        InputError: there are none.
    """
    name = "diffusion_pytorch_model.safetensors"
    index = folder / f"{name}.index.json"
    if index.is_file():
        return [folder / file for file in sorted(set(stored.read(index, _WeightIndex, AGAIN).weight_map.values()))]
    if not (folder / name).is_file():
        raise InputError(
            f"{folder} has no safetensors file, and several processes read no others", expected=name,
            fix="save the pipeline again with save_pretrained, or train in one process",
        )  # fmt: skip
    return [folder / name]


@contextmanager
def building(what: Path) -> Iterator[None]:
    """For making something by its files: raises InputError where the parsers and constructors of each library, which
    raise their own, do not take them."""
    try:
        with quiet(), failures_named():
            yield
    except InputError:
        raise
    except Exception as error:
        raise _unreadable(what, error) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of diffusers and transformers: on weights that are not in a checkpoint (``complete`` and the
    check after it say more), on long prompts, and on ``torch_dtype``, which newer versions call ``dtype`` and older
    ones know under no other name. Progress bars are for people: there are none where nobody looks.
    """
    import diffusers
    import transformers

    libraries = diffusers.utils.logging, transformers.utils.logging
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        if not sys.stderr.isatty():
            library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype.*")
            yield
    finally:
        for library, verbosity, bars in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def _unreadable(folder: Path, error: Exception) -> InputError:
    return InputError(
        f"{folder} cannot be loaded", got=str(error).splitlines()[0] if str(error) else type(error).__name__,
        fix=f"{AGAIN}: a file is damaged, incomplete or another model's",
    )  # fmt: skip
