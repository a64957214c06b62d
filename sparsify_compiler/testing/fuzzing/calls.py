"""One compiled model, called with sizes, types and modes in any order; kind `calls`.

Every method reads all keys, so eager is the oracle of every call and of its gradients. Programs contain no sizes,
so they must run with all sizes.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.plan import AttentionPlan
from sparsify_compiler.testing.fuzzing.cases import Case, Draft, Draw, Level, Scene, Verdict, lines
from sparsify_compiler.testing.fuzzing.judging import backend, described, differs
from sparsify_compiler.testing.fuzzing.machines import CHANNELS, HEADS, WIDTH, Program, heads, joined

FRAMES = 3

METHODS: tuple[dict[str, Any], ...] = (
    {"method": "tile", "reference_frames": FRAMES},
    {"method": "svg2", "top_p": 1.0, "kmeans_iters": (2, 1)},
    {"method": "keys", "kv_budget": 1.0, "kmeans_iters": (2, 1)},
    {"method": "cubes", "top_p": 1.0},
    {"method": "dsv", "rank": 4},
    {"method": "dense"},
)
"""Methods, with options with which they read everything. `sta` refuses such options."""

TEXT = lines("""
    text = text.roll(1, 1)
    text = text.flip(1)
    text = text[:, ::2]
    text = text[:, torch.arange(text.shape[1])]
    text = text[:, 1:]
    text = m.conv1d(text)
    text = text.repeat_interleave(2, 1)
    text = F.pad(text, (0, 0, 1, 2))
    text = text.cumsum(1)
    text = torch.cat([text, text], 1)
    text = m.linear(text)
    text = text.sort(1)[0]
    text = text[:, text[0, :, 0].argsort()]
    text = F.avg_pool1d(text.mT, 2, ceil_mode=True).mT
    text = m.norm(text)
    text = torch.stack([text, text], 2).flatten(1, 2)
    text = text.clone()
    text = m.attend(text)
    text = text[:, torch.arange(text.shape[1]).flip(0)]
    text = text.unfold(1, 1, 1)[..., 0]
    text = text.mean(1, True)
    text = text.gather(1, torch.arange(text.shape[1])[None, :, None].expand_as(text))
    text = text * text.shape[1]
    text = torch.cat([text, text.new_zeros(len(text), 4, text.shape[2])], 1)
    text = text[:, -3:]
    text = text.softmax(1)
    text = text + torch.arange(text.shape[1])[:, None] * 0.1
    text = text.mT.contiguous().mT
""")
"""Moves of the text before it is joined with the video."""

JOINS = lines("""
    x = torch.cat([text, x], 1)
    x = torch.cat([x, text], 1)
    x = x + m.attend_to(x, text)
    x = torch.cat([text, x, text], 1)
""")

VIDEO = lines("""
    x = x + m.attend(x)
    x = m.norm(x)
    x = m.act(x)
    x = x + m.linear(m.norm(x))
    x = x * t
    x = x.unflatten(1, (video.shape[2], -1)).flatten(1, 2)
    x = x.flatten(0, 1).unflatten(0, (len(video), -1))
    y = m.attend(x.unflatten(1, (video.shape[2], -1)).flatten(0, 1)); x = x + y.reshape(x.shape)
    x = x.clone(); x.mul_(2)
    x = x + x.mean(1, keepdim=True)
    x = x.roll(1, 1).roll(-1, 1)
    x = x.contiguous()
    y = torch.empty_like(x); y[:, ::2], y[:, 1::2] = x[:, ::2], x[:, 1::2]; x = y
    x = x + m.by_hand(x)
    x = torch.utils.checkpoint.checkpoint(m.attend, x, use_reentrant=False)
    x = m.conv1d(x)
""")

AFTER = lines("""
    x = x + m.attend(x)
    x = m.norm(x)
    x = x[:, text.shape[1]:]
    x = x[:, :-text.shape[1]]
    x = m.attend(x)
    x = x + m.attend_to(x, text)
    x = x + m.attend(x); x = m.attend(m.norm(x))
    x = x + m.by_hand(x)
    x = m.attend(x).view(x.shape)
""")

END = lines("""
    x = m.attend(x)
    x = m.attend(x)
    x = m.by_hand(x)
    x = m.attend(x).transpose(1, 2).contiguous().view(len(x), -1)
    x = m.attend(x).view(-1)
    x = m.attend(x), x.mean()
    x = m.sdpa(x).view(len(x), -1)
    x = m.sdpa(x)
""")

VARIED: dict[str, tuple[Any, ...]] = {
    "text": (7, 9, 13, 5, 1, 2),
    "batch": (2, 1, 3, 4),
    "rows": (2, 3, 4),
    "columns": (5, 4, 2),
    "mode": ("no_grad", "grad", "inference_mode", "grad of weights"),
    "dtype": ("float32", "bfloat16", "float64", "float16"),
    "autocast": ("", "bfloat16", "float16"),
    "default": ("float32", "bfloat16", "float64", "float16"),
    "strides": ("contiguous", "channels last", "frames first", "every second", "expanded"),
    "time": (900.0, 700.0, 500.0, 900.5),
    "copy": (False, True),
    "train": (False, True),
}
"""Name -> values that calls may have."""

USUAL = {name: values[0] for name, values in VARIED.items()}
"""The call that a case describes by nothing."""

TOLERANCE = {"float32": 1e-3, "float64": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


class Model(nn.Module):
    """The machine `m` of the programs: a model with parameters, which may be cast, copied and trained."""

    def __init__(self, program: Program | None, scene: Scene) -> None:
        super().__init__()
        self.program = program
        self.patch = nn.Conv3d(CHANNELS, WIDTH, scene.patch, scene.patch)
        self.qkv, self.linear = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.act, self.mix = nn.LayerNorm(WIDTH), nn.SiLU(), nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, hidden_states: Tensor, text: Tensor, timestep: Tensor) -> Any:
        """Run the program on a video [B, C, F, H, W] in pixels, a text [B, T, WIDTH] and a time [1]."""
        assert self.program is not None
        return self.program(self, hidden_states, text, timestep / 1000)

    def conv3d(self, video: Tensor) -> Tensor:
        """Tokens [B, S, WIDTH] of a video."""
        return self.patch(video).flatten(2).transpose(1, 2)

    def conv1d(self, x: Tensor) -> Tensor:
        """A convolution along the tokens."""
        return self.mix(x.mT).mT

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention."""
        return joined(self.sdpa(x))

    def sdpa(self, x: Tensor) -> Tensor:
        """Self-attention, in the shape that attention returns, [B, H, S, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)

    def attend_to(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-attention."""
        q, (k, v) = heads(self.linear(x)), (heads(one) for one in self.qkv(y).chunk(3, -1)[:2])
        return joined(F.scaled_dot_product_attention(q, k, v))

    def by_hand(self, x: Tensor) -> Tensor:
        """Self-attention, written out."""
        q, k, v = (heads(one) for one in self.qkv(x).chunk(3, -1))
        return joined((q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v)


def draw_calls(draw: Draw) -> Case:
    """Draw a model, options, and some calls, each with one or two changes from the call before."""
    scene = Scene(grid=(FRAMES, 2, 5), patch=(1, 2, 2))
    video, text = _inputs(scene, USUAL)
    draft = Draft(m=Model(None, scene), video=video, text=text, t=torch.ones(1))
    draft.add("x = m.conv3d(video)")
    for table, counts in ((VIDEO, (0, 1)), (TEXT, (1, 1, 0, 2)), (JOINS, (1, 1, 1, 0)), (AFTER, (0, 1, 2))):
        for _ in range(draw.of(*counts)):
            draft.add(draw.of(*table))
    if draw.chance(70) or not any(word in move for move in draft.moves for word in ("attend", "by_hand")):
        draft.add(draw.of(*END))
    method = draw.of(METHODS[0], METHODS[0], *METHODS)
    options = {**method, "inner_backend": draw.of("eager", "eager", "eager", "eager", "aot_eager")}
    if options["method"] not in ("tile", "dense"):
        options |= {"dense_layers": 0, "dense_steps": draw.of(0, 0, 1)}
    if draw.chance(5):
        options["grid"] = scene.grid
    if draw.chance(25):
        options["dynamic"] = draw.of(True, False)
    calls: list[dict[str, Any]] = [{}]
    names = draw.of(("text", "batch", "rows", "columns"), tuple(VARIED))
    for _ in range(draw.integer(1, 3)):
        changed = [draw.of(*names) for _ in range(draw.of(1, 1, 2))]
        calls.append(calls[-1] | {name: draw.of(*VARIED[name]) for name in changed})
    if draw.chance(30):
        calls = calls[::-1]
    return Case(kind="calls", scene=scene, moves=tuple(draft.moves), options=options, calls=tuple(calls))


def judge_calls(case: Case, level: Level, program: Program) -> Verdict:
    """Make the calls of a case on a compiled model, each before eager, and compare. The level has no effect."""
    torch._dynamo.reset()
    options = dict(case.options)
    dynamic = options.pop("dynamic", None)
    plans: list[AttentionPlan] = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        eager = Model(program, case.scene).eval()
    fast = torch.compile(copy.deepcopy(eager), backend=backend(options, plans), dynamic=dynamic)
    refused = ""
    for number, call in enumerate(USUAL | call for call in case.calls):
        if call["copy"]:
            fast, eager = copy.deepcopy(fast), copy.deepcopy(eager)
        results: list[Any] = []
        for model in (fast, eager):
            try:
                results.append(_run(model, case, call))
            except Exception as error:
                results.append(error)
        got, expected = results
        if isinstance(expected, Exception):
            continue
        if isinstance(got, SparsifyError):
            refused = described(got)
        elif isinstance(got, Exception):
            return Verdict("CRASH", f"{described(got)} (call {number})")
        elif difference := differs(got, expected, TOLERANCE[call["autocast"] or call["dtype"]]):
            return Verdict("WRONG", f"call {number} differs from eager by {difference}")
    if refused:
        return Verdict("refused", refused)
    return Verdict("sparse" if any(plan.method != "dense" for plan in plans) else "dense")


def _run(model: Any, case: Case, call: dict[str, Any]) -> list[Any]:
    """The output of a call, and the gradients of its input and of a weight if the call needs them."""
    dtype = getattr(torch, call["dtype"])
    model.to(dtype).train(call["train"]).zero_grad()
    video, text = _inputs(case.scene, call)
    video, text = video.to(dtype), text.to(dtype)
    gradients = call["mode"].startswith("grad")
    if call["mode"] == "grad":
        video.requires_grad_()
    with _mode(call):
        out = model(video, text, torch.tensor([call["time"]]).to(dtype))
        outs = tree_leaves(out)
        if not gradients:
            return [one.clone() for one in outs]
        sum(one.double().square().mean() for one in outs).backward()
    return [*outs, video.grad, next(model.parameters()).grad]


@contextlib.contextmanager
def _mode(call: dict[str, Any]) -> Iterator[None]:
    """Set the state of PyTorch for a call."""
    before = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if call["mode"] in ("no_grad", "inference_mode"):
            stack.enter_context(getattr(torch, call["mode"])())
        if call["autocast"]:
            stack.enter_context(torch.autocast("cpu", getattr(torch, call["autocast"])))
        try:
            torch.set_default_dtype(getattr(torch, call["default"]))
            yield
        finally:
            torch.set_default_dtype(before)


def _inputs(scene: Scene, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A video and a text, with the sizes and strides of a call."""
    generator = torch.Generator().manual_seed(hash((call["text"], call["batch"])))
    pixels = [n * size for n, size in zip((FRAMES, call["rows"], call["columns"]), scene.patch, strict=True)]
    shape = (call["batch"], CHANNELS, *pixels)
    video = torch.randn(shape, generator=generator, dtype=torch.float32)
    match call["strides"]:
        case "channels last":
            video = video.to(memory_format=torch.channels_last_3d)
        case "frames first":
            video = video.transpose(1, 2).contiguous().transpose(1, 2)
        case "every second":
            video = torch.stack([video, video], -1)[..., 0]
        case "expanded":
            video = video[:1].expand(shape)
    return video, torch.randn(call["batch"], call["text"], WIDTH, generator=generator, dtype=torch.float32)
