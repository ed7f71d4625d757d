"""What is not there yet, or not in this build: a clear error where the dispatcher would have a long one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from tilewright._library import build_info


def _raise(message: str) -> Callable[..., NoReturn]:
    def kernel(*_args: Any, **_keywords: Any) -> NoReturn:
        raise NotImplementedError(f"tilewright: {message}")

    return kernel


_no_backward = _raise(
    "the backward of attention is not there for CUDA tensors yet, only for CPU tensors. The forward on CUDA works "
    "under torch.no_grad(), or when no tensor requires a gradient."
)
torch.library.impl("tilewright::attention_backward", "CUDA", _no_backward)
torch.library.impl("tilewright::attention_varlen_backward", "CUDA", _no_backward)

if not build_info()["cuda"]:
    _no_cuda = _raise("got CUDA tensors, but this build has CPU operators only, for it was made without nvcc.")
    torch.library.impl("tilewright::attention", "CUDA", _no_cuda)
    torch.library.impl("tilewright::attention_varlen", "CUDA", _no_cuda)
