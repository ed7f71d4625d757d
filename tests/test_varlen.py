"""`attention_varlen`: packed sequences give what each gives alone, whatever stands around them."""

import cases
import pytest
import torch
from layouts import GRADIENT_LAYOUTS, lay_out

import tilewright

INFINITY = float("inf")
NAN = float("nan")

# (lengths of q, lengths of k)
BATCHES = [
    ([70], [70]),
    ([1, 1, 1], [1, 1, 1]),
    ([13, 150, 64, 1], [13, 150, 64, 1]),
    ([13, 150, 64, 1], [40, 130, 1, 200]),
    ([0, 5, 0, 0, 130, 0], [0, 5, 0, 0, 130, 0]),
    ([5, 0, 7], [0, 5, 9]),
    ([128, 128], [256, 128]),
    ([3] * 40, [5] * 40),
    ([0, 0], [0, 0]),
]


def describe(lengths):
    return f"{len(lengths)}x{max(lengths)}"


OPTIONS = [
    {},
    {"causal": True},
    {"window": (9, 2), "sink_tokens": 3},
    {"causal": True, "softcap": 4.0, "window": (70, None)},
]


@pytest.mark.parametrize("lengths_q, lengths_k", BATCHES, ids=describe)
def test_batches(device, dtype, lengths_q, lengths_k):
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, lengths_q, lengths_k, heads_q=4, heads_kv=2)
    sinks = cases.make_sinks(4, device, dtype)
    for options in OPTIONS:
        cases.check_forward(q, k, v, **cu_seqlens, **options)
        cases.check_forward(q, k, v, **cu_seqlens, **options, sinks=sinks)


@pytest.mark.parametrize("head_dim, head_dim_v", [(8, 8), (72, 40), (128, 128), (192, 128), (64, 256), (256, 256)])
def test_head_dims(device, dtype, head_dim, head_dim_v):
    q, k, v, cu_seqlens = cases.make_packed(
        device, dtype, [100, 3, 140], [120, 30, 140], head_dim=head_dim, head_dim_v=head_dim_v
    )
    cases.check_forward(q, k, v, **cu_seqlens, causal=True)


def check_gradients_of_batch(device, dtype, lengths_q, lengths_k, **dims):
    q, k, v, cu_seqlens = cases.make_packed(
        device, dtype, lengths_q, lengths_k, first=3, tail=2, heads_q=4, heads_kv=2, **dims
    )
    sinks = cases.make_sinks(4, device, dtype)
    for options in OPTIONS:
        cases.check_gradients(q, k, v, **cu_seqlens, **options)
        cases.check_gradients(q, k, v, **cu_seqlens, **options, sinks=sinks, deterministic=True)


@pytest.mark.parametrize("lengths_q, lengths_k", BATCHES[3:6], ids=describe)
def test_gradients(device, dtype, lengths_q, lengths_k):
    check_gradients_of_batch(device, dtype, lengths_q, lengths_k, head_dim=40)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("lengths_q, lengths_k", [*BATCHES, ([300, 1, 700], [500, 90, 64])], ids=describe)
def test_gradients_of_every_kernel(device, dtype, lengths_q, lengths_k, head_dim, head_dim_v):
    check_gradients_of_batch(device, dtype, lengths_q, lengths_k, head_dim=head_dim, head_dim_v=head_dim_v)


def test_equals_the_sequences_alone(device, dtype):
    """The oracle loops over sequences by the same words; this compares with `attention` itself."""
    lengths_q, lengths_k = [17, 140, 0, 66], [30, 140, 8, 20]
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, lengths_q, lengths_k)
    out, lse = cases.call(q, k, v, **cu_seqlens, causal=True, softcap=9.0)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {}  # their tiles need not be the same
    row, key = 0, 0
    for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
        rows, keys = slice(row, row + length_q), slice(key, key + length_k)
        alone, lse_alone = cases.call(q[None, rows], k[None, keys], v[None, keys], causal=True, softcap=9.0)
        torch.testing.assert_close(out[rows], alone[0], **close)
        torch.testing.assert_close(lse[:, rows], lse_alone[0], rtol=1e-4, atol=1e-4)
        row, key = row + length_q, key + length_k


def test_no_sequence(device, dtype):
    """batch 0: all rows belong to no sequence. No rows at all is legal too."""
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    for rows in (0, 10):
        x = cases.make(device, dtype, batch=1, seqlen_q=rows)
        out, lse = cases.call(*(t[0] for t in x), cu_seqlens_q=zero, cu_seqlens_k=zero)
        assert out.shape == (rows, 2, 64) and (out == 0).all()
        assert lse.shape == (2, rows) and (lse == -INFINITY).all()
    empty = torch.zeros(4, dtype=torch.int32, device=device)
    out, lse = cases.call(*(t[0] for t in x), cu_seqlens_q=empty, cu_seqlens_k=empty)
    assert (out == 0).all() and (lse == -INFINITY).all()


@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_in_no_sequence(device, dtype, with_sinks):
    """Before the first and after the last sequence: out 0, lse -inf, with sinks too, though they hold NaN."""
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, [20, 0, 135], [30, 10, 135], first=7, tail=150)
    sinks = cases.make_sinks(2, device, dtype) if with_sinks else None
    clean, lse_clean = cases.check_forward(q, k, v, **cu_seqlens, sinks=sinks)
    for x in (q, k, v):
        x[:7], x[-150:] = NAN, NAN
    out, lse = cases.check_forward(q, k, v, **cu_seqlens, sinks=sinks)
    assert torch.equal(out, clean) and torch.equal(lse, lse_clean)
    for outside in (slice(7), slice(-150, None)):
        assert (out[outside] == 0).all() and (lse[:, outside] == -INFINITY).all()


@pytest.mark.parametrize("poison", [NAN, INFINITY])
def test_isolation(device, dtype, poison):
    """What one sequence holds never reaches another's result: the bits stay the same."""
    lengths_q, lengths_k = [50, 140, 3, 129], [77, 140, 30, 65]
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, lengths_q, lengths_k, heads_q=4, heads_kv=2)
    bounds_q, bounds_k = cu_seqlens["cu_seqlens_q"].tolist(), cu_seqlens["cu_seqlens_k"].tolist()
    for options in ({}, {"causal": True, "softcap": 5.0}, {"window": (20, 5), "sink_tokens": 2}):
        clean, lse_clean = cases.call(q, k, v, **cu_seqlens, **options)
        for kept in range(4):
            rows = slice(bounds_q[kept], bounds_q[kept + 1])
            keys = slice(bounds_k[kept], bounds_k[kept + 1])
            poisoned = []
            for x, own in ((q, rows), (k, keys), (v, keys)):
                y = torch.full_like(x, poison)
                y[own] = x[own]
                poisoned.append(y)
            out, lse = cases.call(*poisoned, **cu_seqlens, **options)
            assert torch.equal(out[rows], clean[rows]) and torch.equal(lse[:, rows], lse_clean[:, rows])


@pytest.mark.parametrize("poison", [NAN, INFINITY])
def test_isolation_of_gradients(device, dtype, poison):
    """NaN in all else, gradients of its outputs too, leaves the bits of a sequence's gradients as they are."""
    lengths_q, lengths_k = [50, 140, 3], [77, 140, 30]
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, lengths_q, lengths_k, first=3, tail=4, heads_q=4, heads_kv=2)
    dout, dlse = cases.into_outputs(q, v)
    bounds_q, bounds_k = cu_seqlens["cu_seqlens_q"].tolist(), cu_seqlens["cu_seqlens_k"].tolist()
    for options in ({}, {"causal": True, "softcap": 5.0}, {"window": (20, 5), "sink_tokens": 2}):
        options = {**options, **cu_seqlens, "deterministic": True}
        clean = cases.gradients(cases.call, q, k, v, dout, dlse, **options)
        for kept in range(3):
            rows = slice(bounds_q[kept], bounds_q[kept + 1])
            keys = slice(bounds_k[kept], bounds_k[kept + 1])
            poisoned = []
            for x, own in ((q, rows), (k, keys), (v, keys), (dout, rows), (dlse.T, rows)):
                y = torch.full_like(x, poison)
                y[own] = x[own]
                poisoned.append(y)
            *poisoned, dlse_poisoned = poisoned
            grads = cases.gradients(cases.call, *poisoned, dlse_poisoned.T, **options)
            for name, own in (("q", rows), ("k", keys), ("v", keys)):
                assert torch.equal(grads[name][own], clean[name][own]), name


def test_gradients_of_rows_in_no_sequence(device, dtype):
    """They are 0, and nothing of these rows reaches dsinks, though they and what flows into them hold NaN."""
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, [20, 0, 135], [30, 10, 135], first=7, tail=150)
    dout, dlse = cases.into_outputs(q, v)
    options = {**cu_seqlens, "sinks": cases.make_sinks(2, device, dtype), "deterministic": True}
    clean = cases.check_gradients(q, k, v, dout=dout, dlse=dlse, **options)
    for x in (q, k, v, dout, dlse.T):
        x[:7], x[-150:] = NAN, NAN
    grads = cases.gradients(cases.call, q, k, v, dout, dlse, **options)
    for name, grad in grads.items():
        assert torch.equal(grad, clean[name]), name
    for name in "qkv":
        assert (grads[name][:7] == 0).all() and (grads[name][-150:] == 0).all(), name
    assert (grads["k"][37:47] == 0).all() and (grads["v"][37:47] == 0).all()  # a sequence without queries


def test_gradients_equal_those_of_the_sequences_alone(device, dtype):
    """The oracle loops over sequences by the same words; this compares with `attention` itself."""
    lengths_q, lengths_k = [17, 140, 0, 66], [30, 140, 8, 20]
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, lengths_q, lengths_k)
    dout, dlse = cases.into_outputs(q, v)
    grads = cases.gradients(cases.call, q, k, v, dout, dlse, **cu_seqlens, causal=True, softcap=9.0)
    close = {"rtol": 3e-2, "atol": 3e-2} if dtype.itemsize == 2 else {}  # their tiles need not be the same
    for i in range(4):
        rows, keys = (slice(*cu[i : i + 2].tolist()) for cu in cu_seqlens.values())
        alone = (x[None] for x in (q[rows], k[keys], v[keys], dout[rows], dlse[:, rows]))
        expected = cases.gradients(cases.call, *alone, causal=True, softcap=9.0)
        for name, own in (("q", rows), ("k", keys), ("v", keys)):
            torch.testing.assert_close(grads[name][own], expected[name][0], **close)


def test_neighbouring_bytes(device, dtype):
    """Keys just before and behind a sequence hold NaN in the very tile that is loaded for it."""
    for length in (1, 63, 65, 127, 129):
        q, k, v, cu_seqlens = cases.make_packed(device, dtype, [length], [length], first=1, tail=200, heads_q=1)
        for x in (k, v):
            x[:1], x[1 + length :] = NAN, NAN
        cases.check_forward(q, k, v, **cu_seqlens)
        cases.check_forward(q, k, v, **cu_seqlens, window=(20, 20), sink_tokens=30)


def test_max_seqlen_is_no_guard(device):
    """A compiled function is compiled once, whatever the hint."""
    compilations = []

    def backend(graph, _):
        compilations.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(q, k, v, cu_seqlens, longest):
        named = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        return tilewright.attention_varlen(q, k, v, **named, max_seqlen_q=longest, max_seqlen_k=longest)

    q, k, v, cu_seqlens = cases.make_packed(device, torch.bfloat16, [4, 16])
    for longest in range(16, 40):
        compiled(q, k, v, cu_seqlens["cu_seqlens_q"], longest)
    assert len(compilations) <= 2


def test_max_seqlen_is_only_a_hint(device, dtype):
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, [20, 140], [30, 150])
    out, lse = cases.call(q, k, v, **cu_seqlens)
    for hint in ({"max_seqlen_q": 140, "max_seqlen_k": 150}, {"max_seqlen_q": 100000}, {"max_seqlen_k": 1 << 29}):
        out_hint, lse_hint = cases.call(q, k, v, **cu_seqlens, **hint)
        assert torch.equal(out, out_hint) and torch.equal(lse, lse_hint), hint


def test_strided(device, dtype):
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, [20, 140], [30, 150], heads_q=3)
    out, lse = cases.call(q, k, v, **cu_seqlens, causal=True)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    sliced = [torch.stack([torch.full_like(x, NAN), x], dim=1)[:, 1] for x in (q, k, v)]
    for views in (heads_first, sliced):
        out_view, lse_view = cases.call(*views, **cu_seqlens, causal=True)
        assert torch.equal(out, out_view) and torch.equal(lse, lse_view)


@pytest.mark.parametrize("layout", ["head major", "padded rows", "odd offset", *GRADIENT_LAYOUTS])
def test_strided_gradients(device, dtype, layout):
    """Of out and dout, and where the last dimension stays contiguous of q, k and v."""
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, [20, 140], [30, 150], heads_q=4, heads_kv=2)
    dout, dlse = cases.into_outputs(q, v)
    out, lse = cases.call(q, k, v, **cu_seqlens, causal=True)
    given = {"out": out, "dout": dout}
    if layout not in GRADIENT_LAYOUTS:
        given |= {"q": q, "k": k, "v": v}
    views = {name: lay_out(x[None], layout)[0] for name, x in given.items()}
    options = {"q": q, "k": k, "v": v, "dlse": dlse, "lse": lse, **cu_seqlens, "causal": True, "deterministic": True}
    result = cases.backward(**{**options, **views})
    expected = cases.backward(**{**options, **{name: x.contiguous() for name, x in views.items()}})
    for ours, right in zip(result, expected, strict=True):
        assert ours.is_contiguous() and torch.equal(ours, right)


def test_many_sequences(device, dtype):
    """More sequences than any table of a fixed size would hold, most of them empty."""
    lengths = [0] * 5000
    for i in range(0, 5000, 97):
        lengths[i] = i % 23
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, lengths, heads_q=2, head_dim=8)  # dQ in one pass for all
    out, lse = cases.call(q, k, v, **cu_seqlens, causal=True)
    whole = torch.tensor([n for n in lengths if n > 0])
    few = {name: cases.cumulative(whole, device) for name in cu_seqlens}
    out_few, lse_few = cases.check_forward(q, k, v, **few, causal=True)
    assert torch.equal(out, out_few) and torch.equal(lse, lse_few)
    dout = torch.randn_like(q)
    grads, grads_few = (
        cases.gradients(cases.call, q, k, v, dout, **bounds, causal=True, deterministic=True)
        for bounds in (cu_seqlens, few)
    )
    assert all(torch.equal(grads[name], grads_few[name]) for name in "qkv")


# Values that no cu_seqlens should hold, for 40 rows and 50 keys.
NONSENSE = [
    ([0, 30, 10, 40], [0, 10, 20, 50]),
    ([0, 10, 20, 40], [0, 40, 20, 50]),
    ([0, 10, 20, 41], [0, 10, 20, 50]),
    ([0, 10, 20, 40], [0, 10, 20, 2**31 - 1]),
    ([-1, 10, 20, 40], [0, 10, 20, 50]),
    ([0, 10, 20, 40], [-(2**31), 10, 20, 50]),
    ([1000, 2000, 3000, 4000], [1000, 2000, 3000, 4000]),
    ([2**31 - 1, -(2**31), 2**31 - 1, -(2**31)], [-(2**31), 2**31 - 1, -(2**31), 2**31 - 1]),
]


@pytest.mark.parametrize("bounds_q, bounds_k", NONSENSE, ids=str)
def test_nonsense_in_cu_seqlens(device, dtype, bounds_q, bounds_k):
    """The CPU says what is wrong. A GPU cannot before the launch: it stays inside the tensors, and works afterwards."""
    x = cases.make(device, dtype, batch=1, seqlen_q=40, seqlen_k=50)
    q, k, v = (t[0] for t in x)
    cu_seqlens = {
        "cu_seqlens_q": torch.tensor(bounds_q, dtype=torch.int32, device=device),
        "cu_seqlens_k": torch.tensor(bounds_k, dtype=torch.int32, device=device),
    }
    if device == "cpu":
        with pytest.raises(ValueError, match=r"cu_seqlens_[qk]"):
            tilewright.attention_varlen(q, k, v, **cu_seqlens)
        return
    for options in ({}, {"causal": True}, {"window": (3, 3), "sink_tokens": 2}):
        out, lse = cases.call(q, k, v, **cu_seqlens, **options)
        grads = cases.gradients(cases.call, q, k, v, torch.ones_like(q), **cu_seqlens, **options)
        torch.cuda.synchronize()
        assert not out.isnan().any() and not lse.isnan().any()
        assert not any(grad.isnan().any() for grad in grads.values())
    good = {"cu_seqlens_q": cases.cumulative([10, 30], device), "cu_seqlens_k": cases.cumulative([20, 30], device)}
    cases.check_gradients(q, k, v, **good)
