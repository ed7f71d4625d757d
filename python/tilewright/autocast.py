"""Autocast: q, k and v are cast to its dtype; sinks stays in float32, as the operators want it.

torch.library.register_autocast would cast every floating-point argument, sinks too, and takes no keywords.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard

from tilewright._library import ops

_library = torch.library.Library("tilewright", "IMPL")


def _kernel(operator: Any, device_type: str, key: DispatchKey) -> Callable[..., Any]:
    keyset = DispatchKeySet(key)

    def cast(name: str, value: Any) -> Any:
        # As autocast does everywhere: float64 is left alone, and so is what lies on another device.
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
            return value
        if value.device.type != device_type:
            return value
        return value.to(torch.float32 if name == "sinks" else torch.get_autocast_dtype(device_type))

    names = [argument.name for argument in operator._schema.arguments]

    def kernel(*args: Any, **keywords: Any) -> Any:
        with _ExcludeDispatchKeyGuard(keyset):
            return operator(*(cast(name, value) for name, value in zip(names, args, strict=False)), **keywords)

    return kernel


for _name in ("attention", "attention_varlen"):
    _operator = getattr(ops, _name).default
    _library.impl(_name, _kernel(_operator, "cpu", DispatchKey.AutocastCPU), "AutocastCPU")
    _library.impl(_name, _kernel(_operator, "cuda", DispatchKey.AutocastCUDA), "AutocastCUDA")
