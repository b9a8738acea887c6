"""Prompt sets: published formats, where images go, and statistics that count a prompt once."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from twinrl.config.errors import InputError
from twinrl.evaluation import prompt_page, prompt_set
from twinrl.evaluation.prompt_set import Scores

GENEVAL = {"tag": "two_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench & a <cow>"}


def flat(prompt: str, seed: int) -> Tensor:
    """One grey for each prompt and seed."""
    return torch.full((3, 8, 8), len(prompt) / 100 - seed / 10)


def drawn(folder: Path, wanted: prompt_set.PromptSet, seeds: int = 3, painter: object = flat) -> int:
    """Draw; how many ticks."""
    ticks: list[int] = []
    prompt_set.draw(folder, wanted, seeds, painter, lambda: ticks.append(1))  # type: ignore[arg-type]
    return len(ticks)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "\ufeffone\n\n  two  \n"), ("a.prompts", "one\r\ntwo"),
        ("a.json", '["one", {"prompt": "two", "n": 1}]'),
        ("a.jsonl", '{"prompt": "one"}\n{"prompt": "two"}\n'),
    ],
)  # fmt: skip
def test_plain_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    found = prompt_set.read(tmp_path / name)
    assert found.form == "plain"
    assert [(prompt.name, prompt.text) for prompt in found.prompts] == [("00000", "one"), ("00001", "two")]


def test_genevals_files_and_layout(tmp_path: Path) -> None:
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(GENEVAL) + "\n")
    wanted = prompt_set.read(tmp_path / "evaluation_metadata.jsonl")
    assert wanted.form == "geneval"
    assert drawn(tmp_path / "out", wanted) == 3
    assert json.loads((tmp_path / "out" / "00000" / "metadata.jsonl").read_text()) == GENEVAL
    found = sorted(path.name for path in (tmp_path / "out" / "00000" / "samples").iterdir())
    assert found == ["0000.png", "0001.png", "0002.png"]


def test_dpg_benchs_folder_and_grids(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    for name in ("partiprompts1", "stanford2"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"{name} and more\n")
    wanted = prompt_set.read(tmp_path / "prompts")
    drawn(tmp_path / "out", wanted)
    with Image.open(tmp_path / "out" / "grids" / "stanford2.png") as grid:
        pixels = np.asarray(grid)
    assert pixels.shape == (16, 16, 3)
    corners = [pixels[y, x, 0] for y, x in ((0, 0), (0, 8), (8, 0), (8, 8))]
    values = [round((float(flat("stanford2 and more", seed)[0, 0, 0]) + 1) * 127.5) for seed in range(3)]
    assert corners == [*values, 0]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "cannot be read"),
        ("a.txt", b"\n \n", "no prompts.*got 0"),
        ("a.txt", b"caf\xe9", "not UTF-8; got byte 3"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}', "entry without a prompt; got entry 1"),
        ("a.json", b'{"prompt": "a"}', "no list of prompts"),
        ("a.json", b'["a", " "]', "empty prompt; got prompt 00001"),
        ("a.json", b"[" * 5000, "not JSON"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        prompt_set.read(tmp_path / name)


def test_what_is_drawn_is_not_drawn_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    wanted, asked = prompt_set.read(tmp_path / "a.txt"), []

    def counting(prompt: str, seed: int) -> Tensor:
        asked.append((prompt, seed))
        return flat(prompt, seed)

    drawn(tmp_path / "out", wanted, 2, counting)
    (tmp_path / "out" / wanted.image(wanted.prompts[1], 0)).unlink()
    drawn(tmp_path / "out", wanted, 2, counting)
    assert asked == [("one", 0), ("one", 1), ("two", 0), ("two", 1), ("two", 0)]


def test_images_of_other_prompts_or_settings_are_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    wanted = prompt_set.read(tmp_path / "a.txt")
    prompt_set.begin(tmp_path / "out", wanted, {"nfe": 4})
    prompt_set.begin(tmp_path / "out", wanted, {"nfe": 4})
    with pytest.raises(InputError, match="another evaluation; got another nfe"):
        prompt_set.begin(tmp_path / "out", wanted, {"nfe": 1})
    (tmp_path / "a.txt").write_text("one\nthree")
    with pytest.raises(InputError, match="got another prompts"):
        prompt_set.begin(tmp_path / "out", prompt_set.read(tmp_path / "a.txt"), {"nfe": 4})


def test_scores_are_those_of_the_files_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\nthree\ntwo")
    wanted = prompt_set.read(tmp_path / "a.txt")
    drawn(tmp_path / "out", wanted, 2)

    def brightness(images: Tensor, prompts: object) -> Tensor:
        return images.mean((1, 2, 3))

    found = prompt_set.score(tmp_path / "out", "m", wanted, 2, {"b": brightness}, batch=4).values["b"]
    expected = torch.tensor([[flat(p.text, seed)[0, 0, 0] for seed in range(2)] for p in wanted.prompts])
    torch.testing.assert_close(found, expected, atol=1 / 127.5, rtol=0)
    (tmp_path / "out" / wanted.image(wanted.prompts[2], 1)).write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"0001\.png is damaged.*remove it"):
        prompt_set.score(tmp_path / "out", "m", wanted, 2, {"b": brightness})


def test_a_prompt_counts_once_and_differences_are_paired() -> None:
    """Means of P prompts with Student's interval over prompts; seeds narrow nothing by their number."""
    base = torch.tensor([[0.0, 2.0], [4.0, 6.0], [8.0, 10.0]])
    first, second = Scores("a", {"j": base}), Scores("b", {"j": base + torch.tensor([[1.0], [1.5], [2.0]])})
    assert first.mean("j").value == pytest.approx(5)
    half = 4.302653 * 4 / 3**0.5  # t(2), of the means 1, 5, 9
    assert (first.mean("j").low, first.mean("j").high) == pytest.approx((5 - half, 5 + half), rel=1e-5)
    gap = second.less(first, "j")
    assert (gap.value, gap.high - gap.value) == pytest.approx((1.5, 4.302653 * 0.5 / 3**0.5), rel=1e-5)
    assert second.wins(first, "j") == 1
    assert first.wins(first, "j") == 0.5


def test_the_page_begins_with_the_largest_difference_and_is_safe(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "calm"}) + "\n" + json.dumps(GENEVAL) + "\n")
    wanted = prompt_set.read(tmp_path / "a.jsonl")
    one = Scores("<a>", {"j": torch.zeros(2, 1)})
    two = Scores("b", {"j": torch.tensor([[0.1], [-3.0]])})
    text = prompt_page.page("a <set>", wanted, [one, two], ["a", "b"], 1)
    assert text.index("a photo of a bench &amp; a &lt;cow&gt;") < text.index("calm")
    assert "<cow>" not in text
    assert "<a>" not in text
    assert "-1.45 [" in text
