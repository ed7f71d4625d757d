"""What every test compares with: attention written out plainly, and the one rule that says when a result is right.

`attention` and `attention_varlen` are the formula itself, a dense matrix of scores and a dense mask, in PyTorch and so
differentiable. In float64 they are the oracle. In another dtype they are "PyTorch's own computation in that dtype", the
yardstick of `check_close`.
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


class _FusedSoftmax(torch.autograd.Function):
    """softmax(scores) v as in PyTorch's fused attention: the backward knows the weights by lse, and out as rounded."""

    @staticmethod
    def forward(ctx, scores, lse, v):
        p = (scores - lse[..., None]).exp()
        out = p[..., :-1].to(v.dtype) @ v
        ctx.save_for_backward(p, v, out)
        return out, lse.clone()

    @staticmethod
    def backward(ctx, dout, dlse):
        p, v, out = ctx.saved_tensors
        dp = torch.nn.functional.pad((dout @ v.mT).to(p.dtype), (0, 1))
        delta = (dout.to(p.dtype) * out.to(p.dtype)).sum(-1) - dlse
        return p * (dp - delta[..., None]), None, p[..., :-1].to(v.dtype).mT @ dout


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
):
    """Attention of q (b, s_q, h_q, d), k (b, s_k, h_kv, d), v (b, s_k, h_kv, d_v), every step in the dtype of q.

    Only the softmax and the logsumexp work in float32 or better inside, as PyTorch's own do. `fused` takes the gradient
    of the softmax by hand, as PyTorch's fused attention does in a low precision; the oracle leaves all to autograd.
    Returns out (b, s_q, h_q, d_v) and lse (b, h_q, s_q).
    """
    batch, seqlen_q, heads_q, head_dim = q.shape
    seqlen_k, heads_kv = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = head_dim**-0.5 if scale is None else scale

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads_q // heads_kv, dim=1) for x in (k, v))
    scores = (q @ k.mT) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)

    seen = visible(seqlen_q, seqlen_k, causal=causal, window=window, sink_tokens=sink_tokens, device=q.device)
    scores = scores.to(wide).masked_fill(~seen, -INFINITY)
    # The sink is one more column, which has no value; without sinks it weighs nothing.
    sink = torch.full((heads_q,), -INFINITY, dtype=wide, device=q.device) if sinks is None else sinks.to(wide)
    scores = torch.cat([scores, sink[None, :, None, None].expand(batch, -1, seqlen_q, 1)], dim=-1)
    # A row of nothing but -inf has no softmax: it is computed from zeros, and its results are replaced.
    empty = (scores == -INFINITY).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    lse = scores.logsumexp(-1)
    if fused:
        out, lse = _FusedSoftmax.apply(scores, lse.detach(), v)
    else:
        out = scores.softmax(-1)[..., :-1].to(q.dtype) @ v
    return out.masked_fill(empty, 0.0).transpose(1, 2), lse.masked_fill(empty[..., 0], -INFINITY)


def attention_varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, **options):
    """Attention of packed sequences: `attention` of each sequence by itself.

    Rows in no sequence: out 0, lse -inf. Returns out (total_q, h_q, d_v) and lse (h_q, total_q).
    """
    total_q, heads_q, _ = q.shape
    out = q.new_zeros(total_q, heads_q, v.shape[2])
    lse = torch.full((heads_q, total_q), -INFINITY, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(bounds_q) - 1):
        rows, keys = slice(bounds_q[i], bounds_q[i + 1]), slice(bounds_k[i], bounds_k[i + 1])
        out_i, lse_i = attention(q[None, rows], k[None, keys], v[None, keys], **options)
        out[rows] = out_i[0]
        lse[:, rows] = lse_i[0]
    return out, lse


# The floor of the acceptance rule, in multiples of the largest reference value and as such, for a tensor of 4,096
# elements. It is there for results so small that PyTorch's own error is 0 or nearly so by luck, so it is larger where
# fewer elements are not 0, and smaller where there are more.
RELATIVE_FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
ABSOLUTE_FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-5, torch.bfloat16: 1e-5}


def _floor(dtype, elements, size):
    luck = min(max((4096 / elements) ** 0.5, 0.25), 32.0)
    return luck * (RELATIVE_FLOOR[dtype] * size + ABSOLUTE_FLOOR[dtype])


def check_close(name, result, oracle, yardstick, dtype):
    """The acceptance rule. `oracle` is the float64 answer, `yardstick` PyTorch's own answer in `dtype`.

    The error of `result` may be twice that of `yardstick` plus a floor, in the largest element and in the root mean
    square. Infinities must be the same ones; NaN never passes.
    """
    assert result.shape == oracle.shape, f"{name}: shape {tuple(result.shape)}, not {tuple(oracle.shape)}"
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
    elements = max(int((oracle != 0).sum()), 1)
    floor = _floor(dtype, elements, oracle.abs().max())
    limit = 2 * allowed.max() + 2 * floor
    assert error.max() <= limit, (
        f"{name}: error {error.max():.3e} at {_first(error == error.max())}, allowed {limit:.3e} "
        f"(twice PyTorch's {allowed.max():.3e} + {floor:.1e})"
    )
    rms, rms_allowed, size = (x.square().mean().sqrt() for x in (error, allowed, oracle))
    # Three times: a gradient takes rowsum(dO O) from the rounded output, which PyTorch's plain formula does not.
    limit = 3 * rms_allowed + _floor(dtype, elements, size)
    assert rms <= limit, (
        f"{name}: mean error {rms:.3e}, allowed {limit:.3e} (three times PyTorch's {rms_allowed:.3e} + floor)"
    )


def _first(where):
    return tuple(where.nonzero()[0].tolist())
