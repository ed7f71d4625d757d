"""Which way a call takes through PyTorch's dispatcher, and the quickest way to take it.

torch.ops.tilewright.* works everywhere, but its registered autograd is Python that runs on every call, even where
nothing needs a gradient. In plain eager mode the public functions go around it, which halves their host time.

What is not public in torch here is what torch's own Python calls in the same place, and saves microseconds. A torch
without the two names that are there for speed alone takes the public way, always (QUICK).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch._C import _are_functorch_transforms_active as functorch_is_active
from torch.autograd import forward_ad
from torch.compiler import is_compiling

try:
    from torch._C import _AutoDispatchBelowAutograd as below_autograd
    from torch._C._functorch import unwrap_if_dead

    QUICK = True
except ImportError:
    below_autograd, QUICK = nullcontext, False

    def unwrap_if_dead(tensor: Tensor) -> Tensor:
        """Never called: every call then takes the operator, behind which there are no wrappers."""
        return tensor


_PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))

# AutogradCPU stands for every device's: what a guard excludes is the functionality.
_AUTOGRAD_AND_AUTOCAST = (
    DispatchKeySet(DispatchKey.AutogradCPU)
    | DispatchKeySet(DispatchKey.AutogradOther)
    | DispatchKeySet(DispatchKey.AutogradNestedTensor)
    | DispatchKeySet(DispatchKey.AutocastCPU)
    | DispatchKeySet(DispatchKey.AutocastCUDA)
)


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
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


def _autocast_is_enabled(q: Tensor) -> bool:
    return is_autocast_enabled("cuda") if q.is_cuda else not q.is_cpu or is_autocast_enabled("cpu")


def below_autograd_and_autocast(q: Tensor) -> AbstractContextManager[None]:
    """A context in which an operator runs without its registered autograd, and without autocast, too."""
    # The guard of several keys takes a microsecond more.
    return _ExcludeDispatchKeyGuard(_AUTOGRAD_AND_AUTOCAST) if _autocast_is_enabled(q) else below_autograd()


def takes_operator(q: Tensor) -> bool:
    """Whether something (a compiler, torch.func, autocast, forward mode) needs to see the operator itself."""
    return (
        not QUICK
        or is_compiling()
        or type(q) not in _PLAIN_TENSORS
        or functorch_is_active()
        or _autocast_is_enabled(q)
        or forward_ad._current_level >= 0
    )


def needs_grad(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> bool:
    """Whether autograd must record the call. There is no forward mode: that is an error, not a missing tangent."""
    if forward_ad._current_level >= 0:
        for tensor in (q, k, v, sinks):
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError("tilewright: attention has no forward-mode derivative (jvp), only a backward")
    try:
        return is_grad_enabled() and (
            q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
        )
    except AttributeError:  # torch.ops takes None for a tensor; the operator refuses it by name
        return False
