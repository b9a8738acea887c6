"""Uploading without a hub: one line, and the exported folder stays."""

from pathlib import Path

import pytest

from twinrl.commands.export import push
from twinrl.config.errors import InputError


def test_a_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "README.md").write_text("card")
    with pytest.raises(InputError, match=r"hub cannot be reached.*upload .* later"):
        push(tmp_path, "owner/name", "token")
    assert (tmp_path / "README.md").read_text() == "card"


def test_a_name_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"the hub refuses not a name|cannot be reached"):
        push(tmp_path, "not a name", "token")
