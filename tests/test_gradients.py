"""The gradients of `attention`: dq, dk, dv and dsinks, through out and through lse, against the oracle."""

import cases
import pytest
import torch

import tilewright

INFINITY = float("inf")

HEAD_DIMS = [(8, 8), (40, 40), (64, 64), (72, 40), (128, 128), (192, 128), (64, 256), (256, 256)]
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


@pytest.mark.parametrize("head_dim, head_dim_v", HEAD_DIMS)
def test_head_dims(grad_device, dtype, head_dim, head_dim_v):
    q, k, v = cases.make(
        grad_device, dtype, batch=1, seqlen_q=70, seqlen_k=90, head_dim=head_dim, head_dim_v=head_dim_v
    )
    cases.check_gradients(q, k, v, causal=True)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(grad_device, dtype, options, with_sinks):
    for seqlen_q, seqlen_k in ((75, 140), (140, 75)):
        q, k, v = cases.make(grad_device, dtype, seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=4, heads_kv=2)
        sinks = cases.make_sinks(4, grad_device, dtype) if with_sinks else None
        cases.check_gradients(q, k, v, sinks=sinks, **options)


@pytest.mark.parametrize("heads_q, heads_kv", [(3, 3), (6, 2), (8, 1), (5, 1)])
def test_grouped_heads(grad_device, dtype, heads_q, heads_kv):
    q, k, v = cases.make(grad_device, dtype, seqlen_q=50, seqlen_k=80, heads_q=heads_q, heads_kv=heads_kv, head_dim=32)
    cases.check_gradients(q, k, v, causal=True, sinks=cases.make_sinks(heads_q, grad_device, dtype))


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
def test_small_sizes(grad_device, dtype, shape):
    q, k, v = cases.make(grad_device, dtype, **shape)
    cases.check_gradients(q, k, v, sinks=cases.make_sinks(2, grad_device, dtype))
    cases.check_gradients(q, k, v, causal=True)


@pytest.mark.parametrize("into", [1e4, INFINITY, float("nan")])
def test_empty_rows_have_no_gradient(grad_device, dtype, into):
    """Whatever flows into them: the square of an lse of -inf sends back -inf."""
    q, k, v = cases.make(grad_device, dtype, seqlen_q=90, seqlen_k=40)
    dout = cases.normal(*q.shape, device=grad_device, dtype=dtype)
    dlse = torch.randn(2, 2, 90, device=grad_device, dtype=cases.sink_dtype(dtype))
    quiet = cases.gradients(cases.call, q, k, v, dout, dlse, causal=True)
    dout[:, :50], dlse[..., :50] = into, into
    loud = cases.gradients(cases.call, q, k, v, dout, dlse, causal=True)
    assert (loud["q"][:, :50] == 0).all()
    for name, grad in quiet.items():
        assert grad.isfinite().all() and torch.equal(grad, loud[name]), name


def test_masked_scores_of_any_size(grad_device, dtype):
    """exp(score - lse) of a key that no row sees overflows here, in a block that is visited, and must not count."""
    q, k, v = cases.make(grad_device, dtype, seqlen_q=60, seqlen_k=150)
    k[:, 66:86] *= 1000.0  # the first query stands at position 90
    for options in ({"window": (3, 0)}, {"window": (3, 5), "softcap": 500.0}, {"window": (3, 0), "sink_tokens": 66}):
        cases.check_forward(q, k, v, **options)
        cases.check_gradients(q, k, v, **options)


@pytest.mark.parametrize("through", ["out", "lse"])
def test_one_output_alone(grad_device, dtype, through):
    """The gradient of an output that nothing depends on is None for autograd, and must count as 0."""
    q, k, v = cases.make(grad_device, dtype, seqlen_q=60, seqlen_k=80)
    sinks = cases.make_sinks(2, grad_device, dtype)
    dout = cases.normal(*q.shape, device=grad_device, dtype=dtype)
    dlse = torch.randn(2, 2, 60, device=grad_device, dtype=cases.sink_dtype(dtype))
    one = (dout, None) if through == "out" else (None, dlse)
    both = (dout, torch.zeros_like(dlse)) if through == "out" else (torch.zeros_like(dout), dlse)
    result = cases.gradients(cases.call, q, k, v, *one, causal=True, sinks=sinks)
    for name, grad in cases.gradients(cases.call, q, k, v, *both, causal=True, sinks=sinks).items():
        torch.testing.assert_close(result[name], grad, msg=name)
    cases.check_gradients(q, k, v, dout=both[0], dlse=both[1], causal=True, sinks=sinks)


def test_only_what_is_asked_for(grad_device, dtype):
    q, k, v = cases.make(grad_device, dtype, seqlen_q=30)
    sinks = cases.make_sinks(2, grad_device, dtype)
    inputs = {"q": q, "k": k, "v": v, "sinks": sinks}
    dout = torch.randn_like(q)
    whole = cases.gradients(cases.call, q, k, v, dout, sinks=sinks)
    for name in inputs:
        leaf = inputs[name].detach().requires_grad_()
        out = tilewright.attention(**{**inputs, name: leaf})
        (grad,) = torch.autograd.grad(out, leaf, dout)
        assert torch.equal(grad, whole[name]), name
    assert not tilewright.attention(**inputs).requires_grad


def test_strided_inputs_and_gradients(grad_device, dtype):
    """Transposed q, k, v; and gradients as autograd makes them: expanded from one number, transposed, sliced."""
    x = cases.make(grad_device, dtype, seqlen_q=50, seqlen_k=70)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in x)
    shape = q.shape
    one = torch.ones((), device=grad_device, dtype=dtype)
    wide = cases.normal(*shape[:-1], shape[-1] + 3, device=grad_device, dtype=dtype)
    heads_first = cases.normal(shape[0], shape[2], shape[1], shape[3], device=grad_device, dtype=dtype)
    dlse = torch.randn(2, 50, 2, device=grad_device, dtype=cases.sink_dtype(dtype)).transpose(1, 2)
    for dout in (one.expand(shape), wide[..., 1:-2], heads_first.transpose(1, 2), wide[..., :-3].flip(0)):
        cases.check_gradients(q, k, v, dout=dout, dlse=dlse, causal=True)
    leaf = q.detach().requires_grad_()
    tilewright.attention(leaf, k, v).sum().backward()
    assert leaf.grad.isfinite().all()


def test_one_tensor_as_q_k_and_v(grad_device):
    """Its three gradients add up."""
    x = cases.normal(1, 40, 2, 16, device=grad_device, dtype=torch.float64)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    tilewright.attention(leaf, leaf, leaf, causal=True).square().sum().backward()
    cases.plain(other, other, other, causal=True)[0].square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_gradcheck(grad_device):
    """Finite differences, with every option at once, empty rows too. Needs no oracle."""
    double = torch.float64
    q, k, v = cases.make(grad_device, double, seqlen_q=6, seqlen_k=4, heads_q=4, heads_kv=2, head_dim=8, head_dim_v=16)
    leaves = [x.requires_grad_() for x in (q, k, v, cases.make_sinks(4, grad_device, double))]

    def function(q, k, v, sinks):
        return tilewright.attention(
            q, k, v, sinks=sinks, window=(1, 1), sink_tokens=1, softcap=2.0, scale=0.5, return_lse=True
        )

    assert torch.autograd.gradcheck(function, leaves)

    def function_with_empty_rows(q, k, v):
        out, lse = tilewright.attention(q, k, v, causal=True, return_lse=True)
        return out, lse[..., 2:]  # the first two are -inf

    assert torch.autograd.gradcheck(function_with_empty_rows, leaves[:3])


def test_gradcheck_varlen(grad_device):
    double = torch.float64
    q, k, v, cu_seqlens = cases.make_packed(
        grad_device, double, [3, 0, 2], [2, 1, 5], first=1, tail=1, heads_q=2, head_dim=8
    )
    leaves = [x.requires_grad_() for x in (q, k, v, cases.make_sinks(2, grad_device, double))]

    def function(q, k, v, sinks):
        out, lse = tilewright.attention_varlen(
            q, k, v, sinks=sinks, **cu_seqlens, causal=True, window=(2, 0), softcap=2.0, return_lse=True
        )
        return out, lse[:, 1:-1]  # the other rows are in no sequence

    assert torch.autograd.gradcheck(function, leaves)


def test_no_second_derivative(grad_device):
    """There is none yet: an error, not a wrong number."""
    q, k, v = (x.requires_grad_() for x in cases.make(grad_device, torch.float64, seqlen_q=5, head_dim=8))
    (dq,) = torch.autograd.grad(tilewright.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dq.sum(), k)


@pytest.mark.gpu
def test_no_backward_on_cuda_yet(device, dtype):
    q, k, v = (x.requires_grad_() for x in cases.make(device, dtype))
    out = tilewright.attention(q, k, v, causal=True)
    with pytest.raises(NotImplementedError, match=r"(?i)backward.*cuda|cuda.*backward"):
        out.sum().backward()
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, [5, 9])
    out = tilewright.attention_varlen(q.requires_grad_(), k, v, **cu_seqlens)
    with pytest.raises(NotImplementedError, match=r"(?i)backward.*cuda|cuda.*backward"):
        out.sum().backward()
