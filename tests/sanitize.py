"""Every instance of the Hopper forward and every family of the backward, on small shapes, for compute-sanitizer:

    for tool in memcheck synccheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 python tests/sanitize.py
    done
    compute-sanitizer --tool initcheck --error-exitcode 1 python tests/sanitize.py --no-compare

initcheck does not see what bulk copies write, so it would report our outputs when they are read; with --no-compare
nothing is copied back and the backward reads an `out` from the host, and what initcheck reports is what a kernel read
before anything wrote it. The backward of whole heads reads what bulk copies wrote: where it does, it is left out.
With `forward` or `backward` behind it only those calls are made.

The oracle is computed on the CPU, so that nothing but copies and our own kernels runs on the GPU. Packed sequences
stand in NaN. racecheck is of no use here: it reports hazards for raw bulk copies that are none.
"""

import os
import sys

# An allocation each: memcheck then sees what lies past the end of a tensor.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import cases
import tiles
import torch
from tiles import Problem

import tilewright

KERNELS = [name for name in tilewright.build_info()["kernels"] if name.startswith("forward_")]


def compare(problem, dtype):
    (q, k, v), options = problem.make("cpu", dtype)
    moved = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    result = cases.call(q.cuda(), k.cuda(), v.cuda(), **moved)
    torch.cuda.synchronize()
    if "--no-compare" in sys.argv:
        return
    oracle = cases.plain(q.double(), k.double(), v.double(), **cases.in_float64(options))
    cases.check_results([x.cpu() for x in result], oracle, cases.plain(q, k, v, fused=True, **options))


def compare_gradients(problem, dtype, deterministic):
    (q, k, v), options = problem.make("cpu", dtype)
    options["deterministic"] = deterministic
    dout, dlse = cases.into_outputs(q, v)
    if problem.packed:  # rows in no sequence
        dout[: tiles.FIRST], dout[-tiles.TAIL :] = float("nan"), float("nan")
        dlse[:, : tiles.FIRST], dlse[:, -tiles.TAIL :] = float("nan"), float("nan")
    moved = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    if "--no-compare" in sys.argv:
        leaves = [x.cuda().requires_grad_() for x in (q, k, v)]
        out, lse = cases.call(*leaves, **moved)
        out.data.copy_(torch.ones(out.shape, dtype=dtype))
        torch.autograd.grad((out, lse), leaves, (dout.cuda(), dlse.cuda()))
        torch.cuda.synchronize()
        return
    results, grads = cases.run(cases.call, *(x.cuda() for x in (q, k, v, dout, dlse)), **moved)
    torch.cuda.synchronize()
    # The oracle's rows in no sequence take no part in it, so what flows into them must not be NaN.
    dout, dlse = dout.nan_to_num(), dlse.nan_to_num()
    results, grads = [x.cpu() for x in results], {name: x.cpu() for name, x in grads.items()}
    cases.compare_gradients(results, grads, q, k, v, dout, dlse, **options)


def reads_bulk_stores(problem, deterministic):
    tile = problem.backward_tile(tiles.multiprocessors("cuda"), deterministic)
    return (tile["bulk"] and (tile["whole_heads"] or deterministic)) or problem is MANY_HEADS


# More than zeros for dQ's sums are written for before the kernel (kernels/backward/zeros.cuh).
MANY_HEADS = Problem(64, 64, [9] * 101, [130] * 101, False, {}, heads_q=2)


def backward_problems():
    """(problem, deterministic): every kernel for bfloat16, each feature, packed with NaN around it."""
    count = tiles.multiprocessors("cuda")
    window = {"window": (90, 5), "sink_tokens": 3}
    for head_dim, head_dim_v in ((64, 64), (128, 128), (192, 128), (256, 256)):
        for softcap in (0.0, 9.0):
            options = {**window, "softcap": softcap}
            yield Problem(head_dim, head_dim_v, [130, 0, 9, 70], [200, 7, 9, 0], True, options), softcap == 0
        yield Problem(head_dim, head_dim_v, [70], [150], False, {"causal": True}), False
        whole_heads = [100] * count, [200] * count  # two rounds of them
        yield Problem(head_dim, head_dim_v, *whole_heads, False, window), True
    yield Problem(64, 64, [600] * 20, [600] * 20, False, {}), True  # the larger tiles
    yield Problem(64, 64, [70, 1] * 20, [200, 300] * 20, True, window), True
    yield Problem(96, 96, [600] * 20, [600] * 20, False, {}), False
    yield Problem(128, 128, [600] * 20, [600] * 20, False, {}), False
    yield Problem(128, 128, [90] * 3, [4100] * 3, False, {**window, "window": (1090, 5)}), True
    yield Problem(72, 40, [150], [301], False, {"causal": True}), True
    yield Problem(64, 64, [0], [70], False, {}), False
    yield Problem(128, 128, [70], [0], False, {}), True
    yield Problem(64, 64, [5] * 132, [9] * 132, False, {"causal": True}), False
    yield MANY_HEADS, False


def of_each_layout(kernel, element, count):
    """A plain and a packed problem for the kernel, with as many options as the table has for it, small."""
    own = [problem for problem in tiles.problems() if problem.kernel(element, count) == kernel]
    for packed in (False, True):
        layout = [problem for problem in own if problem.packed == packed]
        yield min(layout, key=lambda problem: (-len(problem.options), problem.work))


def others(count):
    """No key at all, more tiles than a fixed order is used for (two rounds), head dimensions far from a tile's."""
    for head_dim, head_dim_v in tiles.head_dims():
        yield Problem(head_dim, head_dim_v, [70], [0], False, {})
        yield Problem(head_dim, head_dim_v, [5] * count, [9] * count, False, {"causal": True})  # 4 rounds: 4 heads
    for head_dim, head_dim_v in ((72, 40), (64, 256)):
        yield Problem(head_dim, head_dim_v, [150], [301], False, {"window": (90, 5), "sink_tokens": 3})


def forward():
    count = tiles.multiprocessors("cuda")
    calls = 0
    for kernel in KERNELS:
        element = kernel.split("_")[1]
        for problem in of_each_layout(kernel, element, count):
            compare(problem, tiles.DTYPES[element])
            calls += 1
        print(f"{kernel}: agrees", flush=True)
    for problem in others(count):
        compare(problem, torch.bfloat16)
        calls += 1
        print(f"{problem}: agrees", flush=True)
    return calls


def backward():
    calls = 0
    for problem, deterministic in backward_problems():
        if "--no-compare" in sys.argv and reads_bulk_stores(problem, deterministic):
            continue
        compare_gradients(problem, torch.bfloat16, deterministic)
        calls += 1
        print(f"backward {problem}: agrees", flush=True)
    compare_gradients(Problem(128, 128, [150], [301], False, {"causal": True}), torch.float16, deterministic=False)
    return calls + 1


def main():
    torch.manual_seed(0)
    parts = [part for part in (forward, backward) if part.__name__ in sys.argv] or [forward, backward]
    calls = sum(part() for part in parts)
    print(f"{calls} calls, kernels {tilewright.build_info()['kernel_id']}")


if __name__ == "__main__":
    main()
