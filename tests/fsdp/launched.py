"""A network named by its dotted path: importing this module, as workers do, makes the fake source known to them."""

from typing import Literal

from tests.fsdp.cases import register
from twinrl.backends import MLP
from twinrl.evaluation import figures


def undrawn(*_: object) -> None:
    """In the place of a figure, which would take longer to draw than the run to train."""


register()
figures.save_curves = figures.save_norms = figures.save_times = undrawn


class Net(MLP):
    """The usual network."""

    class Config(MLP.Config):
        kind: Literal["tests.fsdp.launched.Net"] = "tests.fsdp.launched.Net"  # type: ignore[assignment]
