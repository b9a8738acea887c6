"""What is said before a simulation starts its process, and of a pipeline that is no such."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tests.backends.families import tiny
from twinrl.commands import simulate
from twinrl.config.errors import InputError
from twinrl.training import schema
from twinrl.training.described import Described


@pytest.mark.parametrize(
    ("config", "override", "gpu", "said"),
    [("twinflow", "train.batch=no", None, r"train\.batch"), ("none.yaml", "seed=1", "H100", "none.yaml"),
     ("twinflow", "seed=1", "P100", "--gpu is unknown; got P100; expected H100")],
)  # fmt: skip
def test_wrong_input_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, config: str, override: str, gpu: str | None, said: str
) -> None:
    monkeypatch.delattr(simulate, "Simulator")
    with pytest.raises(InputError, match=said):
        simulate.simulate(config, [override], 1, Console(file=StringIO()), gpu)


def test_a_model_that_cannot_be_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="description of no/such cannot be fetched"):
        Described(schema.load("sd35", ["model.path=no/such"]))


def test_another_familys_pipeline(tmp_path: Path) -> None:
    tiny.build("sd3").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is another family's; got StableDiffusion3Pipeline; expected FluxPipeline"):
        Described(schema.load("flux", [f"model.path={tmp_path}"]))


def test_frozen_models_are_either_on_the_host_or_in_parts() -> None:
    with pytest.raises(InputError, match=r"fsdp\.frozen=sharded in parts on the device; fix: choose one"):
        schema.load("sd35", ["model.path=x", "machine.offload=true", "fsdp.frozen=sharded"])
