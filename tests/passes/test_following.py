"""Values that Dynamo recorded, where some of their sizes are unknown."""

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sparsify_compiler.passes.following import Unknown, _static


def test_a_size_that_depends_on_values_is_unknown_among_known_ones() -> None:
    size = ShapeEnv().create_unbacked_symint()
    first, last = _static(torch.Size([3, size]))
    assert first == 3
    assert isinstance(last, Unknown)
    assert _static(torch.Size([3, 4])) == torch.Size([3, 4])
