"""The Triton kernels of clustering, compiled for GPUs."""

import pytest
from compiling import assert_as_in_the_table, hardest


@pytest.mark.parametrize(("arch", "number"), hardest("clustering.triton_kernels"))
def test_as_in_the_table(arch, number):
    assert_as_in_the_table(arch, number)
