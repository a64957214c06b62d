"""The fuzzer's cases as hypothesis strategies: hypothesis draws every choice, and shrinks what fails."""

from hypothesis import strategies as st

from sparsify_compiler.testing.fuzzing import Case, Draw, draw_case


@st.composite
def cases(draw: st.DrawFn, kind: str) -> Case:
    """Any case of a kind."""
    return draw_case(kind, Draw(lambda low, high: draw(st.integers(low, high))))
