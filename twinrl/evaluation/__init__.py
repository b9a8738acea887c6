"""Fixed-protocol validation: distances, the protocol, the final table, pictures."""

from twinrl.evaluation.distances import frechet_distance, kernel_distance
from twinrl.evaluation.prdc import prdc
from twinrl.evaluation.prompts import PromptProtocol, PromptTable
from twinrl.evaluation.protocol import EvaluationConfig, LabelProtocol
from twinrl.evaluation.table import FinalTable, final_table

__all__ = [
    "EvaluationConfig",
    "FinalTable",
    "LabelProtocol",
    "PromptProtocol",
    "PromptTable",
    "final_table",
    "frechet_distance",
    "kernel_distance",
    "prdc",
]
