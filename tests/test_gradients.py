"""The gradients of `attention`: dq, dk, dv and dsinks, through out and through lse, against the oracle."""

import itertools

import cases
import pytest
import torch
from layouts import GRADIENT_LAYOUTS, LAYOUTS, lay_out

import tilewright

INFINITY = float("inf")

HEAD_DIMS = [
    (8, 8),
    (40, 40),
    (64, 64),
    (72, 40),
    (96, 96),
    (128, 128),
    (192, 128),
    (64, 256),
    (256, 64),
    (256, 256),
]
OPTIONS = [
    {},
    {"causal": True},
    {"window": (20, 7)},
    {"window": (0, 0)},
    {"window": (30, None), "causal": True},
    {"window": (12, 0), "sink_tokens": 5},
    {"window": (None, 4), "sink_tokens": 90},
    {"softcap": 3.0},
    {"scale": -0.2, "causal": True},
    {"scale": 0.0},
    {"softcap": 2.0, "scale": 0.4, "window": (40, 3), "sink_tokens": 3},
]
# A few tiles of the device in each direction.
SIZES = {"cpu": ((75, 140), (140, 75)), "cuda": ((300, 520), (520, 300))}


@pytest.mark.parametrize("head_dim, head_dim_v", HEAD_DIMS)
def test_head_dims(device, dtype, head_dim, head_dim_v):
    q, k, v = cases.make(device, dtype, batch=1, seqlen_q=70, seqlen_k=90, head_dim=head_dim, head_dim_v=head_dim_v)
    cases.check_gradients(q, k, v, causal=True)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(device, dtype, head_dim):
    for head_dim_v in {head_dim, 264 - head_dim, 128}:
        for softcap in (0.0, 9.0):
            shape = {"heads_q": 4, "heads_kv": 2, "head_dim": head_dim, "head_dim_v": head_dim_v}
            q, k, v = cases.make(device, dtype, seqlen_q=201, seqlen_k=330, **shape)
            cases.check_gradients(q, k, v, causal=True, softcap=softcap)
            cases.check_gradients(q, k, v, softcap=softcap, deterministic=True)


@pytest.mark.gpu
@pytest.mark.parametrize("seqlen_q", [1, 63, 64, 65, 127, 128, 129, 193, 500])
@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_seqlens(device, dtype, seqlen_q, head_dim, head_dim_v):
    """On either side of the edges of tiles of 64 to 192 queries or keys."""
    for seqlen_k in (1, 63, 64, 65, 127, 128, 129, 192, 193, 385):
        shape = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "head_dim": head_dim, "head_dim_v": head_dim_v}
        q, k, v = cases.make(device, dtype, **shape)
        cases.check_gradients(q, k, v)
        cases.check_gradients(q, k, v, causal=True)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(device, dtype, options, with_sinks):
    for seqlen_q, seqlen_k in SIZES[device]:
        q, k, v = cases.make(device, dtype, seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=4, heads_kv=2)
        sinks = cases.make_sinks(4, device, dtype) if with_sinks else None
        cases.check_gradients(q, k, v, sinks=sinks, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", cases.WINDOWS)
def test_windows(device, dtype, window, causal):
    for head_dim, (seqlen_q, seqlen_k) in itertools.product((64, 128, 256), ((67, 67), *SIZES[device])):
        q, k, v = cases.make(device, dtype, batch=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=head_dim)
        for sink_tokens in (0, 3, 170):
            cases.check_gradients(q, k, v, window=window, causal=causal, sink_tokens=sink_tokens)


@pytest.mark.parametrize("heads_q, heads_kv", [(3, 3), (6, 2), (8, 1), (5, 1)])
def test_grouped_heads(device, dtype, heads_q, heads_kv):
    q, k, v = cases.make(device, dtype, seqlen_q=50, seqlen_k=80, heads_q=heads_q, heads_kv=heads_kv, head_dim=32)
    cases.check_gradients(q, k, v, causal=True, sinks=cases.make_sinks(heads_q, device, dtype))


@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 0},
        {"seqlen_q": 0, "seqlen_k": 5},
        {"seqlen_q": 5, "seqlen_k": 0},
        {"seqlen_q": 1, "seqlen_k": 1},
        {"seqlen_q": 1, "seqlen_k": 100},
        {"seqlen_q": 100, "seqlen_k": 1},
    ],
    ids=str,
)
def test_small_sizes(device, dtype, shape):
    q, k, v = cases.make(device, dtype, **shape)
    cases.check_gradients(q, k, v, sinks=cases.make_sinks(2, device, dtype))
    cases.check_gradients(q, k, v, causal=True)


@pytest.mark.parametrize(
    "head_dim, head_dim_v, seqlen_q, options",
    [
        (64, 64, 130, {}),
        (64, 64, 130, {"causal": True}),
        (128, 128, 520, {}),
        (192, 128, 130, {}),
        (256, 256, 130, {}),
        (64, 64, 130, {"softcap": 10.0}),
    ],
    ids=str,
)
def test_many_heads_without_keys(device, dtype, head_dim, head_dim_v, seqlen_q, options):
    """dq is 0 in all of them, also where no kernel has written zeros for its sums. What lay in memory is no number."""
    shape = {"batch": 270, "seqlen_q": seqlen_q, "seqlen_k": 0, "heads_q": 1, "heads_kv": 1}
    q, k, v = cases.make(device, dtype, **shape, head_dim=head_dim, head_dim_v=head_dim_v)
    dout, dlse = cases.into_outputs(q, v)
    if device == "cuda":
        torch.full((1 << 27,), float("nan"), device=device)
    grads = cases.gradients(cases.call, q, k, v, dout, dlse, **options)
    assert (grads["q"] == 0).all()


@pytest.mark.parametrize("into", [1e4, INFINITY, float("nan")])
def test_empty_rows_have_no_gradient(device, dtype, into):
    """Whatever flows into their lse of -inf: its square sends back -inf. And what is finite into their out."""
    q, k, v = cases.make(device, dtype, seqlen_q=90, seqlen_k=40)
    dout, dlse = cases.into_outputs(q, v)
    options = {"causal": True, "deterministic": True}
    quiet = cases.gradients(cases.call, q, k, v, dout, dlse, **options)
    dout[:, :50], dlse[..., :50] = into if device == "cpu" else 1e4, into
    loud = cases.gradients(cases.call, q, k, v, dout, dlse, **options)
    assert (loud["q"][:, :50] == 0).all()
    for name, grad in quiet.items():
        assert grad.isfinite().all() and torch.equal(grad, loud[name]), name


def test_empty_rows_with_sinks(device, dtype):
    """Their lse is the sink, so what flows into it flows into the sink; out is 0 whatever the sink."""
    q, k, v = cases.make(device, dtype, seqlen_q=90, seqlen_k=40)
    dout, dlse = cases.into_outputs(q, v)
    options = {"causal": True, "deterministic": True, "sinks": cases.make_sinks(2, device, dtype)}
    quiet = cases.gradients(cases.call, q, k, v, dout, dlse, **options)
    dout[:, :50] = 1e4
    loud = cases.gradients(cases.call, q, k, v, dout, dlse, **options)
    assert (loud["q"][:, :50] == 0).all()
    for name, grad in quiet.items():
        assert torch.equal(grad, loud[name]), name


def test_sinks_of_any_size(device, dtype):
    """A sink far above every score leaves nothing of the gradient, one far below or -inf changes none."""
    q, k, v = cases.make(device, dtype, seqlen_q=70, heads_q=4)
    sinks = torch.tensor([200.0, -200.0, -INFINITY, 0.0], device=device, dtype=cases.sink_dtype(dtype))
    dout, dlse = cases.into_outputs(q, v)
    grads = cases.gradients(cases.call, q, k, v, dout, dlse, sinks=sinks, deterministic=True)
    without = cases.gradients(cases.call, q, k, v, dout, dlse, deterministic=True)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert (grads["q"][:, :, 0].double().abs() < 1e-30).all()
    torch.testing.assert_close(grads["sinks"][0], dlse[:, 0].sum(), rtol=1e-4, atol=1e-4)
    assert (grads["sinks"][1:3].abs() < 1e-30).all()
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {}
    for name in "qkv":
        torch.testing.assert_close(grads[name][:, :, 1:3], without[name][:, :, 1:3], **close)


def test_masked_scores_of_any_size(device, dtype):
    """exp(score - lse) of a key that no row sees overflows here, in a block that is visited, and must not count."""
    q, k, v = cases.make(device, dtype, seqlen_q=60, seqlen_k=150)
    k[:, 66:86] *= 1000.0  # the first query stands at position 90
    for options in ({"window": (3, 0)}, {"window": (3, 5), "softcap": 120.0}, {"window": (3, 0), "sink_tokens": 66}):
        cases.check_forward(q, k, v, **options)
        cases.check_gradients(q, k, v, **options)


def test_negative_lse(device, dtype):
    """Behind the last key of a tile stand zeros, not -inf: exp(0 - lse) of them overflows and must not count."""
    q, k, v = cases.make(device, dtype, seqlen_q=70, seqlen_k=90)
    q, k = q.abs() * 4, -k.abs() * 4
    cases.check_gradients(q, k, v, scale=1.0)


@pytest.mark.parametrize("through", ["out", "lse"])
def test_one_output_alone(device, dtype, through):
    """The gradient of an output that nothing depends on is None for autograd, and must count as 0."""
    q, k, v = cases.make(device, dtype, seqlen_q=60, seqlen_k=80)
    sinks = cases.make_sinks(2, device, dtype)
    dout, dlse = cases.into_outputs(q, v)
    one = (dout, None) if through == "out" else (None, dlse)
    both = (dout, torch.zeros_like(dlse)) if through == "out" else (torch.zeros_like(dout), dlse)
    options = {"causal": True, "sinks": sinks, "deterministic": True}
    result = cases.gradients(cases.call, q, k, v, *one, **options)
    for name, grad in cases.gradients(cases.call, q, k, v, *both, **options).items():
        torch.testing.assert_close(result[name], grad, msg=name)
    cases.check_gradients(q, k, v, dout=both[0], dlse=both[1], **options)


def test_only_what_is_asked_for(device, dtype):
    q, k, v = cases.make(device, dtype, seqlen_q=30)
    sinks = cases.make_sinks(2, device, dtype)
    inputs = {"q": q, "k": k, "v": v, "sinks": sinks}
    dout = torch.randn_like(q)
    whole = cases.gradients(cases.call, q, k, v, dout, sinks=sinks, deterministic=True)
    for name in inputs:
        leaf = inputs[name].detach().requires_grad_()
        out = tilewright.attention(**{**inputs, name: leaf}, deterministic=True)
        (grad,) = torch.autograd.grad(out, leaf, dout)
        assert torch.equal(grad, whole[name]), name
    assert not tilewright.attention(**inputs).requires_grad


@pytest.mark.parametrize("layout", [*LAYOUTS, *GRADIENT_LAYOUTS])
def test_strided_views(device, dtype, layout):
    """Of q, k, v, out and dout: the bits are those of the contiguous tensors, and nothing around the views is read."""
    for head_dim, head_dim_v in ((64, 64), (72, 40)):
        shape = {"heads_q": 4, "heads_kv": 2, "head_dim": head_dim, "head_dim_v": head_dim_v}
        q, k, v = cases.make(device, dtype, seqlen_q=70, seqlen_k=133, **shape)
        dout, dlse = cases.into_outputs(q, v)
        out, lse = cases.call(q, k, v, causal=True)
        given = {"q": q, "k": k, "v": v, "dout": dout, "out": out}
        # q, k and v must have a contiguous last dimension, a gradient need not.
        views = {
            name: lay_out(x, layout if layout in LAYOUTS or name in ("dout", "out") else "contiguous")
            for name, x in given.items()
        }
        options = {"lse": lse, "causal": True, "deterministic": True}
        result = cases.backward(**views, dlse=dlse, **options)
        expected = cases.backward(**{name: x.contiguous() for name, x in views.items()}, dlse=dlse, **options)
        for ours, right in zip(result, expected, strict=True):
            assert ours.is_contiguous() and torch.equal(ours, right)


@pytest.mark.parametrize("which", ["q", "k", "v", "out", "dout"])
def test_one_strided_tensor_of_five(device, dtype, which):
    q, k, v = cases.make(device, dtype, seqlen_q=70, seqlen_k=133, heads_q=4, heads_kv=2)
    out, lse = cases.call(q, k, v, causal=True)
    given = {"q": q, "k": k, "v": v, "out": out, "dout": torch.randn_like(out)}
    expected = cases.backward(**given, lse=lse, causal=True, deterministic=True)
    for layout in ("head major", "padded rows", "odd offset"):
        views = {**given, which: lay_out(given[which], layout)}
        result = cases.backward(**views, lse=lse, causal=True, deterministic=True)
        assert all(torch.equal(ours, right) for ours, right in zip(result, expected, strict=True)), layout


def test_strided_gradients_of_lse(device, dtype):
    q, k, v = cases.make(device, dtype, seqlen_q=50, seqlen_k=70)
    dout, dlse = cases.into_outputs(q, v)
    for strided in (dlse.mT.contiguous().mT, dlse[..., :1].expand_as(dlse), dlse.sum().expand_as(dlse)):
        cases.check_gradients(q, k, v, dout=dout, dlse=strided, causal=True)


def test_gradient_of_a_sum(device, dtype):
    """Autograd expands one number to dout."""
    q, k, v = cases.make(device, dtype, seqlen_q=50, seqlen_k=70)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    tilewright.attention(*leaves, deterministic=True).sum().backward()
    expected = cases.gradients(cases.call, q, k, v, torch.ones_like(q), deterministic=True)
    for name, leaf in zip("qkv", leaves, strict=True):
        assert torch.equal(leaf.grad, expected[name]), name


def test_one_tensor_as_q_k_and_v(device):
    """Its three gradients add up."""
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    x = cases.normal(1, 40, 2, 16, device=device, dtype=dtype)
    leaf, other = x.clone().requires_grad_(), x.double().requires_grad_()
    tilewright.attention(leaf, leaf, leaf, causal=True).square().sum().backward()
    cases.plain(other, other, other, causal=True)[0].square().sum().backward()
    close = {} if device == "cpu" else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(leaf.grad.double(), other.grad, **close)


def test_views_of_one_projection(device, dtype):
    """q, k and v as slices of one tensor, and the gradient of that tensor."""
    qkv = cases.normal(2, 60, 3, 4, 64, device=device, dtype=dtype).requires_grad_()
    out = tilewright.attention(*qkv.unbind(2), causal=True, deterministic=True)
    dout = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, dout)
    parts = (x.detach() for x in qkv.unbind(2))
    expected = cases.gradients(cases.call, *parts, dout, causal=True, deterministic=True)
    assert torch.equal(grad, torch.stack([expected[name] for name in "qkv"], dim=2))


def test_a_graph_used_twice(device, dtype):
    """With retain_graph the saved tensors are read again; another dout gives another gradient."""
    leaves = [x.requires_grad_() for x in cases.make(device, dtype, seqlen_q=70, seqlen_k=90)]
    out = tilewright.attention(*leaves, causal=True, deterministic=True)
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    other = torch.autograd.grad(out, leaves, -dout, retain_graph=True)
    again = torch.autograd.grad(out, leaves, dout)
    for a, b, c in zip(first, other, again, strict=True):
        assert torch.equal(a, c) and torch.equal(a, -b)


def test_inputs_of_the_backward_are_left_alone(device, dtype):
    q, k, v = cases.make(device, dtype, seqlen_q=130)
    out, lse = cases.call(q, k, v, causal=True)
    dout, dlse = cases.into_outputs(q, v)
    given = [q, k, v, dout, dlse, out, lse]
    copies = [x.clone() for x in given]
    cases.backward(q, k, v, dout, dlse, out=out, lse=lse, causal=True)
    assert all(torch.equal(x, copy) for x, copy in zip(given, copies, strict=True))


def test_gradcheck():
    """Finite differences, with every option at once, empty rows too. Needs no oracle."""
    double = torch.float64
    q, k, v = cases.make("cpu", double, seqlen_q=6, seqlen_k=4, heads_q=4, heads_kv=2, head_dim=8, head_dim_v=16)
    leaves = [x.requires_grad_() for x in (q, k, v, cases.make_sinks(4, "cpu", double))]

    def function(q, k, v, sinks, **window):
        options = {"softcap": 2.0, "scale": 0.5, "deterministic": True, "return_lse": True}
        return tilewright.attention(q, k, v, sinks=sinks, **window, **options)

    for window in ({"window": (1, 1), "sink_tokens": 1}, {"window": (1, 3), "sink_tokens": 2, "causal": True}):
        assert torch.autograd.gradcheck(lambda *x, window=window: function(*x, **window), leaves)

    def function_with_empty_rows(q, k, v):
        out, lse = tilewright.attention(q, k, v, causal=True, return_lse=True)
        return out, lse[..., 2:]  # the first two are -inf

    assert torch.autograd.gradcheck(function_with_empty_rows, leaves[:3])


def test_gradcheck_varlen():
    double = torch.float64
    q, k, v, cu_seqlens = cases.make_packed(
        "cpu", double, [3, 0, 2], [2, 1, 5], first=1, tail=1, heads_q=2, heads_kv=1, head_dim=8, head_dim_v=16
    )
    leaves = [x.requires_grad_() for x in (q, k, v, cases.make_sinks(2, "cpu", double))]

    def function(q, k, v, sinks):
        options = {"causal": True, "window": (2, 0), "sink_tokens": 1, "softcap": 2.0, "scale": 0.5}
        out, lse = tilewright.attention_varlen(q, k, v, sinks=sinks, **cu_seqlens, **options, return_lse=True)
        return out, lse[:, 1:-1]  # the other rows are in no sequence

    assert torch.autograd.gradcheck(function, leaves)


def test_not_differentiated_twice(device):
    """There is none yet: an error, not a wrong number."""
    q, k, v = (x.requires_grad_() for x in cases.make(device, torch.bfloat16, seqlen_q=5, head_dim=8))
    (dq,) = torch.autograd.grad(tilewright.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(dq.sum(), k)
