"""Every Hopper kernel once, on small shapes, for compute-sanitizer:

    for tool in memcheck synccheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 python tests/sanitize.py
    done
    compute-sanitizer --tool initcheck --error-exitcode 1 python tests/sanitize.py --no-compare

initcheck does not see what bulk copies write, so it would report our outputs when they are copied to the host; with
--no-compare nothing is copied back, and what it reports is what a kernel read before anything wrote it.

The results are compared loosely with the oracle, on the CPU, so that nothing but copies and our own kernels runs on the
GPU. racecheck is of no use here: it reports hazards for raw bulk copies that are none.
"""

import os
import sys

# An allocation each: memcheck then sees what lies past the end of a tensor.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import cases
import torch

import tilewright

HEAD_DIMS = [(64, 64), (128, 128), (192, 128), (256, 256), (72, 40), (64, 256)]
DTYPES = [torch.bfloat16, torch.float16]


def compare(q, k, v, **options):
    expected = cases.plain(q.double(), k.double(), v.double(), **cases.in_float64(options))
    moved = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    result = cases.call(q.cuda(), k.cuda(), v.cuda(), **moved)
    torch.cuda.synchronize()
    if "--no-compare" in sys.argv:
        return
    for ours, right in zip(result, expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), right, rtol=3e-2, atol=3e-2)


def main():
    torch.manual_seed(0)
    count = 0
    for dtype in DTYPES:
        for head_dim, head_dim_v in HEAD_DIMS:
            shape = {"heads_q": 4, "heads_kv": 2, "head_dim": head_dim, "head_dim_v": head_dim_v}
            sinks = cases.make_sinks(4, "cpu", dtype)
            all_options = ({"causal": True}, {"window": (90, 5), "sink_tokens": 3, "softcap": 9.0, "sinks": sinks})
            for options in all_options:
                compare(*cases.make("cpu", dtype, batch=1, seqlen_q=150, seqlen_k=301, **shape), **options)
                q, k, v, cu_seqlens = cases.make_packed(
                    "cpu", dtype, [130, 0, 9], [200, 7, 9], first=3, tail=5, **shape
                )
                compare(q, k, v, **cu_seqlens, **options)
                count += 2
            compare(*cases.make("cpu", dtype, batch=1, seqlen_q=70, seqlen_k=0, **shape))
            print(f"{dtype} {head_dim}/{head_dim_v}: agrees", flush=True)
    print(f"{count} calls, kernels {tilewright.build_info()['kernel_id']}")


if __name__ == "__main__":
    main()
