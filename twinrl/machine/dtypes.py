"""The formats of numbers by the names that configurations give them."""

import torch

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}
MASTER_DTYPES = DTYPES | {"bf16": torch.float32}
"""``train.precision`` → dtype of data and of a network of one's own: under bf16 autocast both are float32."""
