"""Every way of keeping captions gives the same pairs; every flaw is a counted problem, never an exception."""

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from tests.data.tiny import encoded, picture
from twinrl.config import validate
from twinrl.config.errors import InputError
from twinrl.data import tables
from twinrl.data.captions import Example, ReadConfig
from twinrl.data.problems import (
    BAD_CAPTION,
    BAD_ROW,
    EMPTY_CAPTION,
    NO_CAPTION,
    NO_IMAGE,
    NOT_AN_IMAGE,
    SECOND_CAPTION,
    Problem,
    UnusableError,
)
from twinrl.data.readers import read

PICTURES = [encoded(picture(20, 20, seed)) for seed in range(3)]
CAPTIONS = ["a red boat", "ein grünes Haus", "two\nlines"]


def found(path: Path, **config: object) -> tuple[str, list[tuple[str, bytes | None]], dict[str, str]]:
    """The format, (caption, bytes) of each pair, and name → reason of each problem."""
    name, items = read(path, validate(ReadConfig, config))
    pairs, problems = list[tuple[str, bytes | None]](), dict[str, str]()
    for item in items:
        try:
            if isinstance(item, Problem):
                problems[item.name] = item.reason
            else:
                pairs.append((item.caption, item.read() if item.read else None))
        except UnusableError as error:  # as whoever decodes the picture takes it
            problems[item.name] = error.reason
    return name, pairs, problems


EXPECTED = list(zip(CAPTIONS, PICTURES, strict=True))


def write_jsonl(path: Path, rows: list[object]) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def test_text_files_beside_images(tmp_path: Path) -> None:
    for number, (caption, data) in enumerate(EXPECTED):
        folder = tmp_path / ("sub" if number == 2 else "")
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.png").write_bytes(data)
        (folder / f"{number}.txt").write_text(f"\ufeff{caption}\n", encoding="utf-8")
    assert found(tmp_path) == ("text", EXPECTED, {})
    (tmp_path / "empty.PNG").write_bytes(PICTURES[0])
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "alone.jpg").write_bytes(PICTURES[0])
    (tmp_path / "orphan.txt").write_text("no image")
    (tmp_path / "latin.png").write_bytes(PICTURES[0])
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    (tmp_path / "notes.pdf").write_text("x")
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.png").write_text("x")
    name, pairs, problems = found(tmp_path)
    assert (name, pairs) == ("text", EXPECTED)
    assert problems == {
        "empty.PNG": EMPTY_CAPTION, "alone.jpg": NO_CAPTION, "orphan.txt": NO_IMAGE, "latin.png": BAD_CAPTION,
        "notes.pdf": NOT_AN_IMAGE,
    }  # fmt: skip


def test_captions_of_other_names_and_encodings(tmp_path: Path) -> None:
    for image, caption, encoding in (
        ("0.JPG", "0.caption", "utf-16"), ("1.png", "1.png.txt", "utf-8"), ("2.png", "2.TXT", "utf-8-sig"),
    ):  # fmt: skip
        (tmp_path / image).write_bytes(PICTURES[int(image[0])])
        (tmp_path / caption).write_bytes(CAPTIONS[int(image[0])].encode(encoding))
    assert found(tmp_path) == ("text", EXPECTED, {})
    (tmp_path / "1.txt").write_text("of another 1")
    (tmp_path / "0.json").write_text("{}")
    assert found(tmp_path) == ("text", EXPECTED, {"0.json": NOT_AN_IMAGE, "1.txt": SECOND_CAPTION})


def test_captions_whose_characters_were_lost_are_listed(tmp_path: Path) -> None:
    for name, data in {
        "a": "kite".encode("utf-16-le"), "b": "caf\ufffd".encode(), "c": "café".encode("latin-1"), "d": b"a kite",
    }.items():  # fmt: skip
        (tmp_path / f"{name}.png").write_bytes(PICTURES[0])
        (tmp_path / f"{name}.txt").write_bytes(data)
    _, pairs, problems = found(tmp_path)
    assert pairs == [("a kite", PICTURES[0])]
    assert problems == dict.fromkeys(["a.png", "b.png", "c.png"], BAD_CAPTION)


def test_names_that_are_no_text_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "caf\udce9.png").write_bytes(PICTURES[0])
    (tmp_path / "b\n.png").write_bytes(PICTURES[0])
    (tmp_path / "b\n.txt").write_text("a kite")
    items = list(read(tmp_path, ReadConfig())[1])
    assert [item.name for item in items] == [r"b\n.png", r"caf\xe9.png"]
    assert isinstance(items[0], Example)


def test_metadata_in_other_encodings(tmp_path: Path) -> None:
    for number, data in enumerate(PICTURES):
        (tmp_path / f"{number}.png").write_bytes(data)
    rows = [json.dumps({"file_name": f"{n}.png", "text": c}, ensure_ascii=False) for n, c in enumerate(CAPTIONS)]
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "Metadata.JSONL").write_bytes("\n".join(rows).encode(encoding))
        assert found(tmp_path) == ("metadata", EXPECTED, {})
    latin, lost = rows[1].encode("latin-1"), b'{"file_name": "0.png", "text": "\\ud83d"}'
    long = json.dumps({"file_name": "x" * 300, "text": "long"}).encode()
    (tmp_path / "Metadata.JSONL").write_bytes(b"\n".join([rows[0].encode(), latin, long, lost]))
    (tmp_path / ".trash").mkdir()
    (tmp_path / ".trash" / "metadata.jsonl").write_text(rows[2])
    name, pairs, problems = found(tmp_path)
    assert (name, pairs) == ("metadata", EXPECTED[:1])
    assert list(problems.values()) == [BAD_ROW, NO_IMAGE, BAD_CAPTION]


@pytest.mark.parametrize("key", ["text", "caption", "blip"])
def test_metadata_lines(tmp_path: Path, key: str) -> None:
    (tmp_path / "images").mkdir()
    for number, data in enumerate(PICTURES):
        (tmp_path / "images" / f"{number}.png").write_bytes(data)
    rows: list[object] = [{"file_name": f"images/{n}.png", key: caption} for n, caption in enumerate(CAPTIONS)]
    rows += [
        "not json", "", "[1]", {key: "no file"}, {"file_name": "images/9.png", key: "x"}, {"file_name": "images/0.png"},
        {"file_name": "images/0.png", key: "  "}, {"file_name": "images/0.png", key: 3},
        {"file_name": "images/0.png", key: None},
    ]  # fmt: skip
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    config = {"caption_column": "blip"} if key == "blip" else {}
    expected = [BAD_ROW, BAD_ROW, BAD_ROW, NO_IMAGE, NO_CAPTION, EMPTY_CAPTION, BAD_CAPTION, EMPTY_CAPTION]
    for path in (tmp_path, tmp_path / "metadata.jsonl"):
        name, pairs, problems = found(path, **config)
        assert (name, pairs) == ("metadata", EXPECTED)
        assert list(problems.values()) == expected


def test_a_cell_that_names_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnusableError, match=r"pipe\.png: Is no file"):
        tables.image_bytes("pipe.png", tmp_path)


def test_parquet_with_bytes_structs_and_paths(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "2.png").write_bytes(PICTURES[2])
    structs = [{"bytes": PICTURES[0], "path": "0.png"}, {"bytes": PICTURES[1], "path": None}]
    structs += [{"bytes": None, "path": "files/2.png"}, {"bytes": None, "path": "files/9.png"}, None]
    table = pyarrow.table({"image": structs, "text": [*CAPTIONS, "gone", "none"]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    name, pairs, problems = found_with_bytes(tmp_path)
    assert (name, pairs) == ("parquet", EXPECTED)
    assert problems == {"a.parquet[3]": NO_IMAGE, "a.parquet[4]": NO_IMAGE}
    (tmp_path / "a.parquet").unlink()
    parquet.write_table(pyarrow.table({"jpg": PICTURES, "blip": CAPTIONS}), tmp_path / "b.parquet")
    assert found(tmp_path / "b.parquet", image_column="jpg", caption_column="blip") == ("parquet", EXPECTED, {})
    with pytest.raises(InputError, match=r"no column image; got columns jpg, blip; fix: set read.image_column"):
        found(tmp_path / "b.parquet")


def test_captions_in_lists_and_bytes_and_files_of_other_names(tmp_path: Path) -> None:
    lists = [[CAPTIONS[0], "another"], [CAPTIONS[1]], [CAPTIONS[2]], [], None]
    table = pyarrow.table({"image": [*PICTURES, PICTURES[0], PICTURES[0]], "text": lists})
    parquet.write_table(table, tmp_path / "a.PARQUET")
    (tmp_path / "._a.parquet").write_bytes(b"\0\x05\x16\x07 of a Mac")
    problems = {"a.PARQUET[3]": EMPTY_CAPTION, "a.PARQUET[4]": EMPTY_CAPTION}
    assert found(tmp_path) == ("parquet", EXPECTED, problems)
    latin = pyarrow.array([c.encode("latin-1") for c in CAPTIONS], pyarrow.binary())
    parquet.write_table(pyarrow.table({"image": PICTURES, "text": latin}), tmp_path / "b.parquet")
    expected = ("parquet", [EXPECTED[0], EXPECTED[2]], {"b.parquet[1]": BAD_CAPTION})
    assert found(tmp_path / "b.parquet") == expected
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, latin.buffers())  # said to be UTF-8
    parquet.write_table(pyarrow.table({"image": PICTURES, "text": text}), tmp_path / "b.parquet")
    assert found(tmp_path / "b.parquet") == expected


def test_a_damaged_row_group_costs_its_rows_alone(tmp_path: Path) -> None:
    texts = [f"caption {i} " + "x" * 200 for i in range(6)]
    table = pyarrow.table({"image": PICTURES * 2, "text": texts})
    file = tmp_path / "x.parquet"
    parquet.write_table(table, file, row_group_size=2, compression="snappy", use_dictionary=False)
    place = parquet.ParquetFile(file).metadata.row_group(1).column(1).data_page_offset
    data = bytearray(file.read_bytes())
    data[place : place + 60] = b"\xff" * 60
    file.write_bytes(data)
    _, pairs, problems = found(file)
    assert [caption for caption, _ in pairs] == [*texts[:2], *texts[4:]]
    assert list(problems.values()) == [BAD_ROW]


def found_with_bytes(path: Path) -> tuple[str, list[tuple[str, bytes]], dict[str, str]]:
    """As ``found``, where reading bytes may itself be a problem."""
    name, items = read(path, ReadConfig(format="parquet"))  # beside loose images, auto could not tell
    pairs, problems = [], {}
    for item in items:
        assert isinstance(item, Example)
        assert item.read is not None
        try:
            pairs.append((item.caption, item.read()))
        except UnusableError as error:
            problems[item.name] = error.reason
    return name, pairs, problems


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_webdataset_tars(tmp_path: Path) -> None:
    members = {"a/0.png": PICTURES[0], "a/0.txt": CAPTIONS[0].encode(), "1.jpg": PICTURES[1]}
    members["1.json"] = json.dumps({"caption": CAPTIONS[1]}).encode()
    write_tar(tmp_path / "00.tar", members)
    more = {"2.png": PICTURES[2], "2.txt": CAPTIONS[2].encode(), "3.png": PICTURES[0], "4.txt": b"x", "5.png": b"x"}
    write_tar(tmp_path / "01.tar", more | {"5.json": b"{", "6.seg.png": b"mask", "6.txt": b"x"})
    name, pairs, problems = found(tmp_path)
    assert (name, pairs) == ("webdataset", EXPECTED)
    assert problems == {
        "01.tar/3": NO_CAPTION, "01.tar/4": NO_IMAGE, "01.tar/5": BAD_CAPTION, "01.tar/6": NO_IMAGE
    }  # fmt: skip


def test_tars_of_other_names_and_captions(tmp_path: Path) -> None:
    members = {"./0.png": PICTURES[0], "./0.png.txt": CAPTIONS[0].encode("utf-16"), "1.jpg": PICTURES[1]}
    members |= {"1.caption": CAPTIONS[1].encode(), "2.png": PICTURES[2], "._2.png": b"of a Mac", ".trash/3.png": b"x"}
    members["2.json"] = json.dumps({"text": [CAPTIONS[2], "another"]}).encode()
    write_tar(tmp_path / "00.TAR", members)
    assert found(tmp_path) == ("webdataset", EXPECTED, {})


def test_a_cut_off_tar_keeps_what_comes_before(tmp_path: Path) -> None:
    members = {f"{n}.{s}": b"caption" if s == "txt" else PICTURES[0] for n in range(4) for s in ("txt", "png")}
    write_tar(tmp_path / "x.tar", members)
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: whole.index(b"2.png") + 700])
    _, pairs, problems = found(tmp_path / "x.tar")
    assert [data for _, data in pairs[:2]] == [PICTURES[0]] * 2
    assert BAD_ROW in problems.values()


def test_a_tar_whose_header_says_more_than_memory_holds(tmp_path: Path) -> None:
    members = {"0.txt": CAPTIONS[0].encode(), "0.png": PICTURES[0], "1.txt": b"x"}
    write_tar(tmp_path / "x.tar", members)
    huge = tarfile.TarInfo("1.png")
    huge.size = 2**50
    whole = (tmp_path / "x.tar").read_bytes()
    end = whole.index(b"1.txt") + 1024
    (tmp_path / "x.tar").write_bytes(whole[:end] + huge.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    _, pairs, problems = found(tmp_path / "x.tar")
    assert pairs == EXPECTED[:1]
    assert problems == {"x.tar/1": BAD_ROW, "x.tar": BAD_ROW}


def test_prompt_lists(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog  \n")
    assert found(tmp_path / "prompts.txt") == (
        "prompts",
        [("a cat", None), ("a dog", None)],
        {"prompts.txt:2": EMPTY_CAPTION},
    )


def test_a_dataset_of_hugging_face(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": data, "path": None} for data in PICTURES], "text": CAPTIONS}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    assert found(tmp_path / "saved") == ("huggingface", EXPECTED, {})


def test_a_dataset_of_hugging_face_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(InputError, match="needs the datasets package; fix: pip install datasets"):
        found(tmp_path, format="huggingface")


def test_prompt_lists_in_other_encodings(tmp_path: Path) -> None:
    file = tmp_path / "prompts.TXT"
    file.write_bytes("a café\r\na dog".encode("utf-16"))
    assert found(file) == ("prompts", [("a café", None), ("a dog", None)], {})
    file.write_bytes(b"\xef\xbb\xbfa cat\n" + "a café\n".encode("latin-1"))
    assert found(file) == ("prompts", [("a cat", None)], {"prompts.TXT:2": BAD_CAPTION})


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "has no images; got no files"),
        ({"a.txt": "x", "b.pdf": "x"}, r"has no images; got \.pdf, \.txt"),
        ({"a.png": "x", "b.tar": "x"}, "in several ways; got webdataset, text; fix: add read.format=webdataset"),
    ],
)
def test_wrong_folders_are_one_line(tmp_path: Path, files: dict[str, str], says: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=says):
        found(tmp_path)


def test_wrong_paths_and_formats_are_one_line(tmp_path: Path) -> None:
    for name in ("nowhere", "x" * 300):
        with pytest.raises(InputError, match="no file or folder"):
            found(tmp_path / name)
    (tmp_path / "x.csv").write_text("x")
    with pytest.raises(InputError, match=r"of no known format; got \.csv"):
        found(tmp_path / "x.csv")
    with pytest.raises(InputError, match=r"format prompts cannot be read from .*; expected a text file"):
        found(tmp_path, format="prompts")
    with pytest.raises(InputError, match="is not a parquet file"):
        found(tmp_path / "x.csv", format="parquet")
