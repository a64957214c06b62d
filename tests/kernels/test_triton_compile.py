"""The Triton kernel of attention, with every shipped choice of tiles, compiled for its GPU."""

import pytest
from compiling import assert_as_in_the_table, hardest


@pytest.mark.parametrize(("arch", "number"), hardest("attention.triton_kernels"))
def test_as_in_the_table(arch, number):
    assert_as_in_the_table(arch, number)
