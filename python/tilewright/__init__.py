"""Exact attention for PyTorch, hand-written in CUDA.

>>> import torch, tilewright
>>> q, k, v = (torch.randn(1, 128, 8, 64) for _ in range(3))  # (batch, seqlen, heads, head_dim)
>>> tilewright.attention(q, k, v, causal=True).shape
torch.Size([1, 128, 8, 64])

The operators are also there unwrapped, as torch.ops.tilewright.*, and their torch.autograd.Functions in
tilewright.autograd.
"""

from tilewright import autocast as _autocast  # noqa: F401  (registers)
from tilewright import autograd
from tilewright import fake as _fake  # noqa: F401  (registers)
from tilewright import missing as _missing  # noqa: F401  (registers)
from tilewright._library import build_info
from tilewright.functional import attention, attention_varlen

__version__ = "0.1.0"

__all__ = ["__version__", "attention", "attention_varlen", "autograd", "build_info"]
