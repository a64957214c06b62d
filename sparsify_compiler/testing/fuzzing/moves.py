"""The moves of a program on its tokens, x [batch, tokens, WIDTH].

Most moves are a line of a table: Python with numbers in braces (`NUMBERS`), which are drawn with the line. `; `
begins a new line of the program. The tables only decide how often a program is sparse; `Places` decides the truth.

`KEPT`        every token stays in its place, and the compiler should follow
`RETURNING`   every token returns to its place, and the compiler need not follow
`MOVED`       tokens move, or some are missing, or they are no longer tokens of one video
"""

from sparsify_compiler.testing.fuzzing.cases import Draw
from sparsify_compiler.testing.fuzzing.machines import WIDTH
from sparsify_compiler.testing.fuzzing.tables import table
from sparsify_compiler.testing.fuzzing.tokens import MESHES, Move, Tokens

# Moves that keep every token in its place. The compiler should follow them.

content = table("""
    x = m.norm(x)
    x = m.linear(x)
    x = m.act(x)
    x = (x + m.linear(m.norm(x))) / 2
    x = x * m.two
    x = m.linear(torch.cat([x, x], -1))
    x = x + m.pooled(x)
    x = m.causal(x)
    x = m.linear(m.causal(m.norm(x)))
    x = torch.maximum(x, m.norm(x))
    x = x.clone()
    x = x.contiguous()
    x = x.to(x.dtype)
    x = F.dropout(x, 0.5, False)
    x = x.detach()
    x = torch.lerp(x, x, 0.5)
    x = x[None].expand(3, -1, -1, -1)[1]
    x = torch.stack([x, x])[0]
    x = torch.where(x == x, x, x)
    x = x.repeat(1, 1, 2)[..., :{C}]
    x = x.repeat_interleave(2, 0)[::2]
    x = x.repeat(2, 1, 1)[:{B}]
    x, y = m.linear(x).clone(), x
    x = x[:, None][:, 0]
    a, b = x.unflatten(-1, (2, -1)).unbind(2); x = torch.cat([a, b], -1)
    x = x.type_as(x)
    x = x.unfold(2, 8, 8).flatten(2)
    x = x.view_as(x)[...]
""")

reshaped = table("""
    x = x.reshape({B}, {a}, {S} // {a}, -1).reshape({B}, {S}, -1)
    x = x.unflatten(1, ({a}, -1)).flatten(1, 2)
    x = x.flatten(0, 1).unflatten(0, ({B}, -1))
    x = m.linear(x.flatten(0, 1)).view({B}, {S}, -1)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    x = x.mT.contiguous().mT
    x = x.permute(2, 0, 1).permute(1, 2, 0)
    x = x.movedim(1, 0).movedim(0, 1)
    x = x.unsqueeze(1).squeeze(1)
    x = x.unflatten(-1, (4, -1)).flatten(2)
    x = x.view({B}, {a}, {S} // {a}, {C}).transpose(1, 2).transpose(1, 2).reshape(x.shape)
    x = x.swapaxes(1, 2).swapaxes(-1, 1)
    x = x.reshape(-1).reshape({B}, {S}, -1)
""")

rejoined = table("""
    x = torch.cat([x[:, :{n}], x[:, {n}:]], 1)
    a, b = x.split([{n}, {S} - {n}], 1); x = torch.cat([a, b], 1)
    x = torch.cat(x.tensor_split([{n}], 1), 1)
    x = torch.cat(x.chunk(3, 1), 1)
    a = x[:, :{n}]; b = m.norm(x[:, {n}:]); x = torch.cat((a, b), dim=1)
    x = torch.cat([x.narrow(1, 0, {n}), x.narrow(1, {n}, {S} - {n})], -2)
    x = torch.stack(x.unbind(0))
    x = torch.cat([one[None] for one in x.unbind(0)])
    a, b = x.split([{C} // 2, {C} // 2], -1); x = torch.cat([a, b], -1)
    x = torch.cat([x[:, :{n}], m.act(x[:, {n}:])], 1)
""")


def attend_in_part(t: Tokens, draw: Draw) -> None:
    """Attention within frames, or along time: the other axes of the video move to the batch and back."""
    turn = draw.of("", ".transpose(1, 2)")
    if t.is_video:
        t.add(
            f"y = m.attend(x.unflatten(1, ({t.scene.grid[0]}, -1)){turn}.flatten(0, 1), {t.tag()})\n"
            f"x = y.unflatten(0, ({t.batch}, -1)){turn}.flatten(1, 2)"
        )


def windows(t: Tokens, draw: Draw) -> None:
    """Windows of rows and columns move to the batch and back, with or without an attention in between."""
    f, h, w = t.scene.grid
    a, b = draw.divisor(h), draw.divisor(w)
    if not t.is_video:
        return
    between = draw.of("", f"y = m.attend(y, {t.tag()})\n")
    t.add(
        f"y = x.view({t.batch}, {f}, {h // a}, {a}, {w // b}, {b}, {WIDTH}).permute(0, 2, 4, 1, 3, 5, 6)\n"
        f"y = y.reshape({t.batch * (h // a) * (w // b)}, {f * a * b}, {WIDTH})\n{between}"
        f"y = y.view({t.batch}, {h // a}, {w // b}, {f}, {a}, {b}, {WIDTH}).permute(0, 3, 1, 4, 2, 5, 6)\n"
        f"x = y.reshape({t.batch}, {f * h * w}, {WIDTH})"
    )


def there_and_back(t: Tokens, draw: Draw) -> None:
    """The axes of the grid move to another order and back, with or without an operator in between."""
    if not t.is_video:
        return
    order = draw.permutation(3)
    there = ", ".join(str(1 + axis) for axis in order)
    back = ", ".join(str(1 + order.index(axis)) for axis in range(3))
    sizes = tuple(t.scene.grid[axis] for axis in order)
    between = draw.of("", "x = m.norm(x)\n", f"x = m.attend(x, {t.tag()})\n")
    t.add(
        f"x = x.unflatten(1, {t.scene.grid}).permute(0, {there}, 4).flatten(1, 3)\n{between}"
        f"x = x.unflatten(1, {sizes}).permute(0, {back}, 4).flatten(1, 3)"
    )


def text_joined(t: Tokens, draw: Draw) -> None:
    """The text is joined before or after the tokens."""
    front = draw.chance(50)
    before = ("x = torch.cat([text, x], 1)", "x = torch.cat((text.clone(), x), -2)")
    after = ("x = torch.cat([x, text], 1)", "x = torch.cat((x, m.linear(text)), dim=1)")
    if t.add(draw.of(*(before if front else after))):
        t.before += t.scene.text * front
        t.after += t.scene.text * (not front)


def text_cut(t: Tokens, draw: Draw) -> None:
    """The tokens before and after the video's are cut."""
    end = t.count - t.after
    way = draw.of(
        f"x = x[:, {t.before}:{end}]",
        f"x = x.narrow(1, {t.before}, {end - t.before})",
        f"x = x.split([{t.before}, {end - t.before}, {t.after}], 1)[1]",
        f"x = x[:, {t.before}:]\nx = x[:, :{end - t.before}]",
    )
    if t.add(way):
        t.before = t.after = 0


def padded(t: Tokens, draw: Draw) -> None:
    """Zero tokens are added before and after."""
    a, b = draw.integer(0, 3), draw.integer(0, 3)
    first, last = (f"x.new_zeros({t.batch}, {n}, {WIDTH})" for n in (a, b))
    if t.add(draw.of(f"x = F.pad(x, (0, 0, {a}, {b}))", f"x = torch.cat([{first}, x, {last}], 1)")):
        t.before, t.after = t.before + a, t.after + b


def positions(t: Tokens, draw: Draw) -> None:
    """Positions of the video's grid are added, padded where there are other tokens, or rotate the tokens."""
    sizes = "{}, {}, {}".format(*t.scene.grid)
    if t.is_video and draw.chance(30):
        t.add(f"x = m.turned(x, {sizes})")
        return
    mesh = f"m.mesh({sizes}, {draw.of(*MESHES)!r})"
    if t.before or t.after:
        mesh = draw.of(
            f"F.pad({mesh}, (0, 0, {t.before}, {t.after}))",
            f"torch.cat([x.new_zeros(1, {t.before}, {WIDTH}), {mesh}, x.new_zeros(1, {t.after}, {WIDTH})], 1)",
        )
    t.add(f"x = x + {mesh}")


attend = table("""
    x = m.attend(x, {tag})
    x = (x + m.attend(x, {tag})) / 2
    q, k, v = m.heads(m.sin(x)), m.heads(m.cos(x)), m.heads(x); x = m.joined(m.attention(q, k, v, {tag}))
    q, k, v = m.heads(x), m.heads(x), m.heads(x); x = m.joined(m.weights(m.scores(q, k, {tag}), {tag}) @ v)
    x = m.weights(m.scores(x, m.cos(x), {tag}), {tag}) @ x
    x = m.checkpointed(x, {tag})
    x = m.region(x, {tag})
""")

attend_twice = table("""
    y = m.region(x.flip(1), {tag}); x = m.region(x, {tag})
    y = m.region(x.roll(1, 1), {tag}); x = m.region(x, {tag})
    y = m.region(x[:, 1:], {tag}); x = m.region(x, {tag})
    y = m.region(m.norm(x), {tag}); x = m.region(x, {tag})
    y = m.region(x.flip(0), {tag}); x = m.region(x, {tag})
""")
"""One body is called with tokens in two orders."""

attend_elsewhere = table("""
    x = m.attend_to(x, x, {tag})
    x = m.attend_to(x, m.norm(x), {tag})
    x = m.attend_to(x, x.flip(0), {tag})
    x = m.attend_to(x, x.roll(1, 0), {tag})
    x = m.attend_to(x, torch.stack(x.unbind(0)[::-1]), {tag})
    x = m.attend_to(x, torch.cat([x[1:], x[:1]]), {tag})
    x = m.attend_to(x, x[:1].expand_as(x), {tag})
    x = m.attend_to(x, x[list(range({B}))[::-1]], {tag})
    x = m.attend_to(x, x.flip(1), {tag})
    x = m.attend_to(x, x.roll(1, 1), {tag})
    x = m.attend_to(x, torch.cat([x[:, 1:], x[:, :1]], 1), {tag})
    x = m.attend_to(x, x[:, 1:], {tag})
""")
"""Queries come from these tokens, keys from tokens that were moved or belong to another video."""

KEPT: tuple[Move, ...] = (
    content, content, reshaped, reshaped, rejoined, rejoined, text_joined, text_joined, text_cut, padded, positions,
    windows, attend_in_part, attend_in_part, attend, there_and_back,
)  # fmt: skip

RETURNING: tuple[Move, ...] = (
    table("""
    x = x.roll({n}, 1); x = x.roll(-{n}, 1)
    x = x.flip(1).flip(1)
    x = x.flip(0).flip(0)
    x = x.flip(0)
    x = x.roll(1, 0)
    x = x[:, {perm}]; x = x[:, torch.tensor({perm}).argsort()]
    x = x[:, torch.arange({S})]
    x = x[torch.arange({B})]
    x = x.index_select(1, torch.arange({S}))
    x = x.gather(1, torch.arange({S})[None, :, None].expand({B}, -1, x.shape[-1]))
    x = m.conv1d(x)
    x = m.cumsum(x)
    x = m.softmax(x)
    x = x.repeat_interleave(2, 1)[:, ::2]
    x = x[:, ::1]
    x = x[:, -{S}:]
    x = torch.stack(x.unbind(1), 1)
    x = torch.eye({S}, dtype=x.dtype) @ x
    x = torch.einsum('st,btc->bsc', torch.eye({S}, dtype=x.dtype), x)
    x = torch.cat([x[:, {n}:], x[:, :{n}]], 1); x = torch.cat([x[:, {S} - {n}:], x[:, :{S} - {n}]], 1)
    x = F.pad(x, (0, 0, {n}, 0))[:, {n}:]
    x = F.pad(x, (0, 0, 2, 3))[:, 2:-3]
    x = F.pad(F.pad(x, (0, 0, 2, 1)), (0, 0, -2, -1))
    x = x.flip(-1)
    x = x[:, :, torch.arange({C} - 1, -1, -1)]
    x = x.rot90(1, (1, 2)).rot90(-1, (1, 2))
    x = x.as_strided(x.shape, x.stride())
    x = x.unfold(1, 1, 1)[..., 0]
    x = torch.cat([x[:1], x[1:]])
    x = F.avg_pool1d(x.mT, 1).mT
    x = x.scatter(1, torch.zeros({B}, 1, x.shape[-1], dtype=torch.int64), x[:, :1])
"""),
)

# Moves that change the places of tokens.

moved = table("""
    x = x.roll({n}, 1)
    x = x.flip(1)
    x = x[:, {perm}]
    x = x[:, torch.tensor({perm})]
    x = torch.cat([x[:, {n}:], x[:, :{n}]], 1)
    x = torch.cat([x[:, ::2], x[:, 1::2]], 1)
    a, b = x.split([{n}, {S} - {n}], 1); x = torch.cat([b, a], 1)
    x = x.index_select(1, torch.tensor({perm}))
    x = x.take_along_dim(torch.tensor({perm})[None, :, None], 1)
    x = x.gather(1, torch.tensor({perm})[None, :, None].expand({B}, -1, x.shape[-1]))
    x = torch.eye({S}, dtype=x.dtype)[{perm}] @ x
    x = F.linear(x.mT, torch.eye({S}, dtype=x.dtype)[{perm}]).mT
    x = torch.einsum('st,btc->bsc', torch.eye({S}, dtype=x.dtype)[{perm}], x)
    x = torch.stack([x[:, :{S} // 2], x[:, {S} // 2:2 * ({S} // 2)]], 2).flatten(1, 2)
    x = x.unflatten(1, ({a}, -1)).transpose(1, 2).flatten(1, 2)
    x = x.reshape({B}, {S} // {a}, {a}, -1).transpose(1, 2).reshape({B}, {S}, -1)
    x = torch.stack(x.unbind(1)[::-1], 1)
    x = torch.cat(x.chunk(2, 1)[::-1], 1)
    x = torch.cat(x.chunk(3, 1)[::-1], 1)
    x = x.unflatten(1, ({a}, -1)).flip(1).flatten(1, 2)
    x = x.unflatten(1, ({a}, -1)).flip(2).flatten(1, 2)
    x = x.unflatten(1, ({a}, -1)).roll(1, 2).flatten(1, 2)
    x = x.unflatten(1, ({a}, -1)).roll((1, 1), (1, 2)).flatten(1, 2)
    x = x[:, x[0, :, 0].argsort(descending=True)]
    x = x.sort(1, descending=True)[0]
    x = x.rot90(2, (1, 2))
    x = torch.cat([x[:, {n}:], x.new_zeros({B}, {n}, x.shape[-1])], 1)
    x = x.scatter(1, torch.tensor({perm})[None, :, None].expand({B}, -1, x.shape[-1]), x)
    x = x.index_copy(1, torch.tensor({perm}), x)
    x = x[:, [{n}, *range({n}), *range({n} + 1, {S})]]
    x = F.pixel_shuffle(x.unflatten(1, (-1, 4)).mT.flatten(0, 1)[..., None], 2).flatten(1).view(x.shape)
    x = F.embedding(torch.tensor({perm}), x[0])[None].repeat({B}, 1, 1)
""")

regridded = table(
    """
    x = {g}.permute(0, {order}, 4).flatten(1, 3)
    x = {g}.permute(0, {order}, 4).reshape({B}, {S}, -1)
    x = {g}.flip({axis}).flatten(1, 3)
    x = {g}.roll({k} + 1, {axis}).flatten(1, 3)
    x = {g}.narrow({axis}, {k}, 2).flatten(1, 3)
    x = {g}.select({axis}, {k}).flatten(1, 2)
    x = {g}.unbind({axis})[{k}].flatten(1, 2)
    x = x.unflatten(1, ({f}, -1)).transpose(0, 1).reshape({B}, {S}, -1)
    x = x.unflatten(1, ({f}, -1)).transpose(0, 1).reshape({f}, -1, {C})
    x = x.unflatten(1, ({f}, -1)).transpose(0, 1).flatten(1, 2)
    x = {g}.permute(1, 0, 2, 3, 4).flatten(1, 3)
    x = {g}.permute(2, 0, 1, 3, 4).flatten(1, 3)
    x = {g}.permute(3, 0, 1, 2, 4).flatten(1, 3)
    x = {g}.permute(1, 2, 0, 3, 4).flatten(1, 3)
    x = m.linear({g}.permute(0, 4, 1, 2, 3).flatten(1, 3)[..., None])
    x = m.linear({g}.permute(0, 4, 2, 3, 1).flatten(1, 3))
    x = m.linear({g}.permute(0, 1, 4, 2, 3).flatten(1, 3))
    x = m.linear({g}.permute(0, 2, 3, 1, 4).flatten(3)).flatten(1, 2)
    x = m.linear({g}.permute(0, 1, 2, 4, 3).flatten(3)).flatten(1, 2)
    x = x.flatten(0, 1)[None]
    x = {g}.mean({axis}).flatten(1, 2)
    x = {g}.amax({axis}).flatten(1, 2)
    x = {g}[:, ::2].flatten(1, 3)
    x = {g}[:, :, ::2].flatten(1, 3)
    x = {g}[:, :, :, ::2].flatten(1, 3)
    x = {g}[:, 1:].flatten(1, 3)
    x = {g}[:, :, 1:, 1:].flatten(1, 3)
    x = torch.stack({g}.unbind({axis})[::-1], {axis}).flatten(1, 3)
    x = torch.cat([{g}[:, 1:], {g}[:, :1]], 1).flatten(1, 3)
    x = torch.cat([{g}[:, :, :, 1:], {g}[:, :, :, :1]], 3).flatten(1, 3)
    x = torch.cat([{g}, {g}], {axis}).flatten(1, 3)
    x = F.pad({g}, (0, 0, -1, 1)).flatten(1, 3)
    x = F.pad({g}, (0, 0, 0, 0, -1, 1)).flatten(1, 3)
    x = F.pad({g}, (0, 0, 0, 0, 0, 0, -1, 1)).flatten(1, 3)
    x = F.pad({g}, (0, 0, 0, 0, 0, 0, 1, -1)).flatten(1, 3)
    x = {g}.repeat_interleave(2, {axis}).flatten(1, 3)
    x = {g}.repeat_interleave(2, {axis}).narrow({axis}, 0, 2).flatten(1, 3)
    x = {g}.repeat(1, 2, 1, 1, 1).flatten(1, 3)
    x = x.mT.reshape({B}, {S}, -1)
    x = x.reshape({B}, {C}, -1).mT
    x = x.transpose(0, 1).reshape({B}, {S}, -1)
    x = x.reshape({S}, {B}, -1).transpose(0, 1)
""",
    video=True,
)
"""The grid's axes in another order, cut, or exchanged with the batch or the channels."""

cropped = table("""
    x = x[:, {n}:]
    x = x[:, :-{n}]
    x = x[:, ::2]
    x = x[:, 1::2]
    x = F.pad(x, (0, 0, -{n}, {n}))
    x = F.pad(x, (0, 0, {n}, -{n}))
    x = F.pad(x, (0, 0, -1, 0))
    x = F.pad(x, (0, 0, 0, -{n}))
    x = F.pad(x[:, {n}:], (0, 0, {n}, 0))
    x = F.pad(x, (0, 0, {n}, 0))[:, :{S}]
    x = x.repeat_interleave(2, 1)[:, :{S}]
    x = x.repeat_interleave(2, 1)
    x = x.repeat(1, 2, 1)
    x = torch.cat([x, x], 1)
    x = torch.cat([x[:, :{n}], x], 1)
    x = torch.cat([x[:, :{n}], x[:, :{S} - {n}]], 1)
    x = torch.cat([x[:, -{n}:], x[:, {n}:]], 1)
    x = F.interpolate(x.mT, scale_factor=2.0).mT
    x = x.unfold(1, 2, 2)[..., 0]
    x = F.avg_pool1d(x.mT, 2).mT
    x = F.max_pool1d(x.mT, 3, 1, 1).mT
    x = torch.cat([x[:1], x[:1]])
    x = x[:1].expand({B}, -1, -1)
    x = x[[0] * {B}]
    x = x.as_strided(({B}, {S}, x.shape[-1]), ({S} * x.shape[-1], 1, {S}))
""")
"""Fewer tokens, or the same number of which some are replaced."""

mixed = table("""
    x = (x + {other}) / 2
    x = ({other} + x) / 2
    x = torch.lerp({other}, x, 0.5)
    x = torch.maximum(x, {other})
    x = torch.minimum({other}, x)
    x = torch.where(torch.arange({S})[:, None] % 2 == 0, x, {other})
    x = torch.cat([x[..., :8], ({other})[..., 8:]], -1)
    x = torch.stack([x, {other}]).mean(0)
    x = torch.stack([x, {other}])[1]
    x = torch.stack([x, {other}], 1).flatten(0, 1)[::2]
    x = torch.stack([x, {other}], 1).flatten(0, 1)[:{B}]
""")
"""Every token is a mixture of two, or one of two."""


def wrong_positions(t: Tokens, draw: Draw) -> None:
    """Positions of another grid with the same number of tokens are added to tokens with a known grid."""
    if t.scene.source == "packed" and "m.mesh" not in t.moves[0]:
        return  # the wrong positions would be the only ones
    f, h, w = t.scene.grid
    sizes = draw.of((h, f, w), (w, h, f), (f, w, h), (f * h, 1, w), (f, 1, h * w), (1, f * h, w))
    t.add(f"x = x + m.mesh{sizes}")


MOVED: tuple[Move, ...] = (moved, regridded, cropped, mixed, wrong_positions)
