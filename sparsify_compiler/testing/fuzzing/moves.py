"""Everything that a program may do with its tokens: one line for each move.

Three tables. `KEPT`: every token is where it was, in ways that the compiler is to follow. `RETURNING`: every token is
where it was, by a way that it need not follow. `MOVED`: tokens are elsewhere, or no tokens of one video any more, or
only some of them. Places decide what is true, the tables only how often a program is sparse.
"""

from sparsify_compiler.testing.fuzzing.cases import Draw
from sparsify_compiler.testing.fuzzing.machines import WIDTH
from sparsify_compiler.testing.fuzzing.programs import Move, Tokens


def _numbers(values: list[int]) -> str:
    return "[" + ", ".join(map(str, values)) + "]"


def _grid(t: Tokens) -> str:
    return "({}, {}, {})".format(*t.scene.grid)


def _cut(t: Tokens, draw: Draw) -> tuple[int, int]:
    """A place within the sequence, now and then between two frames, and the tokens after it."""
    frame = t.scene.tokens // t.scene.grid[0]
    at = draw.of(draw.integer(1, max(t.count - 1, 1)), t.before + frame, t.before + t.scene.tokens - frame)
    return at, t.count - at


def text_before(t: Tokens, draw: Draw) -> str:
    """Joins the text to the front of the sequence."""
    if not t.add("x = torch.cat([text, x], 1)"):
        return ""
    t.before += t.scene.text
    return ""


def text_after(t: Tokens, draw: Draw) -> str:
    """Joins the text to its end."""
    if t.add(draw.of("x = torch.cat([x, text], 1)", "x = torch.cat((x, m.linear(text)), dim=-2)")):
        t.after += t.scene.text
    return ""


def text_cut(t: Tokens, draw: Draw) -> str:
    """Cuts text off again."""
    end = t.count - t.after
    way = draw.of(f"x[:, {t.before}:]", f"x[:, {t.before}:{end}]", f"x.narrow(1, {t.before}, {end - t.before})",
                  f"x.split([{t.before}, {end - t.before}, {t.after}], 1)[1]")  # fmt: skip
    if t.add(f"x = {way}"):
        t.before, t.after = 0, t.after if way.endswith(":]") else 0
    return ""


def padded(t: Tokens, draw: Draw) -> str:
    """Pads the sequence with tokens of nothing."""
    a, b = draw.integer(0, 3), draw.integer(0, 3)
    if t.add(draw.of(f"x = F.pad(x, (0, 0, {a}, {b}))",
                     f"x = torch.cat([x.new_zeros({t.batch}, {a}, {WIDTH}), x, x.new_zeros({t.batch}, {b}, {WIDTH})], 1)")):  # fmt: skip
        t.before, t.after = t.before + a, t.after + b
    return ""


def mesh(t: Tokens, draw: Draw) -> str:
    """Adds positions, padded where there is text."""
    sizes, how = ", ".join(map(str, t.scene.grid)), draw.of("meshgrid", "repeats", "sums")
    position = f"m.mesh({sizes}, {how!r})"
    if t.before or t.after:
        position = draw.of(
            f"F.pad({position}, (0, 0, {t.before}, {t.after}))",
            f"torch.cat([x.new_zeros(1, {t.before}, {WIDTH}), {position}, x.new_zeros(1, {t.after}, {WIDTH})], 1)",
        )
    return f"x = x + {position}"


def wrong_mesh(t: Tokens, draw: Draw) -> str:
    """Adds positions of another grid of as many tokens."""
    f, h, w = t.scene.grid
    sizes = draw.of((h, f, w), (w, h, f), (f, w, h), (f * h, 1, w), (f, 1, h * w), (1, f * h, w))
    return "x = x + m.mesh({}, {}, {})".format(*sizes)


def _windowed(t: Tokens, draw: Draw, inside: str) -> str:
    """Windows of rows and columns go to the batch, and come back."""
    f, h, w = t.scene.grid
    a, b = draw.divisor(h), draw.divisor(w)
    if not t.is_video:
        return ""
    return (
        f"y = x.view({t.batch}, {f}, {h // a}, {a}, {w // b}, {b}, {WIDTH}).permute(0, 2, 4, 1, 3, 5, 6)\n"
        f"y = y.reshape({t.batch * (h // a) * (w // b)}, {f * a * b}, {WIDTH})\n{inside}"
        f"y = y.view({t.batch}, {h // a}, {w // b}, {f}, {a}, {b}, {WIDTH}).permute(0, 3, 1, 4, 2, 5, 6)\n"
        f"x = y.reshape({t.batch}, {f * h * w}, {WIDTH})"
    )


def windows(t: Tokens, draw: Draw) -> str:
    """Partition and reverse, with an attention in between or none."""
    return _windowed(t, draw, draw.of("", f"y = m.attend(y, {t.tag()})\n"))


def within_frames(t: Tokens, draw: Draw) -> str:
    """An attention whose batch are the frames."""
    if not t.is_video:
        return ""
    f = t.scene.grid[0]
    return (
        f"y = m.attend(x.unflatten(1, ({f}, -1)).flatten(0, 1), {t.tag()})\n"
        f"x = y.unflatten(0, ({t.batch}, {f})).flatten(1, 2)"
    )


def along_time(t: Tokens, draw: Draw) -> str:
    """An attention whose batch are rows and columns."""
    if not t.is_video:
        return ""
    f = t.scene.grid[0]
    return (
        f"y = m.attend(x.unflatten(1, ({f}, -1)).transpose(1, 2).flatten(0, 1), {t.tag()})\n"
        f"x = y.unflatten(0, ({t.batch}, -1)).transpose(1, 2).flatten(1, 2)"
    )


def attend(t: Tokens, draw: Draw) -> str:
    """An attention, in one spelling or another."""
    tag = t.tag()
    return draw.of(
        f"x = m.attend(x, {tag})",
        f"x = (x + m.attend(x, {tag})) / 2",
        f"q, k, v = m.heads(m.sin(x)), m.heads(m.cos(x)), m.heads(x)\nx = m.joined(m.attention(q, k, v, {tag}))",
        f"q, k, v = m.heads(x), m.heads(x), m.heads(x)\nx = m.joined(m.weights(m.scores(q, k, {tag}), {tag}) @ v)",
        f"x = m.weights(m.scores(x, m.cos(x), {tag}), {tag}) @ x",
        f"x = m.checkpointed(x, {tag})",
        f"x = m.region(x, {tag})",
    )


def attend_again(t: Tokens, draw: Draw) -> str:
    """The shared body of an attention, called with tokens in two orders."""
    tag = t.tag()
    moved = draw.of("x.flip(1)", "x.roll(1, 1)", "x[:, 1:]", "x", "x.flip(0)")
    return f"y = m.region({moved}, {tag})\nx = m.region(x, {tag})"


def attend_elsewhere(t: Tokens, draw: Draw) -> str:
    """Queries of these tokens, keys of tokens that were moved."""
    moved = draw.of("x.flip(0)", "x.roll(1, 0)", "x.flip(1)", "x.roll(1, 1)", "torch.cat([x[:, 1:], x[:, :1]], 1)",
                    "x[:1].expand_as(x)", f"x[{_numbers([*range(t.batch)][::-1])}]", "torch.cat([x[1:], x[:1]])",
                    "x", "m.norm(x)", "torch.stack(x.unbind(0)[::-1])", "x[:, 1:]")  # fmt: skip
    return f"x = m.attend_to(x, {moved}, {t.tag()})"


def _reorder(t: Tokens, order: list[int]) -> str:
    """The three axes of the grid in another order."""
    dims = [1 + axis for axis in order]
    return f"x.unflatten(1, {_grid(t)}).permute(0, {dims[0]}, {dims[1]}, {dims[2]}, 4).flatten(1, 3)"


def there_and_back(t: Tokens, draw: Draw) -> str:
    """The axes of the grid in another order, something, and back."""
    if not t.is_video:
        return ""
    order = draw.permutation(3)
    sizes = ", ".join(str(t.scene.grid[axis]) for axis in order)
    back = [str(1 + order.index(axis)) for axis in range(3)]
    between = draw.of("", "x = m.norm(x)\n", f"x = m.attend(x, {t.tag()})\n")
    return (
        f"x = {_reorder(t, order)}\n{between}"
        f"x = x.unflatten(1, ({sizes})).permute(0, {', '.join(back)}, 4).flatten(1, 3)"
    )


def rejoined(t: Tokens, draw: Draw) -> str:
    """Cut in two or more and joined again."""
    at, rest = _cut(t, draw)
    return draw.of(
        f"x = torch.cat([x[:, :{at}], x[:, {at}:]], 1)",
        f"a, b = x.split([{at}, {rest}], 1)\nx = torch.cat([a, b], 1)",
        f"x = torch.cat(x.tensor_split([{at}], 1), 1)",
        f"x = torch.cat(x.chunk({draw.integer(2, 4)}, 1), 1)",
        f"a = x[:, :{at}]\nb = m.norm(x[:, {at}:])\nx = torch.cat((a, b), dim=1)",
        f"x = torch.cat([x.narrow(1, 0, {at}), x.narrow(1, {at}, {rest})], -2)",
        "x = torch.stack(x.unbind(0))",
        "x = torch.cat([one[None] for one in x.unbind(0)])",
        "x = torch.stack(x.unbind(1), 1)",
        f"a, b = x.split([{WIDTH // 2}, {WIDTH // 2}], -1)\nx = torch.cat([a, b], -1)",
    )


def reshaped(t: Tokens, draw: Draw) -> str:
    """Reshaped and back, transposed and back."""
    a = draw.divisor(t.count)
    return draw.of(
        f"x = x.reshape({t.batch}, {a}, {t.count // a}, -1).reshape({t.batch}, {t.count}, -1)",
        f"x = x.unflatten(1, ({a}, -1)).flatten(1, 2)",
        f"x = x.flatten(0, 1).unflatten(0, ({t.batch}, -1))",
        f"x = m.linear(x.flatten(0, 1)).view({t.batch}, {t.count}, -1)",
        "x = x.transpose(0, 1).contiguous().transpose(0, 1)",
        "x = x.mT.contiguous().mT",
        "x = x.permute(2, 0, 1).permute(1, 2, 0)",
        "x = x.movedim(1, 0).movedim(0, 1)",
        "x = x.unsqueeze(1).squeeze(1)",
        f"x = x.unflatten(-1, (4, -1)).flatten(2)",
        f"x = x.view({t.batch}, {a}, {t.count // a}, {WIDTH}).transpose(1, 2).transpose(1, 2).reshape(x.shape)",
        "x = x.swapaxes(1, 2).swapaxes(-1, 1)",
        f"x = x.reshape(-1).reshape({t.batch}, {t.count}, -1)",
    )


def content(t: Tokens, draw: Draw) -> str:
    """What changes tokens and leaves them where they are."""
    return draw.of(
        "x = m.norm(x)", "x = m.linear(x)", "x = m.act(x)", "x = (x + m.linear(m.norm(x))) / 2", "x = x * m.two",
        "x = m.linear(torch.cat([x, x], -1))", "x = x + m.pooled(x)", "x = torch.maximum(x, m.norm(x))",
        "x = x.clone()", "x = x.contiguous()", "x = x.to(x.dtype)", "x = F.dropout(x, 0.5, False)", "x = x.detach()",
        "x = torch.lerp(x, x, 0.5)", "x = x[None].expand(3, -1, -1, -1)[1]", "x = torch.stack([x, x])[0]",
        "x = torch.where(x == x, x, x)", "x = x.repeat(1, 1, 2)[..., :16]", "x, y = m.linear(x).clone(), x",
        "x = x.repeat_interleave(2, 0)[::2]", f"x = x.repeat(2, 1, 1)[:{t.batch}]", "x = x.real", "x = x[...]",
        "x = x[:]", "x = x[:, :, :]", "x = x[:, None][:, 0]", "a, b = x.unflatten(-1, (2, -1)).unbind(2)\n"
        "x = torch.cat([a, b], -1)", "x = x.expand_as(x)", "x = torch.atleast_3d(x)", "x = x.type_as(x)",
        "x = torch.addcmul(x, x, x, value=0.0)", "x = x.unfold(2, 8, 8).flatten(2)",
    )  # fmt: skip


def returning(t: Tokens, draw: Draw) -> str:
    """Away and back again."""
    n, size = draw.integer(1, max(t.count - 1, 1)), t.count
    perm = draw.permutation(size)
    back = [perm.index(i) for i in range(size)]
    return draw.of(
        f"x = x.roll({n}, 1)\nx = x.roll(-{n}, 1)", "x = x.flip(1).flip(1)", "x = x.flip(0).flip(0)",
        f"x = x[:, {_numbers(perm)}]\nx = x[:, {_numbers(back)}]",
        "x = m.conv1d(x)", "x = m.cumsum(x)", "x = m.softmax(x)",
        f"x = x[:, torch.arange({size})]", f"x = x.index_select(1, torch.arange({size}))",
        f"x = x.gather(1, torch.arange({size})[None, :, None].expand({t.batch}, -1, x.shape[-1]))",
        "x = x.repeat_interleave(2, 1)[:, ::2]", "x = x[:, ::1]", f"x = x[:, -{size}:]",
        f"x = torch.eye({size}, dtype=x.dtype) @ x",
        f"x = torch.einsum('st,btc->bsc', torch.eye({size}, dtype=x.dtype), x)",
        f"x = torch.cat([x[:, {n}:], x[:, :{n}]], 1)\nx = torch.cat([x[:, {size - n}:], x[:, :{size - n}]], 1)",
        f"x = F.pad(x, (0, 0, {n}, 0))[:, {n}:]", f"x = F.pad(x, (0, 0, 2, 3))[:, 2:-3]",
        "x = x.flip(-1)", "x = x.roll(1, 0)", "x = x[torch.arange(len(x))]", "x = x.flip(0)",
        f"x = torch.stack([x[:, 0::2], x[:, 1::2]], 2).flatten(1, 2)", "x = x[:, :, torch.randperm(16)]",
        f"x = x.rot90(1, (1, 2)).rot90(-1, (1, 2))", "x = x.as_strided(x.shape, x.stride())",
        "x = F.pixel_shuffle(F.pixel_unshuffle(x[:, None], 1), 1)[:, 0]", "x = x.unfold(1, 1, 1)[..., 0]",
        "x = torch.cat([x[:1], x[1:]])", "x = F.avg_pool1d(x.mT, 1).mT", "x = torch.vmap(lambda one: one * 1)(x)",
        "x = x.scatter(1, torch.zeros(len(x), 1, 16, dtype=torch.int64), x[:, :1])", "x = torch.hstack([x])",
    )  # fmt: skip


def moved(t: Tokens, draw: Draw) -> str:
    """Tokens elsewhere."""
    size, frame = t.count, t.scene.tokens // t.scene.grid[0]
    n = draw.of(draw.integer(1, max(size - 1, 1)), frame)
    half, a = size // 2, draw.divisor(size)
    perm = _numbers(draw.permutation(size))
    return draw.of(
        f"x = x.roll({n}, 1)", "x = x.flip(1)", f"x = x[:, {perm}]", f"x = x[:, torch.tensor({perm})]",
        f"x = torch.cat([x[:, {n}:], x[:, :{n}]], 1)", "x = torch.cat([x[:, ::2], x[:, 1::2]], 1)",
        f"x = x.index_select(1, torch.tensor({perm}))", f"x = x.take_along_dim(torch.tensor({perm})[None, :, None], 1)",
        f"x = x.gather(1, torch.tensor({perm})[None, :, None].expand({t.batch}, -1, x.shape[-1]))",
        f"x = torch.eye({size}, dtype=x.dtype)[{perm}] @ x",
        f"x = F.linear(x.mT, torch.eye({size}, dtype=x.dtype)[{perm}]).mT",
        f"x = torch.stack([x[:, :{half}], x[:, {half}:{2 * half}]], 2).flatten(1, 2)",
        f"x = x.unflatten(1, ({a}, -1)).transpose(1, 2).flatten(1, 2)",
        f"x = x.reshape({t.batch}, {size // a}, {a}, -1).transpose(1, 2).reshape({t.batch}, {size}, -1)",
        f"x = torch.stack(x.unbind(1)[::-1], 1)", f"x = torch.cat(x.chunk({draw.integer(2, 3)}, 1)[::-1], 1)",
        f"x = x.unflatten(1, ({a}, -1)).flip(1).flatten(1, 2)", f"x = x.unflatten(1, ({a}, -1)).flip(2).flatten(1, 2)",
        f"x = x.unflatten(1, ({a}, -1)).roll(1, 2).flatten(1, 2)", f"x = x.unflatten(1, ({a}, -1)).roll((1, 1), (1, 2)).flatten(1, 2)",
        f"x = x[:, x[0, :, 0].argsort(descending=True)]", "x = x.sort(1, descending=True)[0]", "x = x.rot90(2, (1, 2))",
        f"x = torch.cat([x[:, {n}:], x.new_zeros({t.batch}, {n}, x.shape[-1])], 1)",
        f"a, b = x.split([{n}, {size - n}], 1)\nx = torch.cat([b, a], 1)",
        f"x = x.scatter(1, torch.tensor({perm})[None, :, None].expand({t.batch}, -1, x.shape[-1]), x)",
        f"x = x.index_copy(1, torch.tensor({perm}), x)", f"x = x[:, [{n}, *range({n}), *range({n + 1}, {size})]]",
        f"x = F.pixel_shuffle(x.unflatten(1, (-1, 4)).mT.flatten(0, 1)[..., None], 2).flatten(1).view(x.shape)",
    )  # fmt: skip


def regridded(t: Tokens, draw: Draw) -> str:
    """The grid's axes in another order, cut, or exchanged with the batch or the channels."""
    if not t.is_video:
        return ""
    f, h, w = t.scene.grid
    b = t.batch
    x = f"x.unflatten(1, {_grid(t)})"
    axis, order = draw.integer(1, 3), draw.permutation(3)
    n = draw.integer(0, t.scene.grid[axis - 1] - 1)
    return draw.of(
        f"x = {_reorder(t, order)}",
        f"x = {x}.transpose({draw.integer(1, 3)}, {draw.integer(1, 3)}).flatten(1, 3)",
        f"x = {x}.flip({axis}).flatten(1, 3)", f"x = {x}.roll({n + 1}, {axis}).flatten(1, 3)",
        f"x = {x}.narrow({axis}, {n}, {t.scene.grid[axis - 1] - n}).flatten(1, 3)",
        f"x = {x}.select({axis}, {n}).flatten(1, 2)",
        f"x = x.unflatten(1, ({f}, -1)).transpose(0, 1).reshape({b}, {f * h * w}, -1)",
        f"x = x.unflatten(1, ({f}, -1)).transpose(0, 1).reshape({f}, {b * h * w}, -1)",
        f"x = x.unflatten(1, ({f}, -1)).transpose(0, 1).flatten(1, 2)",
        f"x = {x}.permute(1, 0, 2, 3, 4).flatten(1, 3)", f"x = {x}.permute(2, 0, 1, 3, 4).flatten(1, 3)",
        f"x = {x}.permute(3, 0, 1, 2, 4).flatten(1, 3)", f"x = {x}.permute(1, 2, 0, 3, 4).flatten(1, 3)",
        f"x = m.linear({x}.permute(0, 4, 1, 2, 3).flatten(1, 3)[..., None])",
        f"x = m.linear({x}.permute(0, 4, 2, 3, 1).flatten(1, 3))", f"x = m.linear({x}.permute(0, 1, 4, 2, 3).flatten(1, 3))",
        f"x = m.linear({x}.permute(0, 2, 3, 1, 4).flatten(3))", f"x = m.linear({x}.flatten(3)).flatten(1, 2)",
        f"x = m.linear({x}.permute(0, 1, 2, 4, 3).flatten(3)).flatten(1, 2)", "x = x.flatten(0, 1)[None]",
        f"x = {x}.mean({axis}).flatten(1, 2)", f"x = {x}.amax({axis}).flatten(1, 2)",
        f"x = {x}[:, :, :, ::2].flatten(1, 3)", f"x = {x}[:, ::2].flatten(1, 3)", f"x = {x}[:, :, ::2].flatten(1, 3)",
        f"x = torch.stack({x}.unbind({axis})[::-1], {axis}).flatten(1, 3)",
        f"x = torch.cat([{x}[:, 1:], {x}[:, :1]], 1).flatten(1, 3)",
        f"x = torch.cat([{x}[:, :, :, 1:], {x}[:, :, :, :1]], 3).flatten(1, 3)",
        f"x = torch.cat([{x}, {x}], {axis}).flatten(1, 3)",
        f"x = F.pad({x}, (0, 0, -1, 1)).flatten(1, 3)", f"x = F.pad({x}, (0, 0, 0, 0, 0, 0, -1, 1)).flatten(1, 3)",
        f"x = F.pad({x}, (0, 0, 0, 0, -1, 1)).flatten(1, 3)", f"x = F.pad({x}, (0, 0, 0, 0, 0, 0, 1, -1)).flatten(1, 3)",
        f"x = {x}.repeat_interleave(2, {axis}).flatten(1, 3)",
        f"x = {x}.repeat_interleave(2, {axis}).narrow({axis}, 0, {t.scene.grid[axis - 1]}).flatten(1, 3)",
        f"x = x.mT.reshape({b}, {f * h * w}, -1)", f"x = x.reshape({b}, {WIDTH}, -1).mT",
        f"x = x.transpose(0, 1).reshape({b}, {f * h * w}, -1)", f"x = x.reshape({f * h * w}, {b}, -1).transpose(0, 1)",
    )  # fmt: skip


def cropped(t: Tokens, draw: Draw) -> str:
    """Fewer tokens, or as many of which some are not what they were."""
    size, frame = t.count, t.scene.tokens // t.scene.grid[0]
    n = draw.of(draw.integer(1, max(size - 2, 1)), frame)
    return draw.of(
        f"x = x[:, {n}:]", f"x = x[:, :-{n}]", f"x = x[:, ::2]", f"x = x[:, 1::2]", f"x = F.pad(x, (0, 0, -{n}, {n}))",
        f"x = F.pad(x, (0, 0, {n}, -{n}))", f"x = F.pad(x, (0, 0, -1, 0))", f"x = F.pad(x, (0, 0, 0, -{n}))",
        f"x = F.pad(x[:, {n}:], (0, 0, {n}, 0))", f"x = F.pad(x, (0, 0, {n}, 0))[:, :{size}]",
        f"x = x.repeat_interleave(2, 1)[:, :{size}]", "x = x.repeat_interleave(2, 1)", "x = x.repeat(1, 2, 1)",
        "x = torch.cat([x, x], 1)", f"x = torch.cat([x[:, :{n}], x], 1)", f"x = torch.cat([x[:, :{n}], x[:, :{size - n}]], 1)",
        f"x = torch.cat([x[:, -{n}:], x[:, {n}:]], 1)", "x = F.interpolate(x.mT, scale_factor=2.0).mT",
        f"x = x.unfold(1, 2, 2)[..., 0]", f"x = F.avg_pool1d(x.mT, 2).mT", f"x = F.max_pool1d(x.mT, 3, 1, 1).mT",
        f"x = torch.cat([x[:1], x[:1]])", f"x = x[:1].expand({t.batch}, -1, -1)", f"x = x[[0] * {t.batch}]",
        f"x = x.as_strided(({t.batch}, {size}, x.shape[-1]), ({size} * x.shape[-1], 1, {size}))",
    )  # fmt: skip


def mixed(t: Tokens, draw: Draw) -> str:
    """Tokens that are two at once, or now one and now the other."""
    size = t.count
    n = draw.integer(1, max(size - 1, 1))
    other = draw.of("x.flip(1)", f"x.roll({n}, 1)", f"torch.cat([x[:, {n}:], x[:, :{n}]], 1)", "x.flip(0)",
                    f"x[:, torch.arange({size - 1}, -1, -1)]", "F.pad(x, (0, 0, -1, 1))")  # fmt: skip
    return draw.of(
        f"x = (x + {other}) / 2", f"x = torch.lerp({other}, x, 0.5)", f"x = torch.maximum(x, {other})",
        f"x = torch.where(torch.arange({size})[:, None] % 2 == 0, x, {other})",
        f"x = torch.cat([x[..., :8], ({other})[..., 8:]], -1)", f"x = torch.stack([x, {other}]).mean(0)",
        f"x = torch.stack([x, {other}])[1]", f"x = ({other} + x) / 2", f"x = torch.minimum({other}, x)",
        f"x = torch.stack([x, {other}], 1).flatten(0, 1)[::2]", f"x = torch.stack([x, {other}], 1).flatten(0, 1)[:{t.batch}]",
    )  # fmt: skip


KEPT: tuple[Move, ...] = (
    content, content, reshaped, reshaped, rejoined, rejoined, text_before, text_after, text_cut, padded, mesh, windows,
    within_frames, along_time, attend, there_and_back,
)  # fmt: skip
RETURNING: tuple[Move, ...] = (returning,)
MOVED: tuple[Move, ...] = (moved, regridded, cropped, mixed, wrong_mesh)


def alias(t: Tokens, draw: Draw) -> str:
    """Another name for the memory of the tokens, or of some of them, taken before they are written."""
    at, _ = _cut(t, draw)
    view = draw.of("x", "x[:]", f"x[:, {at}:]", f"x[:, :{at}]", "x.transpose(0, 1)", "x.mT", f"x[:, {at - 1}]", "x[0]",
                   "x[:, ::2]", f"x.unflatten(1, ({draw.divisor(t.count)}, -1))", "x.view(x.shape)", "x.detach()",
                   f"x.chunk(2, 1)[{draw.integer(0, 1)}]", "x.unbind(0)[-1]", "x.diagonal(0, 0, 1)", "x[..., :8]",
                   f"x.flatten(0, 1)", "x.expand_as(x)", "x.as_strided(x.shape, x.stride())", "x.unfold(1, 1, 1)")  # fmt: skip
    return draw.of(f"y = {view}", f"x = x.clone()\ny = {view}", f"x = x.contiguous()\ny = {view}")


def write_in_place(t: Tokens, draw: Draw) -> str:
    """What changes tokens where they are."""
    return draw.of(
        "x = x.clone()\nx.mul_(m.two)", "x = x.clone()\nx.add_(m.one)", "x = x.clone()\nx[:, :2] *= m.two",
        "x = x.clone()\ny = x[:, 1:]\ny.mul_(m.two)", "x = x.clone()\nx += m.one", "x = x.clone()\nx[:] = m.linear(x)",
        "y = torch.empty_like(x)\ny.copy_(x)\nx = y", "y = torch.zeros_like(x)\ny[:] = x\nx = y",
        "y = torch.zeros_like(x)\ny += x\nx = y", "y = torch.empty_like(x)\ntorch.mul(x, m.two, out=y)\nx = y",
        "y = x.new_zeros(x.shape)\ny[:, :] = x\nx = y", "x = x.clone()\nx.copy_(m.linear(x))", "x = x.clone()\nx.relu_()",
        "y = x.clone()\ny.mul_(m.two)\ny.copy_(x)\nx = y", "x = x.clone()\ny = x.unflatten(-1, (2, -1))\ny.mul_(m.two)",
        "y = torch.empty_like(x)\ny.view(-1).copy_(x.reshape(-1))\nx = y", "x = x.contiguous()\nF.relu(x, inplace=True)",
        "x = x.clone()\nx[0] *= m.two", "x = x.clone()\nx.transpose(0, 1).add_(m.one)", "x = x.clone()\nx[..., :3] += m.one",
    )  # fmt: skip


def write_whole(t: Tokens, draw: Draw) -> str:
    """A buffer that is filled part by part, every token where it belongs."""
    at, size = _cut(t, draw)[0], t.count
    new = draw.of("torch.empty_like(x)", "torch.zeros_like(x)", "x.clone()", f"x.new_zeros({t.batch}, {size}, x.shape[-1])")
    write = draw.of(
        f"y[:, :{at}] = x[:, :{at}]\ny[:, {at}:] = x[:, {at}:]", "y[:, ::2] = x[:, ::2]\ny[:, 1::2] = x[:, 1::2]",
        f"y[:, {at}:] = x[:, {at}:]\ny[:, :{at}] = x[:, :{at}]", f"y[:, torch.arange({size})] = x",
        f"for i in range({size}):\n    y[:, i] = x[:, i]", "y[0] = x[0]\ny[1:] = x[1:]", "y[..., :8], y[..., 8:] = x[..., :8], x[..., 8:]",
        f"y[:, :{at}].copy_(x[:, :{at}])\ny[:, {at}:].copy_(x[:, {at}:])", "y.mT.copy_(x.mT)",
        f"a, b = y.split([{at}, {size - at}], 1)\na.copy_(x[:, :{at}])\nb.copy_(x[:, {at}:])",
    )  # fmt: skip
    return f"y = {new}\n{write}\nx = y"


def write_with_text(t: Tokens, draw: Draw) -> str:
    """A buffer for text and tokens."""
    n, size = t.scene.text, t.count
    if t.batch != t.scene.batch:
        return ""
    first = draw.chance(50)
    where = (f"[:, :{n}]", f"[:, {n}:]") if first else (f"[:, {size}:]", f"[:, :{size}]")
    new = draw.of("x.new_zeros", "x.new_empty")
    write = draw.of("y{0} = text\ny{1} = x", "y{1} = x\ny{0} = text", "y{0}.copy_(text)\ny{1}.copy_(x)").format(*where)
    if t.add(f"y = {new}({t.batch}, {size + n}, {WIDTH})\n{write}\nx = y"):
        t.before, t.after = t.before + n * first, t.after + n * (not first)
    return ""


def write_moved(t: Tokens, draw: Draw) -> str:
    """A copy or a buffer, written from elsewhere."""
    at, rest = _cut(t, draw)
    size = t.count
    i, j = draw.integer(0, size - 1), draw.integer(0, size - 1)
    a = draw.divisor(size)
    perm = _numbers(draw.permutation(size))
    new = draw.of("x.clone()", "torch.empty_like(x)", "torch.zeros_like(x)", "x.clone()", "x.contiguous().clone()")
    half = size // 2
    write = draw.of(
        "y[:, ::2], y[:, 1::2] = x[:, 1::2], x[:, ::2]", f"y[:, {i}], y[:, {j}] = x[:, {j}], x[:, {i}]",
        f"y[:, :{at}], y[:, {at}:] = x[:, {rest}:], x[:, :{rest}]", "y.copy_(x.flip(1))", "y[:] = x.roll(1, 1)",
        f"y[:, {perm}] = x", f"y[:, torch.tensor({perm})] = x", f"y.index_copy_(1, torch.tensor({perm}), x)",
        f"y.scatter_(1, torch.tensor({perm})[None, :, None].expand({t.batch}, -1, x.shape[-1]), x)",
        f"y[:, {i}:{i} + 1] = x[:, {j}:{j} + 1]", f"y[:, {i}].copy_(x[:, {j}])", "y.mT.copy_(x.flip(1).mT)",
        f"y.unflatten(1, ({a}, -1))[:, 0] = x.unflatten(1, ({a}, -1))[:, -1]",
        f"y.view({t.batch}, {a}, {size // a}, -1).copy_(x.view({t.batch}, {a}, {size // a}, -1).flip(2))",
        f"y.view({t.batch}, {a}, {size // a}, -1).copy_(x.view({t.batch}, {size // a}, {a}, -1).transpose(1, 2))",
        f"a, b = y.split([{at}, {rest}], 1)\na.copy_(x[:, {rest}:])\nb.copy_(x[:, :{rest}])",
        "y[0] = x[-1]", "y[:1], y[1:] = x[-1:], x[:-1]", "y.copy_(x.flip(0))", f"y[:, :{half}] = x[:, {half}:{2 * half}]", f"y[:, {i}] *= m.zero", f"y[:, {i}:].mul_(m.zero)",
        f"y.narrow(1, 0, {half}).copy_(x.narrow(1, {size - half}, {half}))",
        f"y[:, 1:] = x[:, :-1]", "y[:, 0] = x[:, 1]", "torch.add(x.flip(1), 0.0, out=y)", "y[..., :8] = x.flip(1)[..., :8]",
        f"y.masked_scatter_(torch.ones_like(y, dtype=torch.bool), x.flip(1))", "y.index_put_((torch.arange(len(y)),), x.flip(0))",
        f"y[:, [{i}, {j}]] = x[:, [{j}, {i}]]", "y.unbind(0)[0].copy_(x[0].flip(0))", f"y.select(1, {i}).copy_(x[:, {j}])",
        f"torch.index_select(x, 1, torch.tensor({perm}), out=y)", "torch.cat([x[:, 1:], x[:, :1]], 1, out=y)",
        "y.swapaxes(0, 1)[0] = x[:, -1]", f"y.diagonal(0, 0, 1).copy_(x.flip(1).diagonal(0, 0, 1))",
        f"y.as_strided(y.shape, y.stride()).copy_(x.flip(1))", "y.set_(x.flip(1))", "y.data.copy_(x.flip(1))",
        "z = y\nz.copy_(x.flip(1))", "z = y[:, 1:]\nz[:, 0] = x[:, 0]", "y.lerp_(x.flip(1), 1.0)", "y.sub_(y).add_(x.flip(1))",
        "torch._foreach_copy_([y], [x.flip(1)])", "y.index_add_(1, torch.tensor([0]), x[:, -1:])", "y.resize_(y.shape).copy_(x.flip(1))",
    )  # fmt: skip
    if size > 2 and draw.chance(20):
        frames, rows, columns = t.scene.grid
        if t.is_video:
            axis = draw.integer(1, 3)
            write = f"y.view({t.batch}, {frames}, {rows}, {columns}, -1).copy_(x.unflatten(1, {_grid(t)}).flip({axis}))"
    return f"y = {new}\n{write}\n" + draw.of("x = y", "x = y", "x = y", "")


def write_alias(t: Tokens, draw: Draw) -> str:
    """Writes through an alias that was taken before."""
    if "y" not in t.names:
        return ""
    return draw.of(
        "y.copy_(y.flip(1))", "y[:, 0] = y[:, -1]", "y.copy_(y.roll(1, 1))", "y.mul_(m.zero)", "y[0].copy_(y[-1])", "y.mul_(m.two)",
        "y.copy_(y.flip(0))", "y[:, ::2], y[:, 1::2] = y[:, 1::2].clone(), y[:, ::2].clone()", "y[...] = y.flip(-2)",
        "y.add_(m.one)", "y[-1], y[0] = y[0].clone(), y[-1].clone()", "torch.add(y.flip(1), 0.0, out=y)", "x = y",
        "x.copy_(y)", "y[:, 1] *= m.zero", "y[:] = y.flip(1)",
    )  # fmt: skip


def write_around_attention(t: Tokens, draw: Draw) -> str:
    """q, k, v, or what they are views of, written before, between and after the products of attention by hand."""
    tag, at = t.tag(), _cut(t, draw)[0]
    of = [draw.of(f"m.{f}(x)", f"m.{f}(x).contiguous()", "x", "x.clone()") for f in ("sin", "cos", "act")]
    lines = [f"{name}0 = {one}" for name, one in zip("qkv", of, strict=True)]
    heads = draw.of("m.heads({}0)", "m.heads({}0)", "{}0")
    lines += [f"{name} = {heads.format(name)}" for name in "qkv"]
    name = draw.of("q", "k", "v", "q0", "k0", "v0", "x", "x", "k")
    tokens = 2 if heads != "{}0" and not name.endswith("0") and name != "x" else 1
    write = draw.of(
        "{0}.mul_(m.two)", "{0}.add_(m.one)", "{0}.copy_({0}.flip({1}))", "{0}.copy_({0}.roll(1, {1}))", "{0} *= m.two",
        "{0}[..., :3] += m.one", "{0}.copy_({0}.flip(0))", "z = {0}[..., 2:]\nz.mul_(m.two)", "{0}.transpose(-1, -2).add_(m.one)",
        "torch.mul({0}, m.two, out={0})", "z = {0}.detach()\nz.add_(m.one)", "F.relu({0}, inplace=True)",
        f"{{0}}.narrow({{1}}, 0, {at}).mul_(m.two)", "{0}[0].mul_(m.two)", "torch._foreach_mul_([{0}], m.two)",
    ).format(name, tokens)  # fmt: skip
    product = draw.of("m.joined(w @ v)", "m.joined(w.matmul(v))") if heads != "{}0" else "w @ v"
    steps = [f"s = m.scores(q, k, {tag})", f"w = m.weights(s, {tag})", f"x = {product}"]
    steps.insert(draw.of(1, 2, 1, 2, 0, 3), write)
    return "\n".join([*lines, *steps])


KEPT_WRITES: tuple[Move, ...] = (*KEPT, write_in_place, write_in_place, write_whole, write_whole, write_with_text, alias)
MOVED_WRITES: tuple[Move, ...] = (alias, write_moved, write_moved, write_alias, write_alias, moved)

TABLES: dict[str, tuple[tuple[Move, ...], tuple[Move, ...]]] = {
    "tokens": (KEPT, MOVED),
    "writes": (KEPT_WRITES, MOVED_WRITES),
}
"""Kind of program -> (moves that keep tokens where they are, all others)."""

ATTEND: dict[str, tuple[Move, ...]] = {
    "tokens": (attend, attend, attend, attend_elsewhere, attend_again),
    "writes": (attend, write_around_attention, write_around_attention),
}
"""What ends a program."""
