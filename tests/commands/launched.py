"""A network named by its dotted path: importing this module, as workers do, makes the fake source known to them."""

from typing import Literal

from tests.fsdp.cases import register
from twinrl.backends import MLP

register()


class Net(MLP):
    """The usual network."""

    class Config(MLP.Config):
        kind: Literal["tests.commands.launched.Net"] = "tests.commands.launched.Net"  # type: ignore[assignment]
