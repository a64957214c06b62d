"""Memory that outputs are made of is poisoned where tests ask for it: else they pass on memory left from before."""

import pytest
import torch

from sparsify_compiler.kernels import attention, clustering, prediction, statistics
from sparsify_compiler.testing.poison import INDEX, poisoned_memory

X = torch.ones(1, 2, 6, 4)
BOUNDS = torch.tensor([[[0, 3, 6]]], dtype=torch.int32)
OUTPUTS = {
    attention.empty_outputs: (X, X),
    attention.empty_gradients: (X, X, X),
    clustering.empty_blocks: (X, 3, 2, 0, 0),
    clustering.empty_kmeans: (X, X),
    clustering.empty_sort: (torch.zeros(1, 2, 6, dtype=torch.int32), 3),
    clustering.empty_top_p: (X, X),
    prediction.empty_top_k: (X, None, 3),
    statistics.empty_left: (BOUNDS, BOUNDS),
    statistics.empty_means: (X, BOUNDS),
    statistics.empty_pairs: (BOUNDS, BOUNDS, BOUNDS, BOUNDS[..., None]),
    statistics.empty_statistics: (X, X, BOUNDS, None, None, True),
}


def test_every_function_that_makes_outputs_is_here():
    modules = (attention, clustering, prediction, statistics)
    made = {value for module in modules for name, value in vars(module).items() if name.startswith("empty_")}
    assert made == set(OUTPUTS)


@pytest.mark.parametrize("make", OUTPUTS, ids=lambda make: make.__name__)
def test_outputs_are_poison(make):
    with poisoned_memory():
        for tensor in filter(lambda one: isinstance(one, torch.Tensor), make(*OUTPUTS[make])):
            poisoned = tensor.isnan() if tensor.is_floating_point() else tensor == INDEX
            assert poisoned.all()
