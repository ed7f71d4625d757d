"""Which way a call takes through PyTorch's dispatcher.

torch.ops.tilewright.* works everywhere, but its registered autograd is Python that runs on every call, even where
nothing needs a gradient. In plain eager mode the public functions go around it, which halves their host time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _are_functorch_transforms_active, _ExcludeDispatchKeyGuard
from torch.autograd import forward_ad

_AUTOGRAD = (
    DispatchKeySet(DispatchKey.AutogradCPU)
    | DispatchKeySet(DispatchKey.AutogradCUDA)
    | DispatchKeySet(DispatchKey.ADInplaceOrView)
)
_AUTOGRAD_AND_AUTOCAST = _AUTOGRAD | DispatchKeySet(DispatchKey.AutocastCPU) | DispatchKeySet(DispatchKey.AutocastCUDA)


def below_autograd() -> _ExcludeDispatchKeyGuard:
    """A context in which an operator runs without its registered autograd."""
    return _ExcludeDispatchKeyGuard(_AUTOGRAD)


def below_autocast() -> _ExcludeDispatchKeyGuard:
    """A context in which an operator runs without its registered autograd and autocast."""
    return _ExcludeDispatchKeyGuard(_AUTOGRAD_AND_AUTOCAST)


def takes_operator(q: Tensor) -> bool:
    """Whether something (a compiler, torch.func, autocast) needs to see the operator itself."""
    device_type = q.device.type
    return (
        torch.compiler.is_compiling()
        or type(q) not in (Tensor, torch.nn.Parameter)
        or device_type not in ("cpu", "cuda")
        or torch.is_autocast_enabled(device_type)
        or _are_functorch_transforms_active()
    )


def needs_grad(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> bool:
    """Whether autograd must see the call: to record it, or to refuse forward mode, of which there is none."""
    return (
        torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad))
    ) or forward_ad._current_level >= 0
