"""The toy source's protocol, built once."""

import pytest

from tests.evaluation.toy import Exact, ToySource
from twinrl.evaluation import EvaluationConfig, LabelProtocol


@pytest.fixture(scope="session")
def source() -> ToySource:
    return ToySource()


@pytest.fixture(scope="session")
def config() -> EvaluationConfig:
    return EvaluationConfig(n=100, nfe=(1, 2), teacher_steps=3, velocity_rows=20, batch=32, grid_samples=3)


@pytest.fixture(scope="session")
def protocol(source: ToySource, config: EvaluationConfig) -> LabelProtocol:
    return LabelProtocol(source, config)


@pytest.fixture
def network() -> Exact:
    return Exact()
