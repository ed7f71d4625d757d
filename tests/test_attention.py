"""The forward of `attention`: out and lse against the oracle."""

import cases
import pytest
import torch
from layouts import LAYOUTS, lay_out

import tilewright

INFINITY = float("inf")

HEAD_DIMS = [8, 16, 40, 64, 72, 96, 128, 136, 192, 256]
UNEQUAL_HEAD_DIMS = [(192, 128), (128, 64), (64, 256), (8, 256), (256, 8), (72, 40), (64, 128), (128, 192)]
SEQLENS = [(1, 1), (1, 130), (130, 1), (64, 64), (127, 129), (128, 128), (200, 333), (333, 200), (257, 512)]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dim(device, dtype, head_dim):
    q, k, v = cases.make(device, dtype, seqlen_q=150, seqlen_k=201, head_dim=head_dim)
    cases.check_forward(q, k, v)
    cases.check_forward(q, k, v, causal=True)


@pytest.mark.parametrize("head_dim, head_dim_v", UNEQUAL_HEAD_DIMS)
def test_unequal_head_dims(device, dtype, head_dim, head_dim_v):
    q, k, v = cases.make(device, dtype, seqlen_q=150, seqlen_k=201, head_dim=head_dim, head_dim_v=head_dim_v)
    cases.check_forward(q, k, v)
    cases.check_forward(q, k, v, causal=True)


@pytest.mark.gpu
def test_every_head_dim(device, dtype):
    for head_dim in range(8, 257, 8):
        for head_dim_v in {head_dim, 264 - head_dim, 128}:
            q, k, v = cases.make(
                device, dtype, batch=1, seqlen_q=130, seqlen_k=190, head_dim=head_dim, head_dim_v=head_dim_v
            )
            cases.check_forward(q, k, v, causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q, seqlen_k", SEQLENS)
def test_seqlens(device, dtype, seqlen_q, seqlen_k, causal):
    q, k, v = cases.make(device, dtype, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    cases.check_forward(q, k, v, causal=causal)


@pytest.mark.parametrize("heads_q, heads_kv", [(1, 1), (4, 4), (4, 2), (6, 2), (8, 1), (5, 1), (12, 4)])
def test_grouped_heads(device, dtype, heads_q, heads_kv):
    q, k, v = cases.make(
        device, dtype, seqlen_q=70, seqlen_k=150, heads_q=heads_q, heads_kv=heads_kv, head_dim=64, head_dim_v=40
    )
    cases.check_forward(q, k, v, causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", cases.WINDOWS)
def test_window(device, dtype, window, causal):
    # A few blocks of the device's tiles in each direction.
    long, short = {"cpu": (210, 130), "cuda": (520, 300)}[device]
    for seqlen_q, seqlen_k in ((67, 67), (short, long), (long, short)):
        q, k, v = cases.make(device, dtype, batch=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=1, head_dim=64)
        for sink_tokens in (0, 3, 170):
            cases.check_forward(q, k, v, window=window, causal=causal, sink_tokens=sink_tokens)


def test_causal_is_a_window(device, dtype):
    q, k, v = cases.make(device, dtype, seqlen_q=100, seqlen_k=140)
    out, lse = cases.call(q, k, v, causal=True)
    for same in ({"window": (None, 0)}, {"window": (None, 0), "causal": True}, {"window": (None, 5), "causal": True}):
        out_same, lse_same = cases.call(q, k, v, **same)
        assert torch.equal(out, out_same) and torch.equal(lse, lse_same), same


def test_sink_tokens_do_not_leak_the_future(device, dtype):
    """A causal query before key 4 must not see it, though key 4 is a sink token."""
    q, k, v = cases.make(device, dtype, batch=1, seqlen_q=20)
    out, lse = cases.call(q, k, v, causal=True, window=(2, 0), sink_tokens=5)
    k, v = k.clone(), v.clone()
    k[:, 4:], v[:, 4:] = 100.0, 100.0
    out_changed, lse_changed = cases.call(q, k, v, causal=True, window=(2, 0), sink_tokens=5)
    assert torch.equal(out[:, :4], out_changed[:, :4]) and torch.equal(lse[..., :4], lse_changed[..., :4])


@pytest.mark.parametrize("softcap", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_softcap_and_sinks(device, dtype, softcap, with_sinks):
    q, k, v = cases.make(device, dtype, seqlen_q=140, seqlen_k=200, heads_q=4, heads_kv=2)
    sinks = cases.make_sinks(4, device, dtype) if with_sinks else None
    for options in ({}, {"causal": True}, {"window": (20, 5), "scale": 0.7}):
        cases.check_forward(q, k, v, softcap=softcap, sinks=sinks, **options)


def test_sinks_of_any_size(device, dtype):
    """A sink far above every score takes all the weight, one far below none, -inf is no sink."""
    q, k, v = cases.make(device, dtype, seqlen_q=70, heads_q=4)
    sinks = torch.tensor([200.0, -200.0, -INFINITY, 0.0], device=device, dtype=cases.sink_dtype(dtype))
    out, lse = cases.check_forward(q, k, v, sinks=sinks)
    assert (out[:, :, 0].double().abs() < 1e-30).all()
    torch.testing.assert_close(lse[:, 0], torch.full_like(lse[:, 0], 200.0))
    out_none, lse_none = cases.call(q, k, v)
    torch.testing.assert_close(out[:, :, 2], out_none[:, :, 2])
    torch.testing.assert_close(lse[:, 2], lse_none[:, 2])


def test_nan_in_a_query(device, dtype):
    """Its out is NaN, and the rows around it have theirs. (Its lse may be -inf on a GPU, where it has no sink.)"""
    for seqlen_k, options in ((90, {}), (300, {"causal": True}), (300, {"window": (40, 0)})):
        q, k, v = cases.make(device, dtype, seqlen_q=70, seqlen_k=seqlen_k)
        for sinks in (None, cases.make_sinks(2, device, dtype)):
            out, lse = cases.call(q, k, v, sinks=sinks, **options)
            sick = q.clone()
            sick[:, 30] = float("nan")
            sick_out, sick_lse = cases.call(sick, k, v, sinks=sinks, **options)
            assert sick_out[:, 30].isnan().all()
            assert device == "cuda" or sick_lse[..., 30].isnan().all()
            others = torch.arange(70, device=device) != 30
            close = {"rtol": 2e-2, "atol": 2e-2}  # a GPU may round the rows beside it in another way
            torch.testing.assert_close(sick_out[:, others], out[:, others], **close)
            torch.testing.assert_close(sick_lse[..., others], lse[..., others], **close)


@pytest.mark.parametrize("scale", [None, 1.0, 0.01, 0.0, -0.3])
def test_scale(device, dtype, scale):
    q, k, v = cases.make(device, dtype, seqlen_q=70, seqlen_k=90, head_dim=40)
    cases.check_forward(q, k, v, scale=scale, causal=True)
    cases.check_forward(q, k, v, scale=scale, softcap=5.0)


@pytest.mark.parametrize("options", [{"scale": 1e-60}, {"softcap": 1e-30}, {"scale": 1e20, "softcap": 1e-20}], ids=str)
def test_scores_that_vanish(device, dtype, options):
    """All keys that are seen weigh the same, the others nothing: their scores of -inf do not meet a factor of 0."""
    q, k, v = cases.make(device, dtype, seqlen_q=70, seqlen_k=90, head_dim=40)
    dout, dlse = cases.into_outputs(q, v)
    for mask in ({"causal": True}, {"window": (20, 5)}):
        cases.check_forward(q, k, v, **mask, **options)
        grads = cases.gradients(cases.call, q, k, v, dout, dlse, **mask, **options)
        assert all(grad.isfinite().all() for grad in grads.values())


def test_large_scores(device, dtype):
    """Scores in the hundreds: the softmax subtracts its maximum, so nothing overflows."""
    q, k, v = cases.make(device, dtype, seqlen_q=100, seqlen_k=300, head_dim=64)
    out, lse = cases.call(q, k, v, scale=20.0)
    assert out.isfinite().all() and lse.isfinite().all()
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * 20.0
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-3)


def test_masked_scores_of_any_size(device, dtype):
    """A huge score of a key that no row sees, in a block that is visited, moves no maximum."""
    q, k, v = cases.make(device, dtype, seqlen_q=60, seqlen_k=150)
    out, lse = cases.check_forward(q, k, v, window=(3, 0))
    k[:, 66:86] *= 1000.0  # the first query stands at position 90
    v[:, 66:86] *= 1000.0
    out_huge, lse_huge = cases.call(q, k, v, window=(3, 0))
    assert torch.equal(out, out_huge) and torch.equal(lse, lse_huge)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_saturated_softcap(device, dtype, head_dim):
    """Scores far beyond the cap on both sides: tanh is 1 or -1, and what is computed on the way overflows nothing."""
    q, k, v = cases.make(device, dtype, seqlen_q=70, seqlen_k=400, head_dim=head_dim)
    for options in ({}, {"causal": True}):
        cases.check_forward(q, k, v, scale=20.0, softcap=3.0, **options)


@pytest.mark.parametrize("softcap", [0.0, 9.0])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_nan_in_a_key(device, dtype, head_dim, softcap):
    """All rows that see the key become NaN, and no other row of the sequence is touched."""
    q, k, v = cases.make(device, dtype, seqlen_q=400, head_dim=head_dim)
    options = {"window": (130, 40), "softcap": softcap}
    out, lse = cases.call(q, k, v, **options)
    k[:, 250, 0] = float("nan")
    out_nan, lse_nan = cases.call(q, k, v, **options)
    sees = torch.zeros(400, dtype=torch.bool, device=device)
    sees[250 - 40 : 250 + 130 + 1] = True
    assert out_nan[:, sees, 0].isnan().all() and lse_nan[:, 0, sees].isnan().all()
    torch.testing.assert_close(out_nan[:, ~sees], out[:, ~sees])
    torch.testing.assert_close(lse_nan[..., ~sees], lse[..., ~sees])
    assert torch.equal(out_nan[:, :, 1], out[:, :, 1]) and torch.equal(lse_nan[:, 1], lse[:, 1])


def test_bits_beyond_the_first_maximum(device, dtype):
    """The running maximum of the online softmax rises in every block of keys, or falls from the first on."""
    q, k, v = cases.make(device, dtype, batch=1, seqlen_q=130, seqlen_k=700, head_dim=64)
    ramp = torch.linspace(-4, 4, 700, device=device)[None, :, None, None]
    for direction in (1, -1):
        along = (torch.ones_like(k) * ramp * direction).to(dtype)
        cases.check_forward(q.abs(), along, v, scale=0.2)


@pytest.mark.parametrize("height", [5.0, 12.0, 40.0, 300.0])
@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_spikes(device, dtype, head_dim, head_dim_v, height):
    """One key, a few keys, or every later block far above all before it: a kernel may not rely on an old maximum."""
    q, k, v = cases.make(device, dtype, seqlen_q=130, seqlen_k=600, heads_q=3, head_dim=head_dim, head_dim_v=head_dim_v)
    q.zero_()[..., 0] = 1.0  # with scale 1 the score of a key is its first number
    k[0, [3, 599], 0, 0] += height
    k[0, [200, 330], 1, 0] += height
    k[0, :64, 2, 0] += height
    k[1, :, 0, 0] += torch.linspace(height, 0, 600, device=device).to(dtype)
    k[1, :, 1, 0] += torch.linspace(0, height, 600, device=device).to(dtype)
    k[1, 130::97, 2, 0] -= height
    for options in ({"scale": 1.0}, {"scale": 1.0, "causal": True}):
        cases.check_forward(q, k, v, **options)


def test_empty_rows(device, dtype):
    """With more queries than keys the first causal queries see nothing: out 0, lse -inf, or the sink."""
    q, k, v = cases.make(device, dtype, seqlen_q=200, seqlen_k=70, heads_q=2)
    out, lse = cases.check_forward(q, k, v, causal=True)
    assert (out[:, :130] == 0).all() and (lse[..., :130] == -INFINITY).all()
    sinks = cases.make_sinks(2, device, dtype)
    out, lse = cases.check_forward(q, k, v, causal=True, sinks=sinks)
    assert (out[:, :130] == 0).all()
    torch.testing.assert_close(lse[..., :130], sinks[None, :, None].expand(2, -1, 130))
    # Rows whose window has run out of keys on the right side of the sequence cannot be; on the left they can.
    cases.check_forward(q, k, v, window=(3, 10))
    cases.check_forward(q, k, v, window=(3, 10), sink_tokens=4)


@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 0},
        {"seqlen_q": 0, "seqlen_k": 5},
        {"seqlen_q": 5, "seqlen_k": 0},
        {"seqlen_q": 0, "seqlen_k": 0},
        {"batch": 0, "seqlen_q": 0, "seqlen_k": 0},
    ],
    ids=str,
)
def test_zero_sizes(device, dtype, shape):
    q, k, v = cases.make(device, dtype, **shape)
    sinks = cases.make_sinks(2, device, dtype)
    for options in ({}, {"causal": True}, {"window": (2, 0), "sink_tokens": 2}, {"sinks": sinks}):
        cases.check_forward(q, k, v, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_views(device, dtype, layout):
    """The bits are those of the contiguous tensors, and nothing around the views is read into them."""
    for head_dim, head_dim_v in ((64, 64), (72, 40)):
        x = cases.make(device, dtype, seqlen_q=70, seqlen_k=133, heads_q=4, head_dim=head_dim, head_dim_v=head_dim_v)
        views = [lay_out(t, layout) for t in x]
        assert all(t.stride(-1) == 1 for t in views)
        out, lse = cases.call(*views, causal=True)
        out_contiguous, lse_contiguous = cases.call(*(t.contiguous() for t in views), causal=True)
        assert torch.equal(out, out_contiguous) and torch.equal(lse, lse_contiguous)
        cases.check_forward(*views, window=(50, 3))


def test_one_strided_input_of_three(device, dtype):
    x = cases.make(device, dtype, seqlen_q=70, seqlen_k=133, heads_q=4, heads_kv=2)
    out, lse = cases.call(*x, causal=True)
    for i in range(3):
        for layout in ("head major", "padded rows", "odd offset"):
            views = [lay_out(t, layout) if i == j else t for j, t in enumerate(x)]
            out_views, lse_views = cases.call(*views, causal=True)
            assert torch.equal(out, out_views) and torch.equal(lse, lse_views), (i, layout)


def test_size_one_dimensions_with_odd_strides(device, dtype):
    """A dimension of size 1 may have any stride: it is never multiplied by anything but 0."""
    q, k, v = cases.make(device, dtype, batch=1, seqlen_q=1, seqlen_k=33, heads_q=1, head_dim=64)
    out, lse = cases.call(q, k, v)
    q_odd = q.as_strided(q.shape, (3, 5, 7, 1))
    k_odd = k.as_strided(k.shape, (1, 64, 1, 1))
    out_odd, lse_odd = cases.call(q_odd, k_odd, v)
    assert torch.equal(out, out_odd) and torch.equal(lse, lse_odd)


def test_lse_is_the_logsumexp(device, dtype):
    """With v = 1 and no sinks every row of out is 1; with q = 0 lse is the logarithm of the number of keys."""
    q, k, v = cases.make(device, dtype, seqlen_q=50, seqlen_k=80)
    out, lse = cases.call(torch.zeros_like(q), k, torch.ones_like(v), causal=True)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-6, atol=1e-6)
    keys = torch.arange(31, 81, device=device, dtype=lse.dtype)
    torch.testing.assert_close(lse, keys.log().expand_as(lse), rtol=1e-5, atol=1e-6)


def test_every_value(device, dtype):
    """Over one key out is v: every finite value of 16 bits comes through unchanged, the largest and smallest too."""
    if dtype.itemsize > 2:
        values = torch.randn(1 << 16, device=device, dtype=dtype)
    else:
        values = torch.arange(-(1 << 15), 1 << 15, device=device).to(torch.int16).view(dtype)
        finest = torch.finfo(dtype).tiny if dtype == torch.bfloat16 else 0.0  # matrix units take smaller ones for 0
        values = values.where(values.isfinite() & (values.abs() >= finest), torch.zeros_like(values))
    v = values.view(256, 1, 1, 256)
    q = k = torch.ones(256, 1, 1, 64, device=device, dtype=dtype)
    out, _ = cases.call(q, k, v)
    assert (out == v).all()


def test_returns_only_out_by_default(device, dtype):
    q, k, v = cases.make(device, dtype, seqlen_q=20)
    out = tilewright.attention(q, k, v)
    assert isinstance(out, torch.Tensor)
    assert torch.equal(out, tilewright.attention(q, k, v, return_lse=True)[0])


def test_inputs_are_left_alone(device, dtype):
    x = cases.make(device, dtype, seqlen_q=130)
    copies = [t.clone() for t in x]
    cases.call(*x, causal=True, softcap=10.0, scale=0.5)
    assert all(torch.equal(t, copy) for t, copy in zip(x, copies, strict=True))
