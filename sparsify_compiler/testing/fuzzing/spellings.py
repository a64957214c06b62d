"""Attention by hand and by call, in right and wrong spellings; kind `spellings`.

Eager is the oracle. If every frame is a reference, no output may differ from it. With one reference frame, a
rewritten attention must equal the program with the mask of the true frames before its softmax.
"""

from typing import Any

import torch
import torch.nn.functional as F

from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.testing.fuzzing.cases import Case, Draft, Draw, Level, Scene, Verdict, lines
from sparsify_compiler.testing.fuzzing.judging import OPTIONS, compiled, described, differs, seen
from sparsify_compiler.testing.fuzzing.machines import Masked, Numbers, Program

SCALES = lines("""
    0.3
    2
    2.0
    0.125
    1.5
    6.0
    -1.0
    1
    0.0
    k.shape[-1] ** -0.5
""")

FIRST = {
    4: lines("""
        q @ k.transpose(-1, -2)
        q @ k.mT
        torch.matmul(q, k.transpose(2, 3))
        q.matmul(k.permute(0, 1, 3, 2))
        torch.einsum('bhqd,bhkd->bhqk', q, k)
        torch.einsum('bhid, bhjd -> bhij', q, k)
        (k @ q.mT).mT
        torch.einsum('bhkd,bhqd->bhqk', k, q)
        torch.einsum('...qd,...kd->...qk', q, k)
        q @ k.transpose(-2, -1)
        (q[..., None, :] * k[..., None, :, :]).sum(-1)
        torch.einsum('bhqd,bhkd->bhkq', q, k)
        -torch.cdist(q, k)
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, q.shape[:2])
        k @ q.mT
        torch.baddbmm(bias.expand(1, 1, -1), q.flatten(0, 1), k.flatten(0, 1).mT).view(*q.shape[:-1], k.shape[-2])
    """),
    3: lines("""
        torch.bmm(q, k.transpose(1, 2))
        q @ k.mT
        q.bmm(k.transpose(-1, -2))
        torch.einsum('bqd,bkd->bqk', q, k)
        torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, beta=0, alpha={c})
        torch.baddbmm(bias, q, k.mT)
        torch.baddbmm(bias, q, k.mT, alpha={c})
        torch.baddbmm(bias, q, k.mT, beta={c})
        (k @ q.mT).mT
        torch.baddbmm(bias, q, k.mT) / 2.0
        torch.baddbmm(bias, q, k.mT) * {c}
        bias.baddbmm(q, k.mT)
        torch.baddbmm(pairs, q, k.mT, beta=0.5, alpha={c})
        torch.einsum('bqd,bkd->bkq', q, k)
        k @ q.mT
    """),
}
"""Number of dimensions -> the first product."""

SECOND = {
    4: lines("""
        w @ v
        torch.matmul(w, v)
        w.matmul(v)
        torch.einsum('bhqk,bhkd->bhqd', w, v)
        (v.mT @ w.mT).mT
        torch.einsum('bhqk,bhkd->bqhd', w, v)
        torch.einsum('bhkd,bhqk->bhqd', v, w)
        w.mT @ v
        w @ v + v
        torch.bmm(w.flatten(0, 1), v.flatten(0, 1)).view(v.shape)
        w @ v.flip(-2)
        (w @ v).contiguous()
        torch.einsum('bhqk,bhkd->hbqd', w, v)
        torch.einsum('bhkq,bhkd->bhqd', w, v)
        w @ v @ v.mT
    """),
    3: lines("""
        torch.bmm(w, v)
        w @ v
        torch.einsum('bqk,bkd->bqd', w, v)
        torch.baddbmm(v, w, v)
        w.bmm(v)
        torch.einsum('bkq,bkd->bqd', w, v)
        torch.einsum('bqk,bkd->qbd', w, v)
        torch.matmul(w, v)
    """),
}

SCALED = lines("""
    s * {c}
    s / {c}
    {c} * s
    s.mul({c})
    torch.mul(s, {c})
    s.div({c})
    s / k.shape[-1] ** 0.5
    torch.div(s, {c})
    s * torch.tensor({c})
    s * bias[..., :1]
    torch.mul({c}, s)
""")

MASKED = lines("""
    s + bias
    bias + s
    torch.add(s, bias)
    s.add(bias)
    s.masked_fill(~keep, -torch.inf)
    s.masked_fill(hide, float('-inf'))
    s.masked_fill(hide, -1e9)
    s.masked_fill(hide, -1e4)
    torch.where(keep, s, -torch.inf)
    s.masked_fill(keep.logical_not(), -1e30)
    s + pairs
    s - bias
    s.masked_fill(far, -torch.inf)
    torch.where(hide, -1e9, s)
    torch.add(s, bias, alpha=2)
    bias - s
    s.masked_fill(hide, torch.finfo(s.dtype).min)
    torch.masked_fill(s, hide, -torch.inf)
    s + torch.zeros_like(bias).masked_fill(hide, -torch.inf)
    s.masked_fill(hide, -5.0)
    s * keep
    s + bias.to(s.dtype)
    s.where(keep, -torch.inf)
    s + keep
    s + own
    s + 1.0
    s + bias + bias
    s.masked_fill(hide, 4.0)
    s + s.new_zeros(1)
    torch.add(s, 1)
    s + bias.bfloat16()
""")

SOFTMAX = lines("""
    m.hidden(s).softmax(-1)
    F.softmax(m.hidden(s), dim=-1)
    torch.softmax(m.hidden(s), -1)
    m.hidden(s).softmax(dim=s.dim() - 1)
    F.softmax(m.hidden(s), -1, dtype=torch.float32)
    m.hidden(s).float().softmax(-1).type_as(s)
    m.hidden(s).log_softmax(-1).exp()
    torch.softmax(m.hidden(s), dim=-1, dtype=torch.float64).to(s.dtype)
    torch.nn.Softmax(dim=-1)(m.hidden(s))
    F.softmin(-m.hidden(s), -1)
    m.hidden(s).softmax(-2)
    torch.sigmoid(m.hidden(s))
    m.hidden(s).softmax(-1).softmax(-1)
    (lambda e: e / e.sum(-1, keepdim=True))((m.hidden(s) - m.hidden(s).amax(-1, keepdim=True)).exp())
    m.hidden(s).softmax(-1).nan_to_num()
    F.relu(m.hidden(s))
    m.hidden(s).half().softmax(-1).to(s.dtype)
    m.hidden(s).to(torch.bfloat16).softmax(-1).float()
    m.hidden(s).softmax(-1, dtype=torch.float64)
""")
"""The weights."""

ODD_SCORES = lines("""
    s = s.clamp(-2, 2)
    s = 3 * torch.tanh(s / 3)
    s = s.to(torch.bfloat16).to(q.dtype)
    s = s.round()
    s = s.to(torch.int32).to(q.dtype)
    s = s.half().to(q.dtype)
    s = s.relu()
    s = s.abs()
    s = -s
    s = s + s
    s = s / s.std()
    s = s.tril()
    s = s.flip(-1)
    s = s.roll(1, -1)
    s = s.mT
    s = s.sort(-1)[0]
    s = s.cumsum(-1)
    s = s.softmax(-1)
    s = s - s.amax(-1, keepdim=True)
    s = torch.div(s, 0.7, rounding_mode='floor')
    s = s // 1
    s = s % 4
    s = s ** 2
    s = s.exp()
    s = s.to(torch.float64)
    s = s.contiguous()
    s = s.clone()
    s = s.detach()
    s = s.nan_to_num()
    s = F.dropout(s, 0.0)
    s = F.dropout(s, 0.3, training=False)
    s = s.to(s.dtype)
    s = s.bfloat16()
    s *= 2
    s.mul_(0.5)
    s.add_(bias)
    s += bias
    s[..., 0] = -torch.inf
    s[..., :2] += 1
    s.clamp_(max=1)
    torch.mul(s, 2, out=s)
    z = s.view(-1); z.mul_(2)
    s.masked_fill_(hide, -torch.inf)
    s.div_(2)
    z = s[..., :3]; z.fill_(0.5)
    s.tanh_()
    s.copy_(s.flip(-1))
    s /= 2
    s -= 1
    s = s.view(s.shape)
    s = s.reshape(-1, *s.shape[-2:]).view(s.shape)
    s = s.unsqueeze(0).squeeze(0)
    s = s.float().round().to(q.dtype)
    s = s.half()
    s = s.float()
    s = s.type(torch.int64).float()
    s = torch.clamp(s, min=-1.0)
    s = F.leaky_relu(s)
    s = s.masked_fill(s < 0, -torch.inf)
    s = s[..., :]
    s = s + s.mean(-1, keepdim=True)
    s = s + s.mean(-2, keepdim=True)
    s = s.expand_as(s)
    s = s.transpose(-1, -2).transpose(-1, -2)
    s = s.exp().log()
    s = torch.addcmul(s, s, s, value=0.1)
    s = s.masked_fill(s > 3, 3.0)
    s = s.to(torch.float8_e4m3fn).to(q.dtype)
    s = s.trunc()
""")
"""Between the first product and the softmax."""

ODD_WEIGHTS = lines("""
    w = F.dropout(w, 0.0)
    w = F.dropout(w, 0.1, training=False)
    w = w.to(v.dtype)
    w = w * 2
    w = w / w.sum(-1, keepdim=True)
    w = w.contiguous()
    w = w.masked_fill(w < 0.01, 0)
    w = w * keep
    w[..., 0] = 0
    w.mul_(0.5)
    w = w + 0.1
    w = w.mT
    w = w.detach()
    w = w.tril()
    w = w.clone()
    w = w.bfloat16().to(v.dtype)
    w = w.round()
    w = w.view(w.shape)
    w = w.nan_to_num(0.0)
    w = w.half()
    z = w.view(-1); z.mul_(2)
    w = w.float()
    w = w.flip(-1)
    w = w.to(v.dtype).contiguous()
""")

WRITES = lines("""
    {y}.mul_(2)
    {y}.zero_()
    {y} *= 2
    {y}.copy_({y}.flip(-2))
    z = {y}[..., 1:]; z.add_(1)
    {y}[0] = 0
    {y}.add_(1.0)
    {y}.transpose(-1, -2).mul_(3)
    z = {y}.detach(); z.mul_(2)
    torch.mul({y}, 2, out={y})
    F.relu({y}, inplace=True)
    z = {y}.view(-1) if {y}.is_contiguous() else {y}; z.mul_(2)
""")

OPERANDS = lines("""
    q = q * {c}
    k = k / 2
    q = q.contiguous()
    k = k.contiguous()
    q = F.normalize(q, dim=-1)
    q, k = q * 0.5, k * 0.5
    q = q + 1
    v = v[..., :4]
    v = torch.cat([v, v], -1)
    q = q.float()
    v = v.contiguous()
    q = q.clone()
    q, k = k, q
    q *= 2
    k = k.detach()
    v = v * 2
    v = v.mT.contiguous().mT
    q, k, v = (t.bfloat16() for t in (q, k, v))
    q, k, v = (t.half() for t in (q, k, v))
    v = v.double()
    q, k, v = (t.double() for t in (q, k, v))
    q, k = q.double(), k.double()
    v = v.bfloat16()
""")

KEYS = lines("""
    k = k[:, :1].expand_as(q)
    k, v = k[:, :1].expand_as(q), v[:, :1].expand_as(q)
    k, v = k[:, :1], v[:, :1]
    k, v = (t[:, :1].repeat_interleave(t.shape[1], 1) for t in (k, v))
    k = v = m.bank(7, q.shape[-1])
    k, v = m.bank(7, q.shape[-1]), m.bank(7, 4)
    k = v = m.bank(7, q.shape[-1])[None]
    k, v = k[0], v[0]
    k, v = k[:1], v[:1]
    k, v = k[0, 0], v[0, 0]
    k, v = k[:, :1], v[:, :1].expand_as(q)
    v = v[0]
    k = k[:1]
    k, v = m.bank(q.shape[-2], q.shape[-1]), v
    k = v = m.bank(q.shape[-2], q.shape[-1])
    k, v = k[..., :9, :], v[..., :9, :]
    k, v = (torch.cat([t, t], -2) for t in (k, v))
""")
"""Keys and values that are fewer, shared, or weights of the model."""

SDPA = lines("""
    m.sdpa(q, k, v)
    m.sdpa(q, k, v, scale={c})
    m.sdpa(q, k, v, attn_mask=keep)
    m.sdpa(q, k, v, attn_mask=keep.expand(1, 1, 1, -1))
    m.sdpa(q, k, v, attn_mask=bias)
    m.sdpa(q, k, v, attn_mask=bias, scale={c})
    m.sdpa(q, k, v, attn_mask=~far)
    m.sdpa(q, k, v, attn_mask=pairs)
    m.sdpa(q, k, v, is_causal=True)
    m.sdpa(query=q, key=k, value=v, dropout_p=0.0)
    m.sdpa(q, k, v, attn_mask=keep[None, :].expand(q.shape[-2], -1))
    m.sdpa(q, k[:, :1], v[:, :1], enable_gqa=True)
    m.sdpa(q, k, v, attn_mask=own)
    m.sdpa(q, k, v, attn_mask=bias.expand(q.shape[-2], -1))
    m.sdpa(q * {c}, k, v)
""")

FINISHES = lines("""
    out
    out
    out.transpose(1, 2).flatten(2)
    out.transpose(1, 2).reshape(out.shape[0], -1)
    out.contiguous().view(-1)
    out, w
    out, s
    out, w.mean()
    out.mul_(2)
    out, q
    out.view(-1, *out.shape[-2:])
    out.view(-1)
    out.as_strided(out.shape, out.stride())
    out.as_strided((out.numel(),), (1,))
    out.flatten(0, -2)
    out * out.is_contiguous()
    out, v
    out.flatten(0, 1).view(-1)
    out * out.stride(1)
    out.t() if out.dim() == 2 else out.mT.contiguous()
    torch.empty_like(out).stride(), out
    out.view(torch.int32) if out.dtype == torch.float32 else out
    (w @ v) + out
    out.unflatten(-1, (2, -1)).view(*out.shape[:-1], 2, -1)
""")


MASKS = """at = torch.arange(k.shape[-2])
keep, bias = at % 5 != 3, at % 7 * 0.4
hide, far, pairs, own = ~keep, at > at[:, None] + 3, -(at - at[:, None]).abs() * 0.5, q[..., :1]"""
"""Masks of visible and of hidden keys, a bias of every key, of every pair, and of every query."""


def draw_spelling(draw: Draw) -> Case:
    """Draw a program that embeds a video, spells an attention over its tokens, and returns the result."""
    scene = Scene(grid=(3, 2, 3), text=3, patch=(1, 2, 2))
    numbers = Numbers(scene)
    video, text = numbers.inputs()
    draft = Draft(m=numbers, video=video, text=text)
    draft.add("x = m.conv3d(video).flatten(2).transpose(1, 2)")
    if draw.chance(30):
        draft.add(draw.of("x = torch.cat([text, x], 1)", "x = torch.cat([x, text], 1)"))
    form = draw.of("heads", "heads", "flat", "single")
    draft.add(_operands(form, draw))
    scale = draw.of(*SCALES)
    if draw.chance(30):
        draft.add(draw.of(*OPERANDS).format(c=scale))
    if draw.chance(10):
        draft.add(draw.of(*KEYS))
    draft.add(MASKS)
    if form == "heads" and draw.chance(20):
        draft.add(f"out = {_usual(draw, SDPA, 6).format(c=scale)}")
    else:
        for move in _by_hand(draw, 4 if form == "heads" else 3, scale):
            draft.add(move)
    draft.add(f"x = {_usual(draw, FINISHES, 3)}")
    exact = draw.chance(50)
    # With rounded operands or weights it is still attention; with rounded scores it is not.
    attention = (move for move in draft.moves if move.startswith(("q", "k", "v", "w = w.")))
    coarse = any(word in move for move in attention for word in ("bfloat16", "half"))
    return Case(
        kind="spellings",
        scene=scene,
        moves=tuple(draft.moves),
        options={"reference_frames": scene.grid[0] if exact else 1},
        tolerance=5e-2 if coarse else 1e-3,
    )


def _operands(form: str, draw: Draw) -> str:
    """q, k and v: [B, H, S, D], [B * H, S, D] or [B, S, C]."""
    sources = [draw.of(f"m.{f}(x)", f"m.{f}(x)", f"m.{f}(x).contiguous()") for f in ("sin", "cos", "act")]
    wrapped = {"heads": "m.heads({})", "flat": "m.heads({}).flatten(0, 1)", "single": "{}"}[form]
    return f"q, k, v = {', '.join(wrapped.format(source) for source in sources)}"


def _by_hand(draw: Draw, dims: int, scale: str) -> list[str]:
    """Attention by hand on tensors of `dims` dimensions: both products, and the statements between them."""
    first, second = _usual(draw, FIRST[dims], 6), _usual(draw, SECOND[dims], 6)
    steps = [f"s = {_usual(draw, SCALED, 8)}"] if draw.chance(60) else []
    if draw.chance(45):
        steps.insert(draw.integer(0, len(steps)), f"s = {_usual(draw, MASKED, 6)}")
    if draw.chance(30):
        steps.insert(draw.integer(0, len(steps)), draw.of(*ODD_SCORES))
    steps.append(f"w = {_usual(draw, SOFTMAX, 6)}")
    if draw.chance(20):
        steps.append(_usual(draw, ODD_WEIGHTS, 3))
    if draw.chance(15):
        target = draw.of("q", "k", "v", "x", "bias", "k", "v")
        steps.insert(draw.integer(0, len(steps)), draw.of(*WRITES).format(y=target))
    return [step.format(c=scale) for step in (f"s = {first}", *steps, f"out = {second}")]


def _usual(draw: Draw, table: tuple[str, ...], usual: int) -> str:
    """A line of the table, usually one of the first `usual`."""
    return draw.of(*table[:usual]) if draw.chance(75) else draw.of(*table)


@torch.no_grad()
def judge_spelling(case: Case, level: Level, program: Program) -> Verdict:
    """Compile a program with one attention and compare it with eager. The level has no effect."""
    options: dict[str, Any] = OPTIONS | case.options
    numbers = Numbers(case.scene)
    try:
        eager = program(numbers, *numbers.inputs())
    except Exception as error:
        return Verdict("invalid", described(error))
    try:
        plans, out = compiled(program, options, numbers, *numbers.inputs())
    except SparsifyError as error:
        return Verdict("refused", described(error))
    except Exception as error:
        return Verdict("CRASH", described(error))
    sparse = [plan for plan in plans if plan.method != "dense"]
    before = case.scene.text * any("[text, x]" in move for move in case.moves)
    after = case.scene.text * any("[x, text]" in move for move in case.moves)
    for plan in sparse:
        layout = plan.layout
        if (layout.before, layout.grid, layout.after) != (before, case.scene.grid, after):
            return Verdict("WRONG", f"planned on {layout} instead of {before} + {case.scene.grid} + {after}")
    expected, what = eager, "eager"
    if sparse and options["reference_frames"] != case.scene.grid[0]:
        frames, rows, columns = case.scene.grid
        frame = F.pad(torch.arange(frames).repeat_interleave(rows * columns), (before, after), value=-1)
        machine = Masked(case.scene, [seen(frame)])
        expected, what = program(machine, *machine.inputs()), "eager under the mask"
    if difference := differs(out, expected, case.tolerance):
        return Verdict("WRONG", f"differs from {what} by {difference}")
    return Verdict("sparse" if sparse else "dense")
