"""The shape sets of ``python -m bench forward | backward | training``."""

from __future__ import annotations

import itertools
import math
import random

from bench.problem import Problem


def dense(batch: int, seqlen: int, heads: int | tuple[int, int], head_dim: int | tuple[int, int], **rest) -> Problem:
    """A batch of equal lengths; ``heads`` may be (heads_q, heads_kv), ``head_dim`` (head_dim, head_dim_v)."""
    heads_q, heads_kv = heads if isinstance(heads, tuple) else (heads, heads)
    dim, dim_v = head_dim if isinstance(head_dim, tuple) else (head_dim, head_dim)
    return Problem(((seqlen, seqlen),) * batch, heads_q, heads_kv, dim, dim_v, **rest)


def standard() -> list[Problem]:
    """16,384 tokens, heads * head_dim = 2,048: the grid most papers use."""
    return [
        dense(16384 // seqlen, seqlen, 2048 // dim, dim, causal=causal)
        for dim, causal in itertools.product((64, 128, 256), (False, True))
        for seqlen in (512, 1024, 2048, 4096, 8192, 16384)
    ]


def short() -> list[Problem]:
    """Small batches of short sequences: latency, waves that do not fill the card."""
    return [
        dense(batch, seqlen, 16, dim, causal=causal)
        for dim, causal in itertools.product((64, 128), (False, True))
        for batch, seqlen in itertools.product((1, 2, 4, 8), (128, 256, 512, 1024, 2048))
    ]


def window() -> list[Problem]:
    """Sliding windows: causal ones, as models use them, and one that looks both ways."""
    rows = [
        dense(16384 // seqlen, seqlen, 2048 // dim, dim, causal=True, window=(left, 0))
        for dim in (128, 64)
        for seqlen, left in ((16384, 1024), (16384, 4096), (8192, 512), (4096, 1024))
    ]
    rows += [dense(1, 16384, 2048 // dim, dim, window=(1024, 1024)) for dim in (128, 64)]
    return [*rows, dense(1, 16384, 16, 128, causal=True, window=(1024, 0), sink_tokens=4)]


def log_normal_lengths(total: int, mean: float, seed: int) -> tuple[tuple[int, int], ...]:
    """Lengths as documents have them, cut so that they sum to ``total``."""
    draw, lengths, left = random.Random(seed), [], total
    while left > 0:
        length = min(left, max(1, round(draw.lognormvariate(math.log(mean), 1.0))))
        lengths.append((length, length))
        left -= length
    return tuple(lengths)


def varlen() -> list[Problem]:
    """Ragged batches, then equal lengths packed, which are timed beside the plain operator ("unpacked")."""
    rows = [
        Problem(log_normal_lengths(total, mean, seed=2), heads, heads, dim, dim, causal=causal, packed=True)
        for total, mean in ((16384, 600.0), (65536, 1500.0))
        for (dim, heads), causal in itertools.product(((128, 16), (64, 32)), (False, True))
    ]
    return rows + [
        dense(batch, seqlen, 2048 // dim, dim, causal=causal, packed=True)
        for dim, causal in itertools.product((128, 64), (False, True))
        for batch, seqlen in ((32, 512), (16, 1024), (4, 4096))
    ]


def gqa() -> list[Problem]:
    """Heads that share keys and values."""
    return [
        dense(16384 // seqlen, seqlen, heads, 128, causal=causal)
        for heads, causal in itertools.product(((32, 8), (64, 8)), (False, True))
        for seqlen in (1024, 4096, 16384)
    ]


def llm() -> list[Problem]:
    """Prefill of models people run."""
    rows = [
        (label, heads, dim, batch, seqlen)
        for label, heads, dim in (
            ("Llama-3-8B", (32, 8), 128),
            ("Llama-3-70B", (64, 8), 128),
            ("Qwen2.5-7B", (28, 4), 128),
            ("Gemma-3-12B global", (16, 8), 256),
            ("DeepSeek-V3", (128, 128), (192, 128)),
        )
        for batch, seqlen in ((1, 2048), (2, 8192))
    ]
    problems = [dense(batch, seqlen, heads, dim, causal=True, label=label) for label, heads, dim, batch, seqlen in rows]
    problems.append(dense(2, 8192, (16, 8), 256, causal=True, window=(1023, 0), label="Gemma-3-12B local"))
    problems.append(dense(2, 8192, (16, 8), 256, causal=True, softcap=50.0, label="Gemma-2-9B global"))
    return problems


def accuracy() -> list[Problem]:
    """Where the relative error against float64 is taken."""
    return [dense(1, 4096, 4, dim, causal=causal) for dim, causal in itertools.product((64, 128, 256), (False, True))]


SETS = {
    "standard": standard,
    "short": short,
    "window": window,
    "varlen": varlen,
    "gqa": gqa,
    "llm": llm,
    "accuracy": accuracy,
}
# What there is for each work.
TABLES = {"forward": (*SETS, "host"), "backward": tuple(SETS), "training": tuple(SETS)[:-1]}


def chosen(name: str, device: str, quick: bool, only: str, work: str) -> list[Problem]:
    """The rows of a set whose mask and shape hold every phrase of ``only`` ("causal, d 128"). ``quick`` takes every few
    rows, to see that everything runs; on a CPU it also shortens them.
    """
    problems = SETS[name]()
    if name == "short" and work != "forward":  # up to 1,024: beyond it the backward fills the card
        problems = [problem for problem in problems if problem.lengths[0][0] <= 1024]
    if quick:
        problems = problems[:: max(1, len(problems) // 6)]
        if device == "cpu":
            problems = [_shrink(problem) for problem in problems]
    phrases = [f" {phrase.strip()} " for phrase in only.split(",") if phrase.strip()]
    return [p for p in problems if all(phrase in f" {p.mask} {p.shape} " for phrase in phrases)]


def _shrink(problem: Problem) -> Problem:
    cut = 256 if problem.packed else 512
    lengths = tuple((min(q, cut), min(k, cut)) for q, k in problem.lengths[:4])
    group = problem.heads_q // problem.heads_kv
    window = problem.window and tuple(None if side is None else side // 16 for side in problem.window)
    return Problem(
        lengths,
        2 * group,
        2,
        problem.head_dim,
        problem.head_dim_v,
        problem.causal,
        window,
        problem.sink_tokens,
        problem.softcap,
        problem.packed,
        problem.label,
    )
