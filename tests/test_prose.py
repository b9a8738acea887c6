"""How sentences are counted: what is told and what is not."""

from tests import prose

PAGE = """---
title: not told
---
# A heading is not told

One two three. Four `five.six()` seven (e.g. eight)! Nine
ten?

- An item [with a link](there.md) of eight words here.

| a table | is not |
|---|---|
| told. | at all |

    code is not

```python
neither.is_this()
```
"""


def test_sentences_are_those_of_paragraphs_and_items() -> None:
    found = [(sentence.line, sentence.words) for sentence in prose.sentences("page", PAGE)]
    assert found == [(6, 3), (6, 5), (6, 2), (9, 9)]


def test_a_page_is_good_by_its_mean_and_its_long_sentences() -> None:
    def of(*words: int) -> prose.Count:
        return prose.count("page", [prose.Sentence("page", 1, "word " * many) for many in words])

    assert of(16, 16).good
    assert of(*[15] * 19, 31).good
    assert not of(16, 17).good
    assert not of(*[10] * 18, 31).good
    assert prose.count("page", []).good
