"""Hypothesis draws every option of the operators jointly and compares with the oracle."""

import cases
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

HEAD_DIMS = st.one_of(st.sampled_from([64, 128, 192, 256]), st.integers(1, 32).map(lambda n: 8 * n))
LENGTHS = st.one_of(st.integers(0, 12), st.integers(0, 200), st.sampled_from([63, 64, 65, 127, 128, 129]))
BOUNDS = st.one_of(st.none(), st.integers(0, 4), st.integers(0, 220))


@st.composite
def problems(draw):
    """The shape of a problem and the options of the call, without what depends on the device."""
    heads_kv = draw(st.integers(1, 3))
    head_dim = draw(HEAD_DIMS)
    shape = {
        "heads_q": heads_kv * draw(st.integers(1, 4)),
        "heads_kv": heads_kv,
        "head_dim": head_dim,
        "head_dim_v": draw(st.one_of(st.just(head_dim), HEAD_DIMS)),
    }
    options = {
        "causal": draw(st.booleans()),
        "window": draw(st.one_of(st.none(), st.tuples(BOUNDS, BOUNDS))),
        "sink_tokens": draw(st.one_of(st.just(0), st.integers(0, 6), st.integers(0, 150))),
        "softcap": draw(st.sampled_from([0.0, 0.0, 1.5, 20.0])),
        "scale": draw(st.sampled_from([None, None, 0.03, 0.5, -0.1])),
    }
    return shape, options, draw(st.booleans()), draw(st.integers(0, 2**32 - 1))


def check(q, k, v, with_sinks, options, gradients):
    """Forward or gradients; the latter check the forward's values too, because they start from them."""
    if with_sinks:
        options = {**options, "sinks": cases.make_sinks(q.shape[-2], q.device, q.dtype)}
    cases.check_forward(q, k, v, **options)
    if gradients:
        cases.check_gradients(q, k, v, **options)


@settings(max_examples=120)
@given(problem=problems(), batch=st.integers(0, 3), seqlen_q=LENGTHS, seqlen_k=LENGTHS)
def test_attention(device, dtype, problem, batch, seqlen_q, seqlen_k):
    shape, options, with_sinks, seed = problem
    torch.manual_seed(seed)
    q, k, v = cases.make(device, dtype, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, **shape)
    check(q, k, v, with_sinks, options, gradients=False)


# A sharp softmax of few keys: all its gradient is what dP and rowsum(dO O) differ by, and out is rounded in the latter.
SHARP = {"heads_q": 2, "heads_kv": 1, "head_dim": 256, "head_dim_v": 256}, {"softcap": 20.0, "scale": 0.5}


@settings(max_examples=60)
@example(problem=(*SHARP, False, 224), batch=1, seqlen_q=2, seqlen_k=5)
@given(problem=problems(), batch=st.integers(0, 2), seqlen_q=LENGTHS, seqlen_k=LENGTHS)
def test_gradients(device, dtype, problem, batch, seqlen_q, seqlen_k):
    shape, options, with_sinks, seed = problem
    torch.manual_seed(seed)
    q, k, v = cases.make(device, dtype, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, **shape)
    check(q, k, v, with_sinks, options, gradients=True)


SEQUENCES = st.lists(st.tuples(LENGTHS, LENGTHS), max_size=5)


@settings(max_examples=80)
@given(problem=problems(), sequences=SEQUENCES, first=st.integers(0, 9), tail=st.integers(0, 9))
def test_varlen(device, dtype, problem, sequences, first, tail):
    _check_varlen(device, dtype, problem, sequences, first, tail, gradients=False)


@settings(max_examples=40)
@given(problem=problems(), sequences=SEQUENCES, first=st.integers(0, 9), tail=st.integers(0, 9))
def test_varlen_gradients(device, dtype, problem, sequences, first, tail):
    _check_varlen(device, dtype, problem, sequences, first, tail, gradients=True)


def _check_varlen(device, dtype, problem, sequences, first, tail, gradients):
    shape, options, with_sinks, seed = problem
    torch.manual_seed(seed)
    lengths_q, lengths_k = [n for n, _ in sequences], [n for _, n in sequences]
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, lengths_q, lengths_k, first=first, tail=tail, **shape)
    check(q, k, v, with_sinks, {**options, **cu_seqlens}, gradients)
