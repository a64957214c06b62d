"""Moves that write to tokens in place or through aliases."""

from sparsify_compiler.testing.fuzzing.cases import Draw
from sparsify_compiler.testing.fuzzing.machines import WIDTH
from sparsify_compiler.testing.fuzzing.moves import KEPT, moved
from sparsify_compiler.testing.fuzzing.tables import filled, table
from sparsify_compiler.testing.fuzzing.tokens import Move, Tokens

write_in_place = table("""
    x = x.clone(); x.mul_(m.two)
    x = x.clone(); x.add_(m.one)
    x = x.clone(); x[:, :2] *= m.two
    x = x.clone(); y = x[:, 1:]; y.mul_(m.two)
    x = x.clone(); x += m.one
    x = x.clone(); x[:] = m.linear(x)
    x = x.clone(); x.copy_(m.linear(x))
    x = x.clone(); x.relu_()
    x = x.clone(); x[0] *= m.two
    x = x.clone(); x[:, {i}] *= m.zero
    x = x.clone(); x.transpose(0, 1).add_(m.one)
    x = x.clone(); x[..., :3] += m.one
    x = x.clone(); y = x.unflatten(-1, (2, -1)); y.mul_(m.two)
    x = x.contiguous(); F.relu(x, inplace=True)
    y = torch.empty_like(x); y.copy_(x); x = y
    y = torch.empty_like(x); torch.mul(x, m.two, out=y); x = y
    y = x.new_empty(x.shape); y.view(-1).copy_(x.reshape(-1)); x = y
    y = torch.zeros_like(x); y[:] = x; x = y
    y = torch.zeros_like(x); y += x; x = y
    y = x.new_zeros(x.shape); y[:, :] = x; x = y
    y = x.clone(); y.mul_(m.two); y.copy_(x); x = y
""")


write_whole = table(
    """
    y[:, :{n}] = x[:, :{n}]; y[:, {n}:] = x[:, {n}:]
    y[:, {n}:] = x[:, {n}:]; y[:, :{n}] = x[:, :{n}]
    y[:, ::2] = x[:, ::2]; y[:, 1::2] = x[:, 1::2]
    y[:, torch.arange({S})] = x
    for i in range({S}): y[:, i] = x[:, i]
    y[0] = x[0]; y[1:] = x[1:]
    y[..., :8], y[..., 8:] = x[..., :8], x[..., 8:]
    y[:, :{n}].copy_(x[:, :{n}]); y[:, {n}:].copy_(x[:, {n}:])
    y.mT.copy_(x.mT)
    a, b = y.split([{n}, {S} - {n}], 1); a.copy_(x[:, :{n}]); b.copy_(x[:, {n}:])
""",
    inside="y = {blank}; {line}; x = y",
)
"""A buffer is filled part by part, with every token in its place."""


def write_with_text(t: Tokens, draw: Draw) -> None:
    """A buffer is filled with the text and the tokens."""
    n, size, front = t.scene.text, t.count, draw.chance(50)
    text, video = (f"y[:, :{n}]", f"y[:, {n}:]") if front else (f"y[:, {size}:]", f"y[:, :{size}]")
    new = draw.of("x.new_zeros", "x.new_empty")
    writes = (
        [f"{text} = text", f"{video} = x"]
        if draw.chance(60)
        else [f"{video}.copy_(x)", f"{text}.copy_(text)"]
    )
    if t.add("\n".join([f"y = {new}({t.batch}, {size + n}, {WIDTH})", *writes, "x = y"])):
        t.before, t.after = t.before + n * front, t.after + n * (not front)


alias = table("""
    y = x
    y = x[:]
    y = x[:, {n}:]
    y = x[:, :{n}]
    y = x.transpose(0, 1)
    y = x.mT
    y = x[:, {i}]
    y = x[0]
    y = x[:, ::2]
    y = x.unflatten(1, ({a}, -1))
    y = x.view(x.shape)
    y = x.detach()
    y = x.chunk(2, 1)[1]
    y = x.unbind(0)[-1]
    y = x.diagonal(0, 0, 1)
    y = x[..., :8]
    y = x.flatten(0, 1)
    y = x.expand_as(x)
    y = x.as_strided(x.shape, x.stride())
    y = x.unfold(1, 1, 1)
    x = x.clone(); y = x
    x = x.clone(); y = x.flatten(0, 1)
    x = x.clone(); y = x[:, {n}:]
    x = x.contiguous(); y = x.view({B}, {a}, -1, x.shape[-1])
""")
"""Another name for the memory of all or some tokens, taken before a write."""


write_moved = table(
    """
    y[:, ::2], y[:, 1::2] = x[:, 1::2], x[:, ::2]
    y[:, {i}], y[:, {j}] = x[:, {j}], x[:, {i}]
    y[:, :{n}], y[:, {n}:] = x[:, {S} - {n}:], x[:, :{S} - {n}]
    y.copy_(x.flip(1))
    y.copy_(x.flip(0))
    y[:] = x.roll(1, 1)
    y[:, {perm}] = x
    y[:, torch.tensor({perm})] = x
    y.index_copy_(1, torch.tensor({perm}), x)
    y.scatter_(1, torch.tensor({perm})[None, :, None].expand({B}, -1, x.shape[-1]), x)
    y[:, {i}:{i} + 1] = x[:, {j}:{j} + 1]
    y[:, {i}].copy_(x[:, {j}])
    y.select(1, {i}).copy_(x[:, {j}])
    y[:, [{i}, {j}]] = x[:, [{j}, {i}]]
    y.mT.copy_(x.flip(1).mT)
    y.unflatten(1, ({a}, -1))[:, 0] = x.unflatten(1, ({a}, -1))[:, -1]
    y.view({B}, {a}, {S} // {a}, -1).copy_(x.view({B}, {a}, {S} // {a}, -1).flip(2))
    y.view({B}, {a}, {S} // {a}, -1).copy_(x.view({B}, {S} // {a}, {a}, -1).transpose(1, 2))
    a, b = y.split([{n}, {S} - {n}], 1); a.copy_(x[:, {S} - {n}:]); b.copy_(x[:, :{S} - {n}])
    y[0] = x[-1]
    y[:1], y[1:] = x[-1:], x[:-1]
    y[:, :{S} // 2] = x[:, {S} // 2:2 * ({S} // 2)]
    y.narrow(1, 0, {S} // 2).copy_(x.narrow(1, {S} - {S} // 2, {S} // 2))
    y[:, {i}:].mul_(m.zero)
    y[:, 1:] = x[:, :-1]
    y[:, 0] = x[:, 1]
    torch.add(x.flip(1), 0.0, out=y)
    torch.index_select(x, 1, torch.tensor({perm}), out=y)
    torch.cat([x[:, 1:], x[:, :1]], 1, out=y)
    y[..., :8] = x.flip(1)[..., :8]
    y.masked_scatter_(torch.ones_like(y, dtype=torch.bool), x.flip(1))
    y.index_put_((torch.arange({B}),), x.flip(0))
    y.unbind(0)[0].copy_(x[0].flip(0))
    y.swapaxes(0, 1)[0] = x[:, -1]
    y.diagonal(0, 0, 1).copy_(x.flip(1).diagonal(0, 0, 1))
    y.as_strided(y.shape, y.stride()).copy_(x.flip(1))
    torch.ops.aten.copy_(y, x.flip(1))
    y.data.copy_(x.flip(1))
    z = y; z.copy_(x.flip(1))
    z = y[:, 1:]; z[:, 0] = x[:, 0]
    y.lerp_(x.flip(1), 1.0)
    y.sub_(y).add_(x.flip(1))
    torch._foreach_copy_([y], [x.flip(1)])
    y.index_add_(1, torch.tensor([0]), x[:, -1:])
    y.resize_(y.shape).copy_(x.flip(1))
""",
    inside="y = {copy}; {line}; x = y",
)
"""A copy or a buffer is written with tokens from other places."""


write_grid = table(
    """
    y = x.clone(); y.view({B}, {f}, {h}, {w}, -1).copy_({g}.flip({axis})); x = y
    y = x.clone(); z = y.view({B}, {f}, {h}, {w}, -1); z[:, 0], z[:, -1] = {g}[:, -1], {g}[:, 0]; x = y
    y = x.clone(); z = y.view({B}, {f}, {h}, {w}, -1); z[:, :, 0] = {g}[:, :, -1]; x = y
    y = x.clone(); z = y.view({B}, {f}, {h}, {w}, -1); z[:, :, :, 0] = {g}[:, :, :, -1]; x = y
    y = torch.zeros_like(x); z = y.view({B}, {f}, {h}, {w}, -1); z[:, {k}] = {g}[:, {k}]; x = y
""",
    video=True,
)
"""Frames, rows or columns are written in another order."""

write_alias = table("""
    y.copy_(y.flip(1))
    y[:, 0] = y[:, -1]
    y.copy_(y.roll(1, 1))
    y.mul_(m.zero)
    y[0].copy_(y[-1])
    y.mul_(m.two)
    y.copy_(y.flip(0))
    y[:, ::2], y[:, 1::2] = y[:, 1::2].clone(), y[:, ::2].clone()
    y[...] = y.flip(-2)
    y.add_(m.one)
    y[-1], y[0] = y[0].clone(), y[-1].clone()
    torch.add(y.flip(1), 0.0, out=y)
    x = y
    x.copy_(y)
    y[:, 1] *= m.zero
    y[:] = y.flip(1)
""")
"""Writes go through a name that was taken before."""


AROUND = table("""
    {y}.mul_(m.two)
    {y}.add_(m.one)
    {y}.copy_({y}.flip({dim}))
    {y}.copy_({y}.roll(1, {dim}))
    {y} *= m.two
    {y}[..., :3] += m.one
    {y}.copy_({y}.flip(0))
    z = {y}[..., 2:]; z.mul_(m.two)
    {y}.transpose(-1, -2).add_(m.one)
    torch.mul({y}, m.two, out={y})
    z = {y}.detach(); z.add_(m.one)
    F.relu({y}, inplace=True)
    {y}.narrow({dim}, 0, {n}).mul_(m.two)
    {y}[0].mul_(m.two)
    torch._foreach_mul_([{y}], m.two)
""")
"""Writes into y, whose tokens lie along dimension `dim`."""


def write_around_attention(t: Tokens, draw: Draw) -> None:
    """q, k, v or their base tensors are written before, between or after the products of attention by hand."""
    tag = t.tag()
    sources = [
        draw.of(f"m.{f}(x)", f"m.{f}(x).contiguous()", "x", "x.clone()") for f in ("sin", "cos", "act")
    ]
    split = draw.chance(70)
    steps = [
        f"s = m.scores(q, k, {tag})",
        f"w = m.weights(s, {tag})",
        "x = m.joined(w @ v)" if split else "x = w @ v",
    ]
    name = draw.of("q", "k", "v", "q0", "k0", "v0", "x", "x", "k")
    dim = 2 if split and name in ("q", "k", "v") else 1  # the dimension of the tokens
    steps.insert(draw.of(1, 2, 1, 2, 0, 3), filled(draw.of(*AROUND.lines), t, draw, y=name, dim=dim))
    operands = [f"{one}0 = {source}" for one, source in zip("qkv", sources, strict=True)]
    operands += [f"{one} = m.heads({one}0)" if split else f"{one} = {one}0" for one in "qkv"]
    t.add("\n".join([*operands, *steps]))


KEPT_WRITES: tuple[Move, ...] = (
    *KEPT, write_in_place, write_in_place, write_whole, write_whole, write_with_text, alias,
)  # fmt: skip
MOVED_WRITES: tuple[Move, ...] = (
    alias,
    write_moved,
    write_moved,
    write_grid,
    write_alias,
    write_alias,
    moved,
)
