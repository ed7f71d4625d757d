"""Fake kernels: the operators in shapes alone, for torch.compile, torch.export and meta tensors.

The checks are those of csrc/ops/check.cpp, which also sees what shapes do not show.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright import _library  # noqa: F401  (the operators must be there)


def _check(condition: bool | torch.SymBool, message: str) -> None:
    torch._check_value(condition, lambda: message)


def _check_rank(name: str, tensor: Tensor, dims: str) -> None:
    rank = dims.count(",") + 1
    _check(
        tensor.dim() == rank, f"{name} must have rank {rank} {dims}, got rank {tensor.dim()} with shape {tensor.shape}"
    )


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, rows_q: str, rows_k: str) -> torch.dtype:
    """Checks what all operators have in common, and returns lse's dtype."""
    _check_rank("q", q, f"({rows_q}, heads_q, head_dim)")
    _check_rank("k", k, f"({rows_k}, heads_kv, head_dim)")
    _check_rank("v", v, f"({rows_k}, heads_kv, head_dim_v)")
    dtypes = [torch.bfloat16, torch.float16]
    if q.device.type != "cuda":
        dtypes += [torch.float32, torch.float64]
    _check(q.dtype in dtypes, f"q must be one of {dtypes}, got {q.dtype}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check(tensor.dtype == q.dtype, f"{name} must be {q.dtype} like q, got {tensor.dtype}")
        _check(tensor.device == q.device, f"{name} must be on the device of q, {q.device}, got {tensor.device}")
        dim = tensor.shape[-1]
        _check(
            8 <= dim and dim <= 256 and dim % 8 == 0,  # noqa: SIM300  (a chain does not work on SymInt)
            f"{name} must have a head_dim (last dimension) that is a multiple of 8 from 8 to 256, got {dim}",
        )
    _check(k.shape[-1] == q.shape[-1], f"k must have the head_dim of q, {q.shape[-1]}, got {k.shape[-1]}")
    _check(v.shape[-3] == k.shape[-3], f"v must have the number of rows of k, {k.shape[-3]}, got {v.shape[-3]}")
    heads_q, heads_kv = q.shape[-2], k.shape[-2]
    _check(v.shape[-2] == heads_kv, f"v must have the number of heads of k, {heads_kv}, got {v.shape[-2]}")
    _check(
        heads_kv > 0 and heads_q > 0 and heads_q % heads_kv == 0,
        f"k must have a number of heads that divides that of q, {heads_q}, got {heads_kv}",
    )
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if sinks is not None:
        _check(sinks.dim() == 1 and sinks.shape[0] == heads_q, f"sinks must have shape ({heads_q},), got {sinks.shape}")
        _check(sinks.device == q.device, f"sinks must be on the device of q, {q.device}, got {sinks.device}")
        _check(sinks.dtype == lse_dtype, f"sinks must be {lse_dtype}, got {sinks.dtype}")
    return lse_dtype


def _check_plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> torch.dtype:
    lse_dtype = _check_inputs(q, k, v, sinks, "batch, seqlen_q", "batch, seqlen_k")
    for name, tensor in (("k", k), ("v", v)):
        _check(
            tensor.shape[0] == q.shape[0], f"{name} must have the batch size of q, {q.shape[0]}, got {tensor.shape[0]}"
        )
    return lse_dtype


def _check_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, sinks: Tensor | None
) -> torch.dtype:
    lse_dtype = _check_inputs(q, k, v, sinks, "total_q", "total_k")
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check(tensor.dim() == 1, f"{name} must have rank 1 (batch + 1,), got rank {tensor.dim()}")
        _check(tensor.dtype == torch.int32, f"{name} must be int32, got {tensor.dtype}")
        _check(tensor.device == q.device, f"{name} must be on the device of q, {q.device}, got {tensor.device}")
    length_q, length_k = cu_seqlens_q.shape[0], cu_seqlens_k.shape[0]
    _check(length_k == length_q, f"cu_seqlens_k must have the length of cu_seqlens_q, {length_q}, got {length_k}")
    return lse_dtype


@torch.library.register_fake("tilewright::attention")
def _attention(q, k, v, sinks=None, **_keywords):
    lse_dtype = _check_plain(q, k, v, sinks)
    batch, seqlen_q, heads_q, _ = q.shape
    return q.new_empty((batch, seqlen_q, heads_q, v.shape[-1])), q.new_empty(
        (batch, heads_q, seqlen_q), dtype=lse_dtype
    )


@torch.library.register_fake("tilewright::attention_varlen")
def _attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks=None, **_keywords):
    lse_dtype = _check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks)
    total_q, heads_q, _ = q.shape
    return q.new_empty((total_q, heads_q, v.shape[-1])), q.new_empty((heads_q, total_q), dtype=lse_dtype)


def _gradients(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, lse_dtype: torch.dtype) -> tuple[Tensor, ...]:
    dsinks = q.new_empty((0 if sinks is None else sinks.shape[0],), dtype=lse_dtype)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


@torch.library.register_fake("tilewright::attention_backward")
def _attention_backward(dout, dlse, q, k, v, out, lse, sinks=None, **_keywords):
    return _gradients(q, k, v, sinks, _check_plain(q, k, v, sinks))


@torch.library.register_fake("tilewright::attention_varlen_backward")
def _attention_varlen_backward(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, sinks=None, **_keywords):
    return _gradients(q, k, v, sinks, _check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks))
