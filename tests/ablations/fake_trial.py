"""A network named by its dotted path: importing this module, as a trial does, makes ``digits`` the fake source.

Trials then start in seconds and need no laboratory. Tests name the network and import nothing from here: where their
own process loads such a configuration, they put the sources back.
"""

from typing import Literal

from tests.fake_source import FakeSource
from twinrl.backends import MLP
from twinrl.data import SOURCES

SOURCES["digits"] = lambda root: FakeSource()


class Net(MLP):
    """The usual network."""

    class Config(MLP.Config):
        kind: Literal["tests.ablations.fake_trial.Net"] = "tests.ablations.fake_trial.Net"  # type: ignore[assignment]
