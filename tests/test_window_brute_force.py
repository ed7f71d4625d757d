"""Who sees whom, against the sentence of the specification written as two loops over queries and keys.

With q = 0 all visible keys weigh the same, so with v the identity out[i, j] is 1 / (number of keys that i sees) where i
sees j, and 0 elsewhere: one call of the operator shows the mask, and every block of keys that was left out or visited.
"""

import cases
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

LONGEST = 256  # the largest head_dim_v, so the most keys that v can tell apart


def sees(i, j, seqlen_q, seqlen_k, causal, left, right, sink_tokens):
    position = i + seqlen_k - seqlen_q
    inside_left = left is None or j >= position - left or j < sink_tokens
    inside_right = right is None or j <= position + right
    return inside_left and inside_right and (not causal or j <= position)


def brute_force(seqlen_q, seqlen_k, **options):
    rows = [[sees(i, j, seqlen_q, seqlen_k, **options) for j in range(seqlen_k)] for i in range(seqlen_q)]
    return torch.tensor(rows, dtype=torch.bool).view(seqlen_q, seqlen_k)


def lengths():
    # Edges of the tiles (64 and 128 rows, here and on the GPU) more often than chance would find them.
    near_tile = st.sampled_from([62, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256])
    return st.one_of(st.integers(0, 20), near_tile, st.integers(0, LONGEST))


def bounds():
    return st.one_of(st.none(), st.integers(0, 5), st.integers(0, 300), st.sampled_from([2**30, 2**31, 2**62]))


OPTIONS = {
    "causal": st.booleans(),
    "left": bounds(),
    "right": bounds(),
    "sink_tokens": st.one_of(st.just(0), st.integers(0, 5), st.integers(0, 300), st.just(2**40)),
}


def operator_options(causal, left, right, sink_tokens):
    return {"causal": causal, "window": (left, right), "sink_tokens": sink_tokens}


def check_mask(name, weights, seen):
    """weights: 1 / count where seen, else 0."""
    count = seen.sum(-1, keepdim=True).clamp(min=1)
    wrong = (weights > 0) != seen
    assert not wrong.any(), f"{name}: wrong at (query, key) {wrong.nonzero()[:5].tolist()}"
    torch.testing.assert_close(weights.double(), seen.double() / count, rtol=1e-2, atol=0)


@settings(max_examples=150)
@example(seqlen_q=256, seqlen_k=256, causal=False, left=2**31 - 1, right=2**31 - 1, sink_tokens=0)
@example(seqlen_q=3, seqlen_k=256, causal=True, left=64, right=None, sink_tokens=64)
@given(seqlen_q=lengths(), seqlen_k=lengths(), **OPTIONS)
def test_forward(device, seqlen_q, seqlen_k, **options):
    seen = brute_force(seqlen_q, seqlen_k, **options).to(device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q = torch.zeros(1, seqlen_q, 1, 64, device=device, dtype=dtype)
    k = torch.ones(1, seqlen_k, 1, 64, device=device, dtype=dtype)
    v = torch.eye(seqlen_k, LONGEST, device=device, dtype=dtype)[None, :, None]
    out, lse = cases.call(q, k, v, **operator_options(**options))
    check_mask("out", out[0, :, 0, :seqlen_k], seen)
    torch.testing.assert_close(lse[0, 0], seen.sum(-1).to(lse.dtype).log(), rtol=1e-5, atol=1e-5)


@settings(max_examples=75)
@given(seqlen_q=lengths(), seqlen_k=lengths(), **OPTIONS)
def test_backward(device, seqlen_q, seqlen_k, **options):
    """dv = Pᵀ dout: with dout the identity it is the mask transposed. lse's gradient of k = 1 is P summed up."""
    seen = brute_force(seqlen_q, seqlen_k, **options).to(device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q = torch.zeros(1, seqlen_q, 1, 8, device=device, dtype=dtype)
    k = torch.ones(1, seqlen_k, 1, 8, device=device, dtype=dtype)
    v = torch.zeros(1, seqlen_k, 1, LONGEST, device=device, dtype=dtype)
    dout = torch.eye(seqlen_q, LONGEST, device=device, dtype=dtype)[None, :, None]
    dlse = torch.ones(1, 1, seqlen_q, device=device)
    grads = cases.gradients(cases.call, q, k, v, dout, dlse, scale=1.0, **operator_options(**options))
    check_mask("dv", grads["v"][0, :, 0, :seqlen_q].T, seen)
    # dq of row i: the mean of the keys it sees, which are all 1; nothing for an empty row.
    close = {"rtol": 1e-5, "atol": 1e-6} if device == "cpu" else {"rtol": 1e-2, "atol": 0}
    torch.testing.assert_close(grads["q"][0, :, 0, 0].float(), seen.any(-1).float(), **close)


@settings(max_examples=75)
@given(sequences=st.lists(st.tuples(lengths(), st.integers(0, 63)), max_size=4), first=st.integers(0, 3), **OPTIONS)
def test_varlen(device, sequences, first, **options):
    """Keys of another sequence are seen by no query: v tells the keys of all sequences apart."""
    lengths_q, lengths_k = [x for x, _ in sequences], [y for _, y in sequences]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    total_q, total_k = first + sum(lengths_q) + 1, first + sum(lengths_k)
    seen = torch.zeros(total_q, total_k, dtype=torch.bool)
    row = key = first
    for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
        seen[row : row + length_q, key : key + length_k] = brute_force(length_q, length_k, **options)
        row, key = row + length_q, key + length_k
    q = torch.zeros(total_q, 1, 64, device=device, dtype=dtype)
    k = torch.ones(total_k, 1, 64, device=device, dtype=dtype)
    v = torch.eye(total_k, LONGEST, device=device, dtype=dtype)[:, None]
    out, _ = cases.call(
        q,
        k,
        v,
        cu_seqlens_q=cases.cumulative(lengths_q, device, first),
        cu_seqlens_k=cases.cumulative(lengths_k, device, first),
        **operator_options(**options),
    )
    check_mask("out", out[:, 0, :total_k], seen.to(device))
