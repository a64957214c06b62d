"""Small diffusers video transformers with seeded weights and inputs, and the attention calls to expect in each.

The expectations come from the models' sources, never from the compiler, which must meet them. Weights are the
family's initialisation plus noise, so that no zero gate hides an attention.

The compiler was written for `wan`, `wan_i2v`, `hunyuan_video`, `hunyuan_video_i2v`, `cogvideox...`, `ltx`,
`allegro` and `easyanimate`, and not for the other families.
"""

from sparsify_compiler.testing.models import cogvideox, hunyuan, others, wan
from sparsify_compiler.testing.models.case import (
    CASES,
    CROSS,
    DENSE,
    GRID,
    TEXT,
    Case,
    Expected,
    Grid,
    Inputs,
    Made,
    output_of,
    take_gradients,
)

__all__ = [
    "CASES",
    "CROSS",
    "DENSE",
    "GRID",
    "TEXT",
    "Case",
    "Expected",
    "Grid",
    "Inputs",
    "Made",
    "cogvideox",
    "hunyuan",
    "others",
    "output_of",
    "take_gradients",
    "wan",
]
