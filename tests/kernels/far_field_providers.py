"""Which providers the cases of the far field run on: Triton alone where it is interpreted."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PROVIDERS = ["triton"] if INTERPRETED else ["reference", "cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXAMPLES = 8 if INTERPRETED else 25
