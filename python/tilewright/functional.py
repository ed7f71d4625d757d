"""The public functions: they sort the arguments and call the operators of torch.ops.tilewright, which check them."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling

from tilewright._dispatch import below_autograd, direct, needs_grad, quick_apply, takes_operator, unwrap_if_dead
from tilewright._library import ops
from tilewright.autograd import Attention, AttentionVarlen

_attention = direct(ops.attention.default)
_attention_varlen = direct(ops.attention_varlen.default)
_apply = quick_apply(Attention)
_apply_varlen = quick_apply(AttentionVarlen)

_INTEGERS = (int, torch.SymInt)
_NUMBERS = (float, int, torch.SymFloat, torch.SymInt)


def _refuse(**tensors: Any) -> NoReturn:
    """Says which of the arguments is no tensor."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    raise AssertionError(f"{', '.join(tensors)} are all tensors")


def _typed(name: str, value: Any, types: tuple[type, ...], wanted: str) -> Any:
    if not isinstance(value, types):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:  # torch takes no other
        raise ValueError(f"{name} must be from -2**63 to 2**63 - 1, got {value}")
    return value


def _window(window: Any) -> tuple[int | None, int | None]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be None or a pair (left, right), got {window!r}")
    for bound in window:
        if bound is None:
            continue
        if not isinstance(bound, _INTEGERS):
            raise TypeError(f"window must hold integers or None, got {window!r}")
        if bound < 0 or (isinstance(bound, int) and bound >= 2**63):
            raise ValueError(f"window must hold integers that are 0 or above and below 2**63, or None, got {window!r}")
    return window[0], window[1]


def _keywords(causal, window, scale, softcap, sink_tokens, deterministic) -> dict[str, Any]:
    """The operator's keywords, without those that have their default: each one costs the dispatcher time."""
    keywords: dict[str, Any] = {}
    if causal is not False:
        keywords["causal"] = _typed("causal", causal, (bool,), "a bool")
    if window is not None:
        keywords["window_left"], keywords["window_right"] = _window(window)
    if scale is not None:
        keywords["scale"] = _typed("scale", scale, _NUMBERS, "a number or None")
    if not (isinstance(softcap, float) and softcap == 0.0):
        keywords["softcap"] = _typed("softcap", softcap, _NUMBERS, "a number")
    if not (isinstance(sink_tokens, int) and sink_tokens == 0):
        keywords["sink_tokens"] = _typed("sink_tokens", sink_tokens, _INTEGERS, "an integer")
    if deterministic is not False:
        keywords["deterministic"] = _typed("deterministic", deterministic, (bool,), "a bool")
    return keywords


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    sink_tokens: int = 0,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, softmax(scale · Q Kᵀ) V, differentiable in q, k, v and sinks.

    Query i of seqlen_q stands at position i + seqlen_k - seqlen_q: the last query is aligned with the last key. A query
    that sees no key has out 0 and lse -inf (with `sinks`: the sink), and gradients of 0.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim). float64, float32, bfloat16 or float16; on CUDA bfloat16 or float16.
            head_dim is a multiple of 8 up to 256. The last dimension is contiguous, the other strides are free. (On
            CUDA, strides or a start that are no multiple of 16 bytes, and expanded dimensions, cost a copy.)
        k: (batch, seqlen_k, heads_kv, head_dim), like q; heads_q is a multiple of heads_kv.
        v: (batch, seqlen_k, heads_kv, head_dim_v), like q; head_dim_v is a multiple of 8 up to 256.
        causal: a query sees no key after its position; the same as window=(None, 0), and joins any other window.
        window: (left, right): the keys from position - left to position + right are visible, both ends included; None
            is unbounded.
        scale: of the scores; None is 1/√head_dim.
        softcap: c turns every scaled score s into c·tanh(s/c), before the mask; 0 is off.
        sinks: (heads_q,), contiguous, float32 (float64 with float64 q): one logit a head that joins the softmax's
            denominator and has no value. It is not scaled, and counted in lse.
        sink_tokens: the first keys that stay visible on the left of the window.
        deterministic: the gradients have the same bits every run. (The forward always has them, and on the CPU so has
            the backward. Otherwise a GPU's blocks add to dq in the order they come in.)
        return_lse: also return the logarithm of the softmax's denominator.

    Returns:
        out, (batch, seqlen_q, heads_q, head_dim_v), of q's dtype; with `return_lse` the pair (out, lse), lse
        (batch, heads_q, seqlen_q) in float32 (float64 with float64 q), natural logarithm, differentiable too.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range; the text names it.
        NotImplementedError, RuntimeError: a derivative that is not there: forward mode, torch.func, a second one.

    The gradient exists for every option above, of each of q, k, v and sinks that asks for it, through out and lse both;
    gradients are contiguous, and those of keys and values are summed over the heads that share them. Kept for it are q,
    k, v, out, lse and sinks. The backward computes the scores again and needs, beside the gradients, at most float32
    sums of dq, of dk and dv where several query heads share few key heads, and two floats a query and head: nothing of
    size seqlen_q × seqlen_k. It works under autocast, torch.compile, activation checkpointing, and the capture of a
    CUDA graph.

    Example:
        >>> q = torch.randn(2, 128, 8, 64, requires_grad=True)
        >>> k, v = torch.randn(2, 128, 2, 64), torch.randn(2, 128, 2, 64)
        >>> out = tilewright.attention(q, k, v, causal=True)
        >>> out.shape
        torch.Size([2, 128, 8, 64])
        >>> out.sum().backward()
        >>> q.grad.shape
        torch.Size([2, 128, 8, 64])

    The method is FlashAttention (Dao et al., 2022; Shah et al., FlashAttention-3, 2024): tiles with an online softmax
    (Milakov & Gimelshein, 2018), and a backward that computes them again (Dao et al., 2022, section 3.1). sinks: Xiao
    et al., Efficient Streaming Language Models with Attention Sinks, 2023, as learned logits in gpt-oss; softcap:
    Gemma 2, 2024.
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        _refuse(q=q, k=k, v=v)
    if not (sinks is None or isinstance(sinks, Tensor)):
        _refuse(sinks=sinks)
    keywords = _keywords(causal, window, scale, softcap, sink_tokens, deterministic)
    _typed("return_lse", return_lse, (bool,), "a bool")
    if takes_operator(q):
        out, lse = ops.attention.default(q, k, v, sinks, **keywords)
    elif needs_grad(q, k, v, sinks):
        q, k, v = unwrap_if_dead(q), unwrap_if_dead(k), unwrap_if_dead(v)
        out, lse = _apply(q, k, v, None if sinks is None else unwrap_if_dead(sinks), keywords)
    else:
        with below_autograd():
            out, lse = _attention(q, k, v, sinks, **keywords)
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    sink_tokens: int = 0,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` over sequences of different lengths, packed one after another.

    Sequence b has the queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1, and the keys likewise. Its result depends on
    nothing outside it, even when that holds NaN. Rows in no sequence have out 0, lse -inf and gradients of 0. The
    lengths are never read back from the device.

    Args:
        q: (total_q, heads_q, head_dim), dtypes and strides as in :func:`attention`.
        k: (total_k, heads_kv, head_dim).
        v: (total_k, heads_kv, head_dim_v).
        cu_seqlens_q: (batch + 1,), int32, contiguous, on q's device: where each sequence of queries starts and the last
            one ends.
        cu_seqlens_k: (batch + 1,), the same for the keys.
        max_seqlen_q: the longest sequence of queries, a hint that is never needed and changes no result.
        max_seqlen_k: the longest sequence of keys, likewise.
        causal, window, scale, softcap, sinks, sink_tokens, deterministic, return_lse: as in :func:`attention`.

    Returns:
        out, (total_q, heads_q, head_dim_v); with `return_lse` the pair (out, lse), lse (heads_q, total_q).

    Raises:
        TypeError, ValueError: as in :func:`attention`. On the CPU also when cu_seqlens decrease, are negative or pass
            the total; on CUDA, where they cannot be looked into, such values are clamped to the tensors.
        NotImplementedError, RuntimeError: as in :func:`attention`.

    The gradient is that of :func:`attention`, memory too; a sequence's gradients depend on nothing outside it, except
    that of sinks, which all sequences share.

    Example:
        >>> q = k = v = torch.randn(10, 8, 64)  # a sequence of 4 and one of 6
        >>> cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)
        >>> tilewright.attention_varlen(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=True).shape
        torch.Size([10, 8, 64])

    The method is that of :func:`attention`; the packed layout is FlashAttention's (Dao, 2023).
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        _refuse(q=q, k=k, v=v)
    if not (isinstance(cu_seqlens_q, Tensor) and isinstance(cu_seqlens_k, Tensor)):
        _refuse(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if not (sinks is None or isinstance(sinks, Tensor)):
        _refuse(sinks=sinks)
    keywords = _keywords(causal, window, scale, softcap, sink_tokens, deterministic)
    _typed("return_lse", return_lse, (bool,), "a bool")
    for name, hint in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if hint is not None:
            _typed(name, hint, _INTEGERS, "an integer or None")
            if not is_compiling():  # no kernel reads it, and a graph would be compiled for each
                keywords[name] = hint
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k, sinks)
    if takes_operator(q):
        out, lse = ops.attention_varlen.default(*tensors, **keywords)
    elif needs_grad(q, k, v, sinks):
        tensors = [None if tensor is None else unwrap_if_dead(tensor) for tensor in tensors]
        out, lse = _apply_varlen(*tensors, keywords)
    else:
        with below_autograd():
            out, lse = _attention_varlen(*tensors, **keywords)
    return (out, lse) if return_lse else out
