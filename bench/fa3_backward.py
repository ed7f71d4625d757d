"""FlashAttention 3's backward, which no wheel holds: derived, not measured beside ours.

FA3 was once built from its source (nvcc 13.0) and its backward timed next to cuDNN's in one run, on an H200 with torch
2.11 and cuDNN 9.19, on 2026-11-22: bf16, 16,384 tokens, heads × head_dim = 2,048. Here are its TFLOP/s over cuDNN's, a
number a row. Times cuDNN's in a run of this bench they say about where FA3 would stand in it.
"""

from __future__ import annotations

from bench.problem import Problem

SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
# (head_dim, causal): one for each seqlen
TO_CUDNN = {
    (64, False): (1.18, 1.17, 1.13, 1.12, 1.12, 1.15),
    (64, True): (1.15, 1.21, 1.26, 1.26, 1.22, 1.21),
    (128, False): (1.04, 1.04, 1.00, 1.02, 1.08, 1.09),
    (128, True): (1.06, 1.12, 1.15, 1.11, 1.13, 1.03),
    (256, False): (1.24, 1.20, 1.18, 1.13, 1.21, 1.30),
    (256, True): (1.11, 1.15, 1.13, 1.05, 0.94, 1.03),
}


def ratio_to_cudnn(problem: Problem, standard: list[Problem]) -> float | None:
    """FA3's speed over cuDNN's for a row of the standard set, else None."""
    if problem not in standard:
        return None
    return TO_CUDNN[problem.head_dim, problem.causal][SEQLENS.index(problem.lengths[0][0])]
