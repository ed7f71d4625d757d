"""Which way a call takes through PyTorch's dispatcher, and the quickest way to take it.

torch.ops.tilewright.* works everywhere, but its registered autograd is Python that runs on every call, even where
nothing needs a gradient. In plain eager mode the public functions go around it, which halves their host time.

What is not public in torch here is what torch's own Python calls in the same place, and saves microseconds. A torch
without the names that are there for speed alone takes slower ways to the same end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch._C import _are_functorch_transforms_active as functorch_is_active
from torch.autograd import forward_ad
from torch.compiler import is_compiling

# AutogradCPU stands for every device's: what a guard excludes is the functionality.
_AUTOGRAD = (
    DispatchKeySet(DispatchKey.AutogradCPU)
    | DispatchKeySet(DispatchKey.AutogradOther)
    | DispatchKeySet(DispatchKey.AutogradNestedTensor)
)
_AUTOGRAD_AND_AUTOCAST = _AUTOGRAD | DispatchKeySet(DispatchKey.AutocastCPU) | DispatchKeySet(DispatchKey.AutocastCUDA)

try:
    from torch._C import _AutoDispatchBelowAutograd as below_autograd
    from torch._C._functorch import unwrap_if_dead

    _QUICK_APPLY = True
except ImportError:
    _QUICK_APPLY = False

    def below_autograd() -> AbstractContextManager[None]:
        """A context in which an operator runs without its registered autograd."""
        return _ExcludeDispatchKeyGuard(_AUTOGRAD)

    def unwrap_if_dead(tensor: Tensor) -> Tensor:
        """``function.apply`` unwraps the tensors itself."""
        return tensor


_PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))


def direct(operator: Any) -> Callable[..., Any]:
    """What calling the operator calls: the same without a Python frame that packs the arguments again. Compilers want
    the operator itself.
    """
    return getattr(operator, "_op", operator)


def quick_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for arguments that have nothing to do with torch.func: what it ends in then.

    So no transform may be active (functorch_is_active), and no tensor may be a wrapper that has outlived one
    (unwrap_if_dead); there are none behind the dispatcher.
    """
    return super(torch.autograd.Function, function).apply if _QUICK_APPLY else function.apply


def _autocast_is_enabled(q: Tensor) -> bool:
    return is_autocast_enabled("cuda") if q.is_cuda else not q.is_cpu or is_autocast_enabled("cpu")


def below_autograd_and_autocast(q: Tensor) -> AbstractContextManager[None]:
    """A context in which an operator runs without its registered autograd, and without autocast, too."""
    # The guard of several keys takes a microsecond more.
    return _ExcludeDispatchKeyGuard(_AUTOGRAD_AND_AUTOCAST) if _autocast_is_enabled(q) else below_autograd()


def takes_operator(q: Tensor) -> bool:
    """Whether something (a compiler, torch.func, autocast, forward mode) needs to see the operator itself."""
    return (
        is_compiling()
        or type(q) not in _PLAIN_TENSORS
        or functorch_is_active()
        or _autocast_is_enabled(q)
        or forward_ad._current_level >= 0
    )


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """There is none: an error, not a result without a tangent."""
    if forward_ad._current_level >= 0:
        for tensor in tensors:
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError("tilewright: attention has no forward-mode derivative (jvp), only a backward")


def needs_grad(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> bool:
    """Whether autograd must record the call."""
    refuse_forward_mode(q, k, v, sinks)
    try:
        return is_grad_enabled() and (
            q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
        )
    except AttributeError:  # torch.ops takes None for a tensor; the operator refuses it by name
        return False
