"""Which providers the cases of the far field run on: Triton alone where it is interpreted."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PROVIDERS = ["triton"] if INTERPRETED else ["reference", "cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXAMPLES = 8 if INTERPRETED else 25
FEW = (1, 2, 1) if INTERPRETED else (2, 4, 2)
"""Batch, heads and key heads where they are not what is looked at: the interpreter takes time for each program."""
