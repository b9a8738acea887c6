"""Links of pages that work on a plain git host lead to the same files on the site."""

import pytest

from tests.pages import REPOSITORY, all_pages
from website import places

KNOWN = {"README.md", "docs/a.md", "docs/b.md", "papers/c.md", "papers/images/d.png", "benchmarks/e.py"} | {
    "analysis/notebooks/f.ipynb"
}


@pytest.mark.parametrize(
    ("source", "text", "there"),
    [
        ("docs/a.md", "see [b](b.md#x)", "see [b](b.md#x)"),
        ("docs/a.md", "see [c](../papers/c.md#y)", "see [c](papers/c.md#y)"),
        ("papers/c.md", "see [`a`](../docs/a.md), ![d](images/d.png)", "see [`a`](../a.md), ![d](images/d.png)"),
        ("README.md", "[a](docs/a.md) and [e](benchmarks/e.py)", "[a](a.md) and [e](benchmarks/e.py)"),
        ("docs/a.md", "[home](../README.md)", "[home](index.md)"),
        ("docs/a.md", "[run](../analysis/notebooks/f.ipynb)", "[run](notebooks/f.md)"),
        ("analysis/notebooks/f.ipynb", "[c](../../papers/c.md)", "[c](../papers/c.md)"),
        ("docs/a.md", "[web](https://example.org/b.md), [here](#x)", "[web](https://example.org/b.md), [here](#x)"),
        ("docs/a.md", "a folder, [`results`](../papers/results)", "a folder, `results`"),
    ],
)
def test_links_lead_to_the_same_file(source: str, text: str, there: str) -> None:
    assert places.rewritten(source, text, KNOWN) == there


@pytest.mark.parametrize("page", all_pages())
def test_links_of_pages_lead_somewhere(page: str) -> None:
    """Also where the site is not built."""
    text = (REPOSITORY / page).read_text()
    assert [target for target in places.targets(page, text) if not (REPOSITORY / target).exists()] == []


def test_pages_are_followed_and_other_files_are_not() -> None:
    reached = places.reached(["README.md"])
    assert {"README.md", "docs/architecture.md", "docs/images/over-training.png"} <= reached
    assert not any((REPOSITORY / name).is_dir() for name in reached)
