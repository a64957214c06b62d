"""The Triton kernels of attention's backward pass, with the shipped tiles, compiled for their GPUs."""

import pytest
from compiling import assert_as_in_the_table, hardest


@pytest.mark.parametrize(("arch", "number"), hardest("attention.triton_backward_kernels"))
def test_as_in_the_table(arch, number):
    assert_as_in_the_table(arch, number)
