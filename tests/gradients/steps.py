"""Small objectives in float64, their gradients computed plainly, and the engine on the same batches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.objectives import batch_of, counts_of, objective_of
from tests.reference import network
from twinrl.flow.branches import Batch
from twinrl.flow.conditions import Condition
from twinrl.gradients import Engine
from twinrl.terms.objective import Losses, Objective, Pass
from twinrl.training.passes import Apart
from twinrl.training.schema import RunConfig

BATCH = 16
PRESETS = ("twinflow", "tutorial", "simpletuner", "lab")
Measures = Mapping[str, Tensor]


class Perceptron(nn.Module):
    """Data (B, 2, 3, 3), signed times and ``c`` (B, 3) through two layers, with dropout between them."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(5)
        self.enter, self.dropout, self.leave = nn.Linear(18 + 6, 13), nn.Dropout(dropout), nn.Linear(13, 18)
        self.to(dtype)

    def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        told = torch.cat([x.flatten(1), torch.stack([t, r, t.sign()], 1), condition["c"]], 1)
        return self.leave(self.dropout(torch.tanh(self.enter(told)))).view_as(x)


@dataclass
class Step:
    """One batch of an objective.

    Attributes:
        made: the objective around the student.
        config: from which it was made; its ``gradients`` are the engine's.
        batch: the global batch, or a rank's rows of it.
        counts: rows per branch of the global batch.
        micro: rows per micro-batch.
    """

    made: Objective
    config: RunConfig
    batch: Batch
    counts: Mapping[str, int]
    micro: int = BATCH

    @property
    def student(self) -> nn.Module:
        return self.made.teacher.student

    def passes(self, separate: bool = False) -> list[Pass]:
        torch.manual_seed(7)  # of the dropout
        return [self.made.evaluate(chunk, self.counts, separate) for chunk in self.batch.chunks(self.micro)]

    def apart(self) -> list[Apart]:
        """The passes as the engine sees them."""
        passes = self.passes(self.config.gradients.separate)
        return [Apart(one, self.config.gradient_owners) for one in passes]

    def plain(self, name: str | None = None) -> Tensor:
        """The gradient of the total, or of one term: plain back-propagation, micro-batch by micro-batch."""
        self.student.zero_grad()
        for one in self.passes():
            losses = one.losses()
            wanted = [part.loss for term, part in losses.items() if name in (None, term)]
            if wanted:
                torch.stack(wanted).sum().backward()
        return flat(self.student)

    def engine(self, total: Callable[[Tensor], Tensor] = lambda value: value) -> Engine:
        return Engine(self.config.gradients, self.student.parameters(), self.config.gradient_owners, total)

    def run(self, engine: Engine | None = None, step: int = 0) -> tuple[Tensor, Losses, Measures]:
        """The engine's gradient, losses and measures."""
        engine = engine or self.engine()
        apart = self.apart()
        measures = engine.backward(apart, step)
        return flat(self.student), [one.losses for one in apart], measures


def step_of(
    preset: str,
    *overrides: str,
    student: nn.Module | None = None,
    micro: int = BATCH,
    dtype: torch.dtype = torch.float64,
    autocast: torch.dtype | None = None,
) -> Step:
    """A batch of 16 rows of the preset; on the reference networks if no student is given."""
    teacher = network("net_teacher") if student is None else None
    made, config = objective_of(preset, student or network("net_student"), overrides, teacher, autocast)
    drawn = torch.randn(BATCH, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    x, c, null = drawn[:, :18].view(BATCH, 2, 3, 3), {"c": drawn[:, 18:21]}, {"c": drawn[:, 21:]}
    batch = batch_of(config, x, c, null)
    return Step(made, config, batch, counts_of(batch), micro)


def flat(module: nn.Module) -> Tensor:
    """All gradients joined; zeros where there is none."""
    return torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in module.parameters()])


def assert_close(value: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal up to ``tolerance`` times the largest expected entry, which is not zero."""
    scale = expected.abs().max()
    assert scale > 0
    torch.testing.assert_close(value.to(expected), expected, rtol=0, atol=tolerance * float(scale))
