"""A network named by its dotted path: importing this module, as a trial does, makes ``digits`` the fake source.

Trials then start in seconds, need no laboratory and draw no figures. Tests name the network and import nothing from
here: where their own process loads such a configuration, they put back what this changes.
"""

from typing import Literal

import pytest

from tests.ablations.tiny import without_figures
from tests.fake_source import FakeSource
from twinrl.backends import MLP
from twinrl.training.sources import SOURCES

SOURCES["digits"] = lambda root: FakeSource()
without_figures(pytest.MonkeyPatch())


class Net(MLP):
    """The usual network."""

    class Config(MLP.Config):
        kind: Literal["tests.ablations.fake_trial.Net"] = "tests.ablations.fake_trial.Net"  # type: ignore[assignment]
