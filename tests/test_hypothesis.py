"""Hypothesis draws every option of the operators jointly and compares with the oracle."""

import cases
import layouts
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
        "deterministic": draw(st.booleans()),
    }
    return shape, options, draw(st.booleans()), draw(st.integers(0, 2**32 - 1))


# Of q, k, v, and of dout. ("expanded" would make all scores alike.)
LAYOUTS = st.tuples(*[st.sampled_from(["contiguous"] * 4 + layouts.LAYOUTS)] * 3)
OF_DOUT = st.sampled_from(["contiguous"] * 4 + layouts.LAYOUTS + layouts.GRADIENT_LAYOUTS)


def lay_out(x, layout):
    if x.numel() == 0:
        return x
    return layouts.lay_out(x, layout) if x.dim() == 4 else layouts.lay_out(x[None], layout)[0]


def check(q, k, v, with_sinks, options, of_inputs, of_dout=None):
    """The forward, and unless the layout of dout is None the gradients."""
    if with_sinks:
        options = {**options, "sinks": cases.make_sinks(q.shape[-2], q.device, q.dtype)}
    q, k, v = (lay_out(x, layout) for x, layout in zip((q, k, v), of_inputs, strict=True))
    cases.check_forward(q, k, v, **options)
    if of_dout is not None:
        dout, dlse = cases.into_outputs(q, v)
        cases.check_gradients(q, k, v, dout=lay_out(dout, of_dout), dlse=dlse, **options)


@settings(max_examples=120)
@given(problem=problems(), batch=st.integers(0, 3), seqlen_q=LENGTHS, seqlen_k=LENGTHS, layout=LAYOUTS)
def test_attention(device, dtype, problem, batch, seqlen_q, seqlen_k, layout):
    shape, options, with_sinks, seed = problem
    torch.manual_seed(seed)
    q, k, v = cases.make(device, dtype, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, **shape)
    check(q, k, v, with_sinks, options, layout)


# A sharp softmax of few keys: all its gradient is what dP and rowsum(dO O) differ by, and out is rounded in the latter.
SHARP = {"heads_q": 2, "heads_kv": 1, "head_dim": 256, "head_dim_v": 256}, {"softcap": 20.0, "scale": 0.5}
PLAIN = ("contiguous",) * 3


@settings(max_examples=60)
@example(
    problem=(*SHARP, False, 224), batch=1, seqlen_q=2, seqlen_k=5, of_inputs=PLAIN, of_dout="contiguous", lengthen=0
)
@given(
    problem=problems(),
    batch=st.integers(0, 2),
    seqlen_q=LENGTHS,
    seqlen_k=LENGTHS,
    of_inputs=LAYOUTS,
    of_dout=OF_DOUT,
    lengthen=st.integers(0, 600),
)
def test_gradients(device, dtype, problem, batch, seqlen_q, seqlen_k, of_inputs, of_dout, lengthen):
    shape, options, with_sinks, seed = problem
    torch.manual_seed(seed)
    if device == "cuda":  # several tiles; the CPU's are small
        seqlen_q, seqlen_k = seqlen_q + lengthen // 2, seqlen_k + lengthen
    q, k, v = cases.make(device, dtype, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, **shape)
    check(q, k, v, with_sinks, options, of_inputs, of_dout)


SEQUENCES = st.lists(st.tuples(LENGTHS, LENGTHS), max_size=5)


@settings(max_examples=80)
@given(problem=problems(), sequences=SEQUENCES, first=st.integers(0, 9), tail=st.integers(0, 9), layout=LAYOUTS)
def test_varlen(device, dtype, problem, sequences, first, tail, layout):
    _check_varlen(device, dtype, problem, sequences, first, tail, layout)


@settings(max_examples=40)
@given(
    problem=problems(),
    sequences=SEQUENCES,
    first=st.integers(0, 9),
    tail=st.integers(0, 9),
    of_inputs=LAYOUTS,
    of_dout=OF_DOUT,
)
def test_varlen_gradients(device, dtype, problem, sequences, first, tail, of_inputs, of_dout):
    _check_varlen(device, dtype, problem, sequences, first, tail, of_inputs, of_dout)


def _check_varlen(device, dtype, problem, sequences, first, tail, of_inputs, of_dout=None):
    shape, options, with_sinks, seed = problem
    torch.manual_seed(seed)
    lengths_q, lengths_k = [n for n, _ in sequences], [n for _, n in sequences]
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, lengths_q, lengths_k, first=first, tail=tail, **shape)
    check(q, k, v, with_sinks, {**options, **cu_seqlens}, of_inputs, of_dout)
