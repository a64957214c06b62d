"""Programs of tokens, kinds `tokens` and `writes`: they cut patches, move tokens and run attention."""

from sparsify_compiler.testing.fuzzing.cases import Case, Draw, Scene
from sparsify_compiler.testing.fuzzing.machines import CHANNELS, WIDTH
from sparsify_compiler.testing.fuzzing.moves import (
    KEPT,
    MOVED,
    RETURNING,
    attend,
    attend_elsewhere,
    attend_twice,
)
from sparsify_compiler.testing.fuzzing.tokens import MESHES, Move, Tokens, draw_scene
from sparsify_compiler.testing.fuzzing.writes import KEPT_WRITES, MOVED_WRITES, write_around_attention


def orders(scene: Scene) -> tuple[str, str]:
    """The video as [B, C, F, H, W], and as [B, F, C, H, W]."""
    there, turned = "video", "video.transpose(1, 2)"
    return (turned, there) if scene.source == "frames first" else (there, turned)


def embed(scene: Scene, draw: Draw) -> str:
    """Statements from the video to x, in one of the ways that show a grid."""
    batch, (frames, rows, columns) = scene.batch, scene.grid
    if scene.source == "packed":
        mesh = f" + m.mesh({frames}, {rows}, {columns}, {draw.of(*MESHES)!r})" if draw.chance(85) else ""
        return f"x = m.linear(video){mesh}"
    channels_first, frames_first = orders(scene)
    way = draw.of("conv3d", "cut", "conv2d")
    if way == "conv3d":
        to_tokens = draw.of(
            "flatten(2).transpose(1, 2)",
            "flatten(2).mT",
            "permute(0, 2, 3, 4, 1).flatten(1, 3)",
            f"reshape({batch}, {WIDTH}, -1).permute(0, 2, 1)",
        )
        return f"x = m.conv3d({channels_first}).{to_tokens}"
    if way == "conv2d" and scene.patch[0] == 1:
        to_tokens = draw.of(
            f"flatten(1, 2).reshape({batch}, -1, {WIDTH})", f"unflatten(0, ({batch}, {frames})).flatten(1, 3)"
        )
        return f"x = m.conv2d({frames_first}.flatten(0, 1)).permute(0, 2, 3, 1).{to_tokens}"
    sizes = [n for pair in zip(scene.grid, scene.patch, strict=True) for n in pair]
    return (
        f"x = {channels_first}.reshape{(batch, CHANNELS, *sizes)}\n"
        "x = m.linear(x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)).flatten(1, 3)"
    )


def _could_be_one_video(scene: Scene, tokens: list[str], features: list[str]) -> bool:
    """Whether a graph cannot distinguish these pixels from those of a video with another axis as channels."""
    there = "bfchw" if scene.source == "frames first" else "bcfhw"
    ordered = len(tokens) == 3 and tokens == sorted(tokens, key=there.index)
    return ordered and "c" in tokens and (scene.batch == 1 or "b" not in (*tokens, *features))


def embed_freely(scene: Scene, draw: Draw) -> str:
    """Statements from the video to x [batch, tokens, WIDTH], with any of its axes as batch, tokens and channels."""
    channels_first, frames_first = orders(scene)
    way = draw.of("conv3d", "conv2d", "pixels")
    x, axes = f"m.conv3d({channels_first})", "bcfhw"
    if way == "conv2d" and scene.patch[0] == 1:
        images = (scene.batch, scene.grid[0])
        x, axes = f"m.conv2d({frames_first}.flatten(0, 1)).unflatten(0, {images})", "bfchw"
    elif way == "pixels" and scene.patch == (1, 1, 1):
        x = channels_first
    order = draw.of(["b", "f", "h", "w", "c"], [axes[at] for at in draw.permutation(5)])
    dims = ", ".join(str(axes.index(axis)) for axis in order)
    tokens_at, channels_at = draw.of((1, 4), (draw.integer(0, 2), draw.integer(3, 5)))
    if x == channels_first and _could_be_one_video(scene, order[tokens_at:channels_at], order[channels_at:]):
        return embed(scene, draw)
    batch = f"flatten(0, {tokens_at - 1})" if tokens_at else "unsqueeze(0)"
    channels = f"flatten({channels_at})" if channels_at < 5 else "unsqueeze(-1)"
    return (
        f"x = {x}.permute({dims})\nx = m.linear(x.{channels}.flatten({tokens_at}, {channels_at - 1}).{batch})"
    )


TABLES: dict[str, tuple[tuple[Move, ...], tuple[Move, ...]]] = {
    "tokens": (KEPT, MOVED),
    "writes": (KEPT_WRITES, MOVED_WRITES),
}
"""Kind of program -> (moves that keep tokens in their places, all others)."""

ATTEND: dict[str, tuple[Move, ...]] = {
    "tokens": (attend, attend, attend, attend_elsewhere, attend_twice),
    "writes": (attend, write_around_attention, write_around_attention),
}
"""Kind of program -> the moves that end it."""


def draw_program(kind: str, draw: Draw) -> Case:
    """Draw a program of the kind `tokens` or `writes`."""
    tokens = Tokens(draw_scene(draw))
    freely = tokens.scene.source != "packed" and draw.chance(15)
    tokens.add((embed_freely if freely else embed)(tokens.scene, draw))
    kept, moved = TABLES[kind]
    tables = draw.of([kept], [kept], [kept, RETURNING], [kept, moved, moved])
    for _ in range(draw.integer(0, 7)):
        draw.of(*draw.of(*tables))(tokens, draw)
    draw.of(*ATTEND[kind])(tokens, draw)
    return Case(kind=kind, scene=tokens.scene, moves=tuple(tokens.moves))
