"""The gradient of attention: torch.autograd.Functions, and the same code registered for torch.ops.tilewright.

Both end in one operator, ``attention_backward`` or ``attention_varlen_backward``, which computes the scores again from
q, k and the saved lse (Dao et al., FlashAttention, 2022, section 3.1) and differentiates through out and through lse:
with delta = rowsum(dout ∘ out) - dlse the gradient of a score is P (dout vᵀ - delta). On CUDA `deterministic` fixes the
order in which dq is summed. docs/backward.md has the algorithm and its memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewright import _dispatch
from tilewright._dispatch import (
    below_autograd,
    below_autograd_and_autocast,
    functorch_is_active,
    is_compiling,
    needs_grad,
    refuse_forward_mode,
)
from tilewright._library import ops

_attention = _dispatch.direct(ops.attention.default)
_attention_varlen = _dispatch.direct(ops.attention_varlen.default)


def _gradients(ctx: Any, operator: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs, None where none is needed, and None for the keywords."""
    q, k, v, out, lse, *rest = ctx.saved_tensors
    none_for_cu_seqlens = (None,) * (len(rest) - 1)
    if dout is None and dlse is None:
        return (None,) * len(ctx.needs_input_grad)
    refuse_forward_mode(dout, dlse)
    if dout is None:
        dout = torch.zeros_like(out)
    if is_compiling() or torch.is_grad_enabled():  # with create_graph=True
        dq, dk, dv, dsinks = operator(dout, dlse, q, k, v, out, lse, *rest, **ctx.keywords)
    else:
        with below_autograd():
            dq, dk, dv, dsinks = operator(dout, dlse, q, k, v, out, lse, *rest, **ctx.keywords)
    grads = (dq, dk, dv, *none_for_cu_seqlens, dsinks, None)
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=True))


class Attention(torch.autograd.Function):
    """``Attention.apply(q, k, v, sinks, keywords) -> (out, lse)``

    Args:
        q, k, v, sinks: as in :func:`tilewright.attention`; sinks can be None.
        keywords: the operator's keywords in a dict (causal, window_left, window_right, scale, softcap, sink_tokens,
            deterministic); what is left out has its default.

    Returns:
        out and lse, as from :func:`tilewright.attention`; the gradients of q, k, v and sinks that are asked for.

    For eager mode, and autocast does not reach inside. Shapes, dtypes and values are checked as by
    :func:`tilewright.attention`; whether arguments are tensors, and keywords of the right type, is left to torch.

    Example:
        >>> q, k, v = (torch.randn(1, 16, 4, 32, requires_grad=True) for _ in range(3))
        >>> out, lse = tilewright.autograd.Attention.apply(q, k, v, None, {"causal": True})
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, keywords: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        with below_autograd_and_autocast(q):
            out, lse = _attention(q, k, v, sinks, **keywords)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.keywords = dict(keywords)  # the caller's may change
        # An output that nothing depends on then has the gradient None, and costs nothing.
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, ops.attention_backward.default, dout, dlse)


class AttentionVarlen(torch.autograd.Function):
    """``AttentionVarlen.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, keywords) -> (out, lse)``

    As :class:`Attention`, for the packed sequences of :func:`tilewright.attention_varlen`; `keywords` can also hold
    max_seqlen_q and max_seqlen_k.

    Example:
        >>> q, k, v = (torch.randn(10, 4, 32, requires_grad=True) for _ in range(3))
        >>> cu = torch.tensor([0, 4, 10], dtype=torch.int32)
        >>> out, lse = tilewright.autograd.AttentionVarlen.apply(q, k, v, cu, cu, None, {"causal": True})
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        sinks: Tensor | None,
        keywords: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        with below_autograd_and_autocast(q):
            out, lse = _attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, **keywords)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, sinks)
        ctx.keywords = dict(keywords)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, ops.attention_varlen_backward.default, dout, dlse)


# For torch.ops the same Functions are registered by hand: what torch.library.register_autograd registers fills in the
# schema's defaults in Python on every call, which takes 50 µs, and drops the tangents of forward mode.

_apply = _dispatch.quick_apply(Attention)
_apply_varlen = _dispatch.quick_apply(AttentionVarlen)


def _autograd(q, k, v, sinks=None, **keywords):
    if needs_grad(q, k, v, sinks):
        apply = Attention.apply if functorch_is_active() else _apply
        return apply(q, k, v, sinks, keywords)
    with below_autograd():
        return _attention(q, k, v, sinks, **keywords)


def _autograd_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks=None, **keywords):
    if needs_grad(q, k, v, sinks):
        apply = AttentionVarlen.apply if functorch_is_active() else _apply_varlen
        return apply(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, keywords)
    with below_autograd():
        return _attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, **keywords)


class _Gradient(torch.autograd.Function):
    """``_Gradient.apply(operator, keywords, *tensors)``: a gradient, which has none itself."""

    @staticmethod
    def forward(ctx: Any, operator: Any, keywords: dict[str, Any], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        with below_autograd():
            return tuple(operator(*tensors, **keywords))

    @staticmethod
    def backward(ctx: Any, *_grads: Any) -> Any:
        # Were it not there, a gradient of a gradient would silently lack the part that goes through attention.
        raise RuntimeError("tilewright: attention cannot be differentiated twice; its backward has no gradient")


def _autograd_of_gradient(operator: Any) -> Any:
    def autograd(*tensors: Tensor | None, **keywords: Any) -> tuple[Tensor, ...]:
        refuse_forward_mode(*tensors)
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            return _Gradient.apply(operator, keywords, *tensors)
        with below_autograd():
            return operator(*tensors, **keywords)

    return autograd


_library = torch.library.Library("tilewright", "IMPL")
_library.impl("attention", _autograd, "Autograd")
_library.impl("attention_varlen", _autograd_varlen, "Autograd")
for _name in ("attention_backward", "attention_varlen_backward"):
    _library.impl(_name, _autograd_of_gradient(getattr(ops, _name).default), "Autograd")
