"""The ``host`` set: microseconds of the host for one eager call, with and without a gradient asked for.

Tiny tensors; bursts of calls on the host clock, with a synchronisation between bursts that is not timed. A burst is
shorter than the queue of launches, so the host never waits for the device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from bench import peers
from bench.problem import Inputs, Problem, make_inputs

CALLS, BURSTS = 200, 20
PLAIN = Problem(((64, 64),), 2, 2, 64, 64, causal=True)
PACKED = Problem(((64, 64),), 2, 2, 64, 64, causal=True, packed=True)


def run(args, name: str, dtype: torch.dtype, adapters: dict[str, peers.Adapter], timer) -> dict:
    """Times each way of calling; returns the entry to save."""
    print(f"\n{name}: one eager call, {CALLS} in a burst, median of {BURSTS} bursts\n{'call':<48}{'us':>8}{'+grad':>8}")
    rows = []
    others = ((name, PLAIN, peer) for name, peer in adapters.items() if name != "ours")
    for label, problem, adapter in [*_our_calls(args.library), *others]:
        times = {}
        for grad in (False, True):
            x = make_inputs(problem, dtype, args.device)
            for tensor in (x.q, x.k, x.v):
                tensor.requires_grad_(grad)
            try:
                version = adapter(problem, x)
                with version.context(), nullcontext() if grad else torch.no_grad():
                    times[grad] = round(_microseconds(version.call, timer.cuda), 2)
            except Exception as error:  # a peer without a backward refuses a gradient with any exception
                times[grad] = None
                print(f"  {label}{' with a gradient' if grad else ''}: {type(error).__name__}: {str(error)[:160]}")
        rows.append({"call": label, "host_us": times[False], "host_us_grad": times[True]})
        shown = ["" if value is None else f"{value:.1f}" for value in (times[False], times[True])]
        print(f"{label:<48}{shown[0]:>8}{shown[1]:>8}", flush=True)
    return {"rows": rows}


def _our_calls(library: str | None) -> list[tuple[str, Problem, peers.Adapter]]:
    operators = [
        ("torch.ops.tilewright.attention", PLAIN, peers.ours),
        ("torch.ops.tilewright.attention_varlen", PACKED, peers.ours),
    ]
    if library:
        return operators
    import tilewright  # not there when a library is loaded in its place

    def plain(_: Problem, x: Inputs) -> peers.Version:
        return peers.Version("ours", lambda: tilewright.attention(x.q, x.k, x.v, causal=True))

    def packed(_: Problem, x: Inputs) -> peers.Version:
        lengths = {"cu_seqlens_q": x.cu_seqlens_q, "cu_seqlens_k": x.cu_seqlens_k}
        return peers.Version("ours", lambda: tilewright.attention_varlen(x.q, x.k, x.v, **lengths, causal=True))

    functions = [("tilewright.attention", PLAIN, plain), ("tilewright.attention_varlen", PACKED, packed)]
    return functions + operators


def _microseconds(call: Callable, cuda: bool) -> float:
    samples = []
    for burst in range(BURSTS + 3):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        elapsed = time.perf_counter() - start
        if cuda:
            torch.cuda.synchronize()
        if burst >= 3:  # the first three warm up
            samples.append(elapsed / CALLS * 1e6)
    return statistics.median(samples)
