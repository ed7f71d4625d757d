"""The gradient of attention: torch.autograd.Functions, and the same code registered for torch.ops.tilewright.

Both end in one operator, ``attention_backward`` or ``attention_varlen_backward``, which computes the scores again from
q, k and the saved lse (Dao et al., FlashAttention, 2022, section 3.1) and differentiates through out and through lse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewright import _dispatch
from tilewright._library import ops


def _save(ctx: Any, inputs: tuple, keywords: dict[str, Any], output: tuple[Tensor, Tensor]) -> None:
    """Keeps what the backward needs; `inputs` are q, k, v, [cu_seqlens_q, cu_seqlens_k,] sinks."""
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])
    ctx.keywords = keywords
    # An output that nothing depends on then has the gradient None, and costs nothing.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, operator: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the saved inputs, None where none is needed."""
    q, k, v, out, lse, *rest = ctx.saved_tensors
    none_for_cu_seqlens = (None,) * (len(rest) - 1)
    if dout is None and dlse is None:
        return None, None, None, *none_for_cu_seqlens, None
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dsinks = operator(dout, dlse, q, k, v, out, lse, *rest, **ctx.keywords)
    grads = (dq, dk, dv, *none_for_cu_seqlens, dsinks)
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))


class Attention(torch.autograd.Function):
    """``Attention.apply(q, k, v, sinks, keywords) -> (out, lse)``

    Args:
        q, k, v, sinks: as in :func:`tilewright.attention`; sinks can be None.
        keywords: the operator's keywords in a dict (causal, window_left, window_right, scale, softcap, sink_tokens,
            deterministic); what is left out has its default.

    Returns:
        out and lse, as from :func:`tilewright.attention`.

    Autocast does not reach inside. Shapes, dtypes and errors are those of :func:`tilewright.attention`.

    Example:
        >>> q, k, v = (torch.randn(1, 16, 4, 32, requires_grad=True) for _ in range(3))
        >>> out, lse = tilewright.autograd.Attention.apply(q, k, v, None, {"causal": True})
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, keywords: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        with _dispatch.below_autocast():
            output = ops.attention.default(q, k, v, sinks, **keywords)
        _save(ctx, (q, k, v, sinks), keywords, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, ops.attention_backward.default, dout, dlse), None


class AttentionVarlen(torch.autograd.Function):
    """``AttentionVarlen.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, keywords) -> (out, lse)``

    As :class:`Attention`, for packed sequences: shapes, dtypes and errors are those of
    :func:`tilewright.attention_varlen`, and `keywords` can also hold max_seqlen_q and max_seqlen_k.

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
        with _dispatch.below_autocast():
            output = ops.attention_varlen.default(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, **keywords)
        _save(ctx, (q, k, v, cu_seqlens_q, cu_seqlens_k, sinks), keywords, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, ops.attention_varlen_backward.default, dout, dlse), None


def _setup_context(ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, keyword_only_inputs, output)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, ops.attention_backward.default, dout, dlse)


def _backward_varlen(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, ops.attention_varlen_backward.default, dout, dlse)


torch.library.register_autograd("tilewright::attention", _backward, setup_context=_setup_context)
torch.library.register_autograd("tilewright::attention_varlen", _backward_varlen, setup_context=_setup_context)


def _no_second_derivative(*_args: Any) -> Any:
    # Were it not registered, a gradient of a gradient would silently lack the part that goes through attention.
    raise RuntimeError("tilewright: attention cannot be differentiated twice; its backward has no gradient")


torch.library.register_autograd("tilewright::attention_backward", _no_second_derivative)
torch.library.register_autograd("tilewright::attention_varlen_backward", _no_second_derivative)
