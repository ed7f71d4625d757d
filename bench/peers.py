"""Ours and the peers, each as a small adapter. A peer that is not installed, or refuses a shape, leaves an empty cell.

An adapter takes (problem, inputs) and returns a Version, or raises Unsupported where the peer has no such feature.
Views that a peer's layout needs are made here, outside of the timing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.problem import Inputs, Problem


class Unsupported(Exception):
    """The peer has no such feature: an empty cell, and no error."""


@dataclass
class Version:
    """``call()``, inside ``context()``, returns out: (batch, seqlen, heads, head_dim_v), packed without the batch; of
    a backward (of_work) the gradients of q, k and v.
    """

    name: str
    call: Callable[[], torch.Tensor | tuple[torch.Tensor, ...]]
    context: Callable[[], AbstractContextManager] = nullcontext


Adapter = Callable[[Problem, Inputs], Version]


def of_work(version: Version, x: Inputs, work: str) -> Version:
    """From a version of the forward that of its backward, or of both together ("training").

    Everyone's backward goes through torch.autograd.grad: of one graph that is built here, or of a new one each time.
    """
    if work == "forward":
        return version
    inputs = (x.q, x.k, x.v)
    if work == "training":
        return replace(version, call=lambda: torch.autograd.grad(version.call(), inputs, x.dout))
    with version.context():
        out = version.call()
    return replace(version, call=lambda: torch.autograd.grad(out, inputs, x.dout, retain_graph=True))


def load_tilewright(library: str | None) -> tuple[str, str | None]:
    """Makes torch.ops.tilewright callable: from ``library``, or by importing the package. Returns what was loaded, and
    the id of the kernels in it where it knows that.
    """
    if library:
        try:
            torch.ops.load_library(library)
        except OSError as error:
            sys.exit(f"bench: --library {library} cannot be loaded: {error}")
        return library, None
    try:
        import tilewright  # --library must work where the package is not installed
    except ImportError as error:
        sys.exit(f"bench: tilewright is not importable ({error}); install it (make test does), or give --library PATH")
    return f"tilewright {tilewright.__version__}", tilewright.build_info()["kernel_id"]


def ours(problem: Problem, x: Inputs, deterministic: bool = False) -> Version:
    """The operators themselves: torch.ops.tilewright."""
    left, right = problem.window or (None, None)
    options = {
        "causal": problem.causal,
        "window_left": left,
        "window_right": right,
        "softcap": problem.softcap,
        "sink_tokens": problem.sink_tokens,
        "deterministic": deterministic,
    }
    ops = torch.ops.tilewright
    if problem.packed:
        cu_q, cu_k = x.cu_seqlens_q, x.cu_seqlens_k
        return Version("ours", lambda: ops.attention_varlen(x.q, x.k, x.v, cu_q, cu_k, None, **options)[0])
    return Version("ours", lambda: ops.attention(x.q, x.k, x.v, None, **options)[0])


def unpacked(problem: Problem, x: Inputs) -> Version:
    """Ours again: a packed batch of equal lengths, seen as the plain operator's tensors."""
    if not problem.packed or len(set(problem.lengths)) != 1:
        raise Unsupported
    batch = len(problem.lengths)
    views = (tensor.unflatten(0, (batch, -1)) for tensor in (x.q, x.k, x.v))
    plain = ours(replace(problem, packed=False), Inputs(*views))
    return Version("unpacked", lambda: plain.call().flatten(0, 1))


@contextmanager
def _deterministic_torch() -> Iterator[None]:
    """FlashAttention 2 in torch then has a deterministic backward. Memory is not filled, which only slows it down."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def deterministic(name: str, adapter: Adapter) -> Adapter:
    """The same with the same bits every run in its backward; cuDNN has no such thing."""
    if name == "ours":
        return partial(ours, deterministic=True)
    if name == "fa4":
        return partial(fa4, deterministic=True)

    def adapt(problem: Problem, x: Inputs) -> Version:
        if name == "cudnn":
            raise Unsupported
        version = adapter(problem, x)

        @contextmanager
        def context() -> Iterator[None]:
            with _deterministic_torch(), version.context():
                yield

        return replace(version, context=context)

    return adapt


def _sdpa(problem: Problem, x: Inputs, name: str, backend: SDPBackend | None) -> Version:
    square = all(length_q == length_k for length_q, length_k in problem.lengths)
    plain = not (problem.packed or problem.window or problem.softcap or problem.sink_tokens)
    if not plain or (problem.causal and not square):
        raise Unsupported
    q, k, v = (tensor.transpose(1, 2) for tensor in (x.q, x.k, x.v))
    gqa = problem.heads_q != problem.heads_kv
    return Version(
        name,
        lambda: scaled_dot_product_attention(q, k, v, is_causal=problem.causal, enable_gqa=gqa).transpose(1, 2),
        (lambda: sdpa_kernel(backend)) if backend is not None else nullcontext,
    )


def torch_cpu(problem: Problem, x: Inputs) -> Version:
    """PyTorch's own attention, whatever it picks: the peer on a CPU."""
    return _sdpa(problem, x, "torch", None)


def cudnn(problem: Problem, x: Inputs) -> Version:
    """cuDNN as torch ships it."""
    return _sdpa(problem, x, "cudnn", SDPBackend.CUDNN_ATTENTION)


def fa2(problem: Problem, x: Inputs) -> Version:
    """FlashAttention 2 as torch ships it; windows and packed batches only its operator has, not the public function."""
    if problem.sink_tokens or problem.softcap or problem.head_dim != problem.head_dim_v:
        raise Unsupported
    if not (problem.packed or problem.window):
        return _sdpa(problem, x, "fa2", SDPBackend.FLASH_ATTENTION)
    left, right = problem.bounds()
    limits = {} if problem.window is None else {"window_size_left": _or(left, -1), "window_size_right": _or(right, -1)}
    lengths = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
    run = torch.ops.aten._flash_attention_forward
    return Version("fa2", lambda: run(x.q, x.k, x.v, *lengths, 0.0, problem.causal, False, **limits)[0])


def fa3(problem: Problem, x: Inputs) -> Version:
    """FlashAttention 3, from the wheel fa3-fwd: no backward, no windows, no fp16 in it. See fa3_backward.py."""
    fa = _fa3_module()
    if problem.window or problem.sink_tokens or x.q.dtype != torch.bfloat16:
        raise Unsupported
    options = {"causal": problem.causal, "softcap": problem.softcap}
    if problem.packed:
        lengths = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
        return Version("fa3", lambda: _first(fa.flash_attn_varlen_func(x.q, x.k, x.v, *lengths, **options)))
    return Version("fa3", lambda: _first(fa.flash_attn_func(x.q, x.k, x.v, **options)))


def fa4(problem: Problem, x: Inputs, deterministic: bool = False) -> Version:
    """FlashAttention 4 (flash_attn.cute), which compiles a kernel at its first call."""
    fa = importlib.import_module("flash_attn.cute")
    if problem.sink_tokens:
        raise Unsupported
    options = {"causal": problem.causal, "softcap": problem.softcap}
    if deterministic:
        options["deterministic"] = True
    if problem.window is not None:
        options |= {"causal": False, "window_size": problem.bounds()}
    if problem.packed:
        options |= {
            "cu_seqlens_q": x.cu_seqlens_q,
            "cu_seqlens_k": x.cu_seqlens_k,
            "max_seqlen_q": x.max_seqlen_q,
            "max_seqlen_k": x.max_seqlen_k,
        }
        return Version("fa4", lambda: _first(fa.flash_attn_varlen_func(x.q, x.k, x.v, **options)))
    return Version("fa4", lambda: _first(fa.flash_attn_func(x.q, x.k, x.v, **options)))


PEERS: dict[str, Adapter] = {"cudnn": cudnn, "fa2": fa2, "fa3": fa3, "fa4": fa4, "torch": torch_cpu}
# Columns that are ours on other terms, and so no peers.
OURS_TOO = ("unpacked", "any order")
PACKAGES = {"fa3": "fa3-fwd", "fa4": "flash-attn-4"}


def available(names: list[str]) -> tuple[dict[str, Adapter], dict[str, str]]:
    """The named peers that can be imported here, and for the others why not."""
    found, missing = {}, {}
    for name in names:
        try:
            if name == "fa3":
                _fa3_module()
            elif name == "fa4":
                importlib.import_module("flash_attn.cute")
            found[name] = PEERS[name]
        except Exception as error:  # a peer's import can fail in any way: a missing part, a wrong CUDA, a lost symbol
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


def peer_version(name: str) -> str:
    """The version of a peer's package; of those inside torch, torch's."""
    if name == "cudnn":
        return str(torch.backends.cudnn.version())
    return importlib.metadata.version(PACKAGES[name]) if name in PACKAGES else f"torch {torch.__version__}"


def _fa3_module():
    # The wheel's interface imports its configuration under the name it had before it was packaged.
    sys.modules.setdefault("flash_attn_config", importlib.import_module("fa3_fwd_config"))
    return importlib.import_module("fa3_fwd_interface")


def _first(result):
    return result[0] if isinstance(result, tuple) else result


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
