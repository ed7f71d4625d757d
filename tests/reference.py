"""What every test compares with: attention written out plainly, and the one rule that says when a result is right.

`attention` and `attention_varlen` are the formula itself, a dense matrix of scores and a dense mask, in PyTorch and so
differentiable. In float64 they are the oracle. With `fused` they are "PyTorch's own computation in that dtype", the
yardstick of `check_close`: what its fused attention computes and where it rounds, for all of our options.
"""

import torch

INFINITY = float("inf")


def visible(seqlen_q, seqlen_k, *, causal=False, window=None, sink_tokens=0, device="cpu"):
    """The mask, (seqlen_q, seqlen_k), bool: which query sees which key."""
    position = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_k - seqlen_q)
    key = torch.arange(seqlen_k, device=device)[None, :]
    left, right = window if window is not None else (None, None)
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left is not None:
        seen &= (key >= position - left) | (key < sink_tokens)
    if right is not None:
        seen &= key <= position + right
    if causal:
        seen &= key <= position
    return seen


class _RoundedSoftmax(torch.autograd.Function):
    """softmax(scores) v as fused attention computes it in a low precision: float32, rounded where it is stored.

    The weights are rounded for their product with v, and so is out; the gradient of the scores is rounded for its
    products with q and k. The backward has out from memory: `saved_out` if it is given, else its own.
    """

    @staticmethod
    def forward(ctx, scores, lse, v, dtype, saved_out):
        p = (scores - lse[..., None]).exp()
        out = (p[..., :-1].to(dtype).to(v.dtype) @ v).to(dtype).to(v.dtype)
        ctx.save_for_backward(p, v, out if saved_out is None else saved_out.to(v.dtype))
        ctx.dtype = dtype
        return out, lse.clone()

    @staticmethod
    def backward(ctx, dout, dlse):
        p, v, out = ctx.saved_tensors
        dp = torch.nn.functional.pad(dout @ v.mT, (0, 1))
        delta = (dout * out).sum(-1) - dlse
        return p * (dp - delta[..., None]), None, p[..., :-1].to(ctx.dtype).to(v.dtype).mT @ dout, None, None


class _RoundedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).to(grad.dtype), None


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    window=None,
    scale=None,
    softcap=0.0,
    sinks=None,
    sink_tokens=0,
    deterministic=False,
    fused=False,
    saved_out=None,
):
    """Attention of q (b, s_q, h_q, d), k (b, s_k, h_kv, d), v (b, s_k, h_kv, d_v), in float32 or better.

    `fused` rounds to the dtype of q what PyTorch's fused attention rounds (_RoundedSoftmax), and takes the gradient of
    the softmax by hand, as that does, from `saved_out`; otherwise all is left to autograd.
    Returns out (b, s_q, h_q, d_v) and lse (b, h_q, s_q).
    """
    batch, seqlen_q, heads_q, head_dim = q.shape
    seqlen_k, heads_kv = k.shape[1:3]
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    scale = head_dim**-0.5 if scale is None else scale

    q, k, v = (x.to(wide).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads_q // heads_kv, dim=1) for x in (k, v))
    scores = q @ k.mT
    if fused:
        scores = _RoundedGradient.apply(scores, dtype)
    scores = scores * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)

    seen = visible(seqlen_q, seqlen_k, causal=causal, window=window, sink_tokens=sink_tokens, device=q.device)
    scores = scores.masked_fill(~seen, -INFINITY)
    # The sink is one more column, which has no value; without sinks it weighs nothing.
    sink = torch.full((heads_q,), -INFINITY, dtype=wide, device=q.device) if sinks is None else sinks.to(wide)
    scores = torch.cat([scores, sink[None, :, None, None].expand(batch, -1, seqlen_q, 1)], dim=-1)
    # A row of nothing but -inf has no softmax: it is computed from zeros, and its results are replaced.
    empty = (scores == -INFINITY).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    lse = scores.logsumexp(-1)
    if fused:
        saved_out = None if saved_out is None else saved_out.transpose(1, 2)
        out, lse = _RoundedSoftmax.apply(scores, lse.detach(), v, dtype, saved_out)
    else:
        out = scores.softmax(-1)[..., :-1] @ v
    return out.masked_fill(empty, 0.0).transpose(1, 2).to(dtype), lse.masked_fill(empty[..., 0], -INFINITY)


def attention_varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, saved_out=None, **options):
    """Attention of packed sequences: `attention` of each sequence by itself.

    Rows in no sequence: out 0, lse -inf. Returns out (total_q, h_q, d_v) and lse (h_q, total_q).
    """
    total_q, heads_q, _ = q.shape
    out = q.new_zeros(total_q, heads_q, v.shape[2])
    lse = torch.full((heads_q, total_q), -INFINITY, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(bounds_q) - 1):
        rows, keys = slice(bounds_q[i], bounds_q[i + 1]), slice(bounds_k[i], bounds_k[i + 1])
        saved = None if saved_out is None else saved_out[None, rows]
        out_i, lse_i = attention(q[None, rows], k[None, keys], v[None, keys], saved_out=saved, **options)
        out[rows] = out_i[0]
        lse[:, rows] = lse_i[0]
    return out, lse


# What another order of sums and another exp may change in values of about 1: some dozen units in the last place of the
# dtype that sums are taken in. (For float64 more: its yardstick has the oracle's own roundings, and so no error.)
SUMS = {torch.float32: 8e-6, torch.float64: 1e-12}


def check_close(name, result, oracle, yardstick):
    """The acceptance rule. `oracle` is the float64 answer, `yardstick` that of PyTorch's own computation in the dtype.

    The error of `result` may be twice that of `yardstick`, in the largest element and in the root mean square, plus a
    floor: a yardstick can be exact, by luck or because a row sees one key only, where another right answer rounds a
    weight and the result, each by half a unit in the last place. In the mean square the two hardly add up.
    Infinities must be the same ones; NaN never passes.
    """
    assert result.shape == oracle.shape, f"{name}: shape {tuple(result.shape)}, not {tuple(oracle.shape)}"
    sums = SUMS[torch.promote_types(result.dtype, torch.float32)]
    unit = torch.finfo(result.dtype).eps  # in the last place
    result, oracle, yardstick = (x.detach().double() for x in (result, oracle, yardstick))
    infinite = oracle.isinf()
    wrong = ~result.isfinite() & ~infinite
    assert not wrong.any(), f"{name}: NaN or Inf in {int(wrong.sum())} elements, first at {_first(wrong)}"
    differ = infinite & (result != oracle)
    assert not differ.any(), f"{name}: must be infinite, is not in {int(differ.sum())}, first at {_first(differ)}"
    if infinite.all():  # also when there is no element
        return

    zero = oracle.new_zeros(())
    oracle, error, allowed = (
        torch.where(infinite, zero, x) for x in (oracle, (result - oracle).abs(), (yardstick - oracle).abs())
    )
    largest = tuple(x.abs().max() for x in (error, allowed, oracle))
    mean = tuple(x.square().mean().sqrt() for x in (error, allowed, oracle))
    for kind, roundings, (e, a, size) in (("largest", unit, largest), ("mean", unit / 2, mean)):
        floor = roundings * size + sums * (1 + size)
        assert e <= 2 * a + floor, (
            f"{name}: {kind} error {e:.3e}, allowed 2 x {a:.3e} (PyTorch's) + {floor:.1e}; "
            f"the largest at {_first(error == error.max())}"
        )


def _first(where):
    return tuple(where.nonzero()[0].tolist())
