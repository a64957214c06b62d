"""The Triton kernels of prediction, compiled for GPUs."""

import pytest
from compiling import assert_as_in_the_table, hardest


@pytest.mark.parametrize(("arch", "number"), hardest("prediction.triton_kernels"))
def test_as_in_the_table(arch, number):
    assert_as_in_the_table(arch, number)
