"""The attention tile against its paper: the mask pair by pair, the count of pairs, the table of sparsities."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify_compiler import OptionError
from sparsify_compiler.kernels import block_sparse_attention
from sparsify_compiler.methods.tile import FittedTile, Tile, frame_mask, reference_set, tile_sparsity
from sparsify_compiler.plan import TokenLayout
from sparsify_compiler.testing.oracles import assert_close_to_float64, masked_attention, tile_mask
from sparsify_compiler.testing.strategies import qkv, site_of

SITE = site_of(torch.empty(1, 1, 4, 8))
"""The attention tile looks at the layout alone."""


@st.composite
def layouts(draw: st.DrawFn) -> tuple[TokenLayout, int]:
    """(a layout with or without text on either side, a number of reference frames)."""
    grid = draw(st.integers(1, 7)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    before, after = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    tokens = before + grid[0] * grid[1] * grid[2] + after
    return TokenLayout(tokens=tokens, grid=grid, before=before, after=after), draw(st.integers(1, grid[0]))


@given(layouts())
def test_the_table_stands_for_the_papers_mask(drawn: tuple[TokenLayout, int]) -> None:
    layout, k = drawn
    table = Tile(reference_frames=k).fit(SITE, layout).table(layout)
    exact = tile_mask(layout.frames, k, layout.tokens_per_frame, layout.before, layout.after)
    assert torch.equal(table.mask()[0, 0], exact)
    assert table.density() == pytest.approx(exact.double().mean().item())


@given(st.integers(1, 40), st.data())
def test_kept_pairs_and_rows(frames: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, frames))
    kept, reference = frame_mask(frames, k), reference_set(frames, k)
    assert len(set(reference)) == k
    assert max(reference) < frames
    assert int(kept.sum()) == (2 * k + 1) * frames - k * (k + 1)
    for frame in range(frames):
        seen_by = kept[:, frame].nonzero().flatten().tolist()
        own = sorted({frame, *reference})
        assert seen_by == (list(range(frames)) if frame in reference else own)
    assert kept.any(1).all()


@given(layouts())
def test_text_sees_and_is_seen_by_everything(drawn: tuple[TokenLayout, int]) -> None:
    layout, k = drawn
    mask = FittedTile(reference_frames=k).table(layout).mask()[0, 0]
    text = [*range(layout.before), *range(layout.tokens - layout.after, layout.tokens)]
    assert mask[text].all()
    assert mask[:, text].all()


@given(layouts(), st.sampled_from(["reference", "cpu"]))
def test_every_frame_as_reference_equals_dense(drawn: tuple[TokenLayout, int], provider: str) -> None:
    layout, _ = drawn
    table = FittedTile(reference_frames=layout.frames).table(layout)
    assert table.density() == 1.0
    q, k, v = (t.requires_grad_() for t in qkv(1, 2, 2, layout.tokens, layout.tokens, 16, 16, torch.float32))
    out, lse = block_sparse_attention(q, k, v, table, provider=provider)
    everything = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    assert_close_to_float64(out.detach(), lse.detach(), q, k, v, everything)
    exact, _ = masked_attention(q, k, v, everything)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((exact * weight).sum(), (q, k, v))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("frames", "reference_frames", "percent"), [(8, 4, 17.60), (8, 3, 29.88), (8, 2, 45.47), (8, 1, 64.38)]
)
def test_the_papers_table_of_sparsities(frames: int, reference_frames: int, percent: float) -> None:
    assert 100 * tile_sparsity(frames, reference_frames, 3600) == pytest.approx(percent, abs=0.01)


@given(st.integers(1, 6), st.data(), st.integers(1, 9), st.integers(1, 9))
def test_sparsity_in_blocks_by_brute_force(
    frames: int, data: st.DataObject, per_frame: int, block: int
) -> None:
    k = data.draw(st.integers(1, frames))
    mask = tile_mask(frames, k, per_frame)
    computed = torch.zeros_like(mask)
    for i in range(0, len(mask), block):
        for j in range(0, len(mask), block):
            computed[i : i + block, j : j + block] = mask[i : i + block, j : j + block].any()
    assert tile_sparsity(frames, k, per_frame, block) == pytest.approx(1 - computed.double().mean().item())


def test_settings_are_filled_in_and_checked() -> None:
    layout = TokenLayout(tokens=70, grid=(7, 2, 5))
    assert Tile().fit(SITE, layout).reference_frames == 3
    assert Tile().fit(SITE, TokenLayout(tokens=4, grid=(1, 2, 2))).reference_frames == 1
    shares = {0.125: 1, 0.43: 3, 5 / 7: 5, 0.99: 6}
    assert {
        share: Tile(reference_frames=share).fit(SITE, layout).reference_frames for share in shares
    } == shares
    with pytest.raises(OptionError, match=r"1\.\.7.*got 8"):
        Tile(reference_frames=8).fit(SITE, layout)
    for wrong in (True, 1.5, 1.0, 0.0, -1, None):
        with pytest.raises(OptionError, match=f"an integer of at least 1 or a share.*got {wrong}"):
            Tile(reference_frames=wrong)
    with pytest.raises(OptionError, match="block_size must be at least 1, got 0"):
        tile_sparsity(8, 4, 3600, 0)
    with pytest.raises(OptionError, match=r"1\.\.8, got 9"):
        tile_sparsity(8, 9, 3600)
    assert Tile().refusal(TokenLayout(tokens=4, reason="no grid")) == "no grid"
