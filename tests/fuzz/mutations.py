"""Damage to a file or a value: what disks, editors, copies and other programs do, drawn from a seed."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import yaml

Branch = dict | list
"""What holds values."""

HUGE = "\u2060HUGE"
"""Stands for an integer of 400 digits, which neither JSON's nor YAML's writers take from a Python number."""
DEEP = "\u2060DEEP"
"""Stands for lists in lists, deeper than Python's recursion."""
TEXT_OF = {HUGE: "7" * 400, DEEP: "[" * 2000 + "]" * 2000}

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**63), 0.5, -0.5, 1e-300, 1e308, float("nan"), float("inf"),
    "", "text", "nan", "-inf", "1", "1e3", "../up", "a\nb", "\x00", "\u2028", "é" * 60, "x" * 5000, HUGE, DEEP,
    [], [1], [None, "a"], {}, {"kind": "no_such"}, {"a": {"b": 1}},
)  # fmt: skip


def odd(rng: Random) -> Any:
    """A value that hardly anybody expects; a copy, for who changes it."""
    return json.loads(json.dumps(rng.choice(ODD)))


def shown(value: Any) -> str:
    """A value, for a list of findings."""
    return f"{value!r:.40}"


INTRUDERS = (b"\x00" * 64, b"\xff\xfe", b"\xe9", b"}", b'"', b"\r\n", b"[[[", b"&a *a")
IN_ITS_PLACE = (b"\x00" * 4096, b"null", b"[]", b"{}", b"1", b'"text"', b"\xef\xbb\xbf", b"\x80\x04K\x01.")
OTHER_LINES = (b"what\n", b"{}\n", b"[1]\n", b"null\n", b'{"step": 1}\n', b"{" * 3000 + b"\n")

# --- bytes ------------------------------------------------------------------------------------------------


def cut(path: Path, rng: Random) -> str:
    content = path.read_bytes()
    end = rng.randrange(len(content) + 1)
    path.write_bytes(content[:end])
    return f"cut after {end} of {len(content)} bytes"


def empty(path: Path, rng: Random) -> str:
    path.write_bytes(b"")
    return "emptied"


def missing(path: Path, rng: Random) -> str:
    path.unlink()
    return "deleted"


def flip(path: Path, rng: Random) -> str:
    content = bytearray(path.read_bytes())
    places = sorted(rng.randrange(len(content)) for _ in range(rng.choice((1, 1, 4)))) if content else []
    for place in places:
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"bits flipped in bytes {places}"


def put_in(path: Path, rng: Random) -> str:
    content, what = path.read_bytes(), rng.choice(INTRUDERS)
    place = rng.choice((0, len(content), rng.randrange(len(content) + 1)))
    path.write_bytes(content[:place] + what + content[place:])
    return f"{what[:8]!r} put in at byte {place}"


def overwrite(path: Path, rng: Random) -> str:
    what = rng.choice((*IN_ITS_PLACE, rng.randbytes(256)))
    path.write_bytes(what)
    return f"overwritten by {what[:12]!r}"


def as_folder(path: Path, rng: Random) -> str:
    path.unlink()
    path.mkdir()
    return "made a folder"


def as_pipe(path: Path, rng: Random) -> str:
    path.unlink()
    os.mkfifo(path)
    return "made a FIFO"


def as_link(path: Path, rng: Random) -> str:
    path.unlink()
    target = rng.choice((path.name, "no such file", "/dev/null", "."))
    path.symlink_to(target)
    return f"made a link to {target}"


def of_another(path: Path, rng: Random) -> str:
    others = sorted(p for p in path.parent.iterdir() if p.is_file() and p != path)
    if not others:
        return empty(path, rng)
    other = rng.choice(others)
    shutil.copyfile(other, path)
    return f"overwritten by {other.name}"


# --- lines ------------------------------------------------------------------------------------------------


def lines(path: Path, rng: Random) -> str:
    """A line is lost, written twice, out of order, or of something else."""
    content = path.read_bytes().splitlines(keepends=True)
    if not content:
        return put_in(path, rng)
    place, kind = rng.randrange(len(content)), rng.choice(("lost", "twice", "moved", "blank", "else", "last torn"))
    line = content.pop(place)
    if kind == "twice":
        content[place:place] = [line, line]
    elif kind == "moved":
        content.insert(rng.randrange(len(content) + 1), line)
    elif kind == "blank":
        content[place:place] = [line, b"\n"]
    elif kind == "else":
        content.insert(place, rng.choice(OTHER_LINES))
    elif kind == "last torn":
        content = [*content[:place], line, *content[place:]]
        content[-1] = content[-1][: len(content[-1]) // 2]
    path.write_bytes(b"".join(content))
    return f"line {place + 1} {kind}"


# --- values -----------------------------------------------------------------------------------------------


def places(value: Any, path: tuple = ()) -> Iterator[tuple[Branch, Any, str]]:
    """Every value inside ``value``: what holds it, its key there, its dotted path."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries):
        here = (*path, str(key))
        yield value, key, ".".join(here)
        yield from places(inner, here)


def change(value: Branch, rng: Random) -> str:
    """Change one value in place: another, none, another name, one more."""
    found = list(places(value))
    if not found:
        return "nothing in it to change"
    holder, key, path = rng.choice(found)
    kind = rng.choice(("odd", "odd", "odd", "number", "lost", "renamed", "more", "wrapped"))
    old = holder[key]
    if kind == "number" and isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = rng.choice((-old, old + 1, old * 1000, old + 0.5, str(old)))
    elif kind == "lost":
        del holder[key]
        return f"{path} lost"
    elif kind == "renamed" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
        return f"{path} renamed"
    elif kind == "more" and isinstance(old, dict):
        old["more"] = odd(rng)
        return f"{path}.more = {shown(old['more'])}"
    elif kind == "wrapped":
        holder[key] = [old]
    else:
        holder[key] = odd(rng)
    return f"{path} = {shown(holder[key])}"


def _written(text: str) -> str:
    for mark, stands_for in TEXT_OF.items():
        for quoted in (json.dumps(mark), f"'{mark}'", f'"{mark}"', mark):
            text = text.replace(quoted, stands_for)
    return text


def json_value(path: Path, rng: Random) -> str:
    """Change a value of a JSON file, or of one line of it."""
    content = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    if not content:
        return put_in(path, rng)
    place = rng.randrange(len(content))
    value = json.loads(content[place])
    said = change(value, rng)
    content[place] = _written(json.dumps(value))
    path.write_text("\n".join(content) + "\n")
    return f"line {place + 1}: {said}" if path.suffix == ".jsonl" else said


def yaml_value(path: Path, rng: Random) -> str:
    value = yaml.safe_load(path.read_text())
    said = change(value, rng)
    path.write_text(_written(yaml.safe_dump(value, sort_keys=False, allow_unicode=True)))
    return said


def safetensors_header(path: Path, rng: Random) -> str:
    """Change the description of the tensors, whose bytes stay."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    said = change(header, rng)
    text = _written(json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return f"header: {said}"


def safetensors_tensor(path: Path, rng: Random) -> str:
    """One tensor is lost, has another dtype, shape or name, or numbers that are none."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    if not tensors:
        return put_in(path, rng)
    name = rng.choice(sorted(tensors))
    value = tensors.pop(name)
    kind = rng.choice(("lost", "float64", "bfloat16", "int8", "flat", "longer", "renamed", "nan"))
    if kind == "renamed":
        tensors[f"{name}x"] = value
    elif kind == "nan":
        tensors[name] = torch.full_like(value.float(), float("nan")).to(value.dtype)
    elif kind == "flat":
        tensors[name] = value.reshape(-1).contiguous()
    elif kind == "longer":
        tensors[name] = torch.cat([value.reshape(1, -1)] * 2)
    elif kind != "lost":
        tensors[name] = value.to(getattr(torch, kind))
    save_file(tensors, path)
    return f"tensor {name}: {kind}"


Mutation = Callable[[Path, Random], str]
ANY: tuple[Mutation, ...] = (cut, empty, missing, flip, put_in, overwrite, as_folder, as_pipe, as_link, of_another)
OF_SUFFIX: dict[str, tuple[Mutation, ...]] = {
    ".json": (json_value,),
    ".jsonl": (json_value, lines),
    ".yaml": (yaml_value, lines),
    ".safetensors": (safetensors_header, safetensors_tensor),
    ".txt": (lines,),
}
"""Suffix → what fits it; drawn as often as all that fit any file together."""


def damage(path: Path, rng: Random) -> str:
    """Damage a file; says how."""
    own = OF_SUFFIX.get(path.suffix, ())
    mutation = rng.choice(own if own and rng.random() < 0.6 else ANY)
    return mutation(path, rng)
