"""The Triton kernels of the far field and of statistics, compiled for GPUs."""

import pytest
from compiling import assert_as_in_the_table, hardest


@pytest.mark.parametrize(
    ("arch", "number"), [*hardest("statistics.triton_kernels"), *hardest("far_field.triton_kernels")]
)
def test_as_in_the_table(arch, number):
    assert_as_in_the_table(arch, number)
