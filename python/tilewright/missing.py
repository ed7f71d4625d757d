"""What is not in this build: a clear error where the dispatcher would have a long one."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from tilewright._library import build_info


def _no_cuda(*_args: Any, **_keywords: Any) -> NoReturn:
    raise NotImplementedError(
        "tilewright: got CUDA tensors, but this build has CPU operators only, for it was made without nvcc."
    )


if not build_info()["cuda"]:
    for _operator in ("attention", "attention_varlen"):
        torch.library.impl(f"tilewright::{_operator}", "CUDA", _no_cuda)
        torch.library.impl(f"tilewright::{_operator}_backward", "CUDA", _no_cuda)
