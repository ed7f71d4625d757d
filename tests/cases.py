"""Makes inputs, calls tilewright, and compares with tests/reference.py: what the test files share."""

import reference
import torch

import tilewright

# Smaller than a block, about one, and larger than the sequence.
WINDOWS = [
    None,
    (None, None),
    (0, 0),
    (0, None),
    (None, 0),
    (7, 0),
    (None, 3),
    (5, 2),
    (150, 40),
    (40, 150),
    (9999, 9999),
]


def sink_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def normal(*shape, device, dtype):
    return torch.randn(*shape, device=device, dtype=torch.float32 if dtype.itemsize < 4 else dtype).to(dtype)


def make(device, dtype, *, batch=2, seqlen_q=67, seqlen_k=None, heads_q=2, heads_kv=None, head_dim=64, head_dim_v=None):
    """q, k, v, normal random numbers."""
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    heads_kv = heads_q if heads_kv is None else heads_kv
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    return (
        normal(batch, seqlen_q, heads_q, head_dim, device=device, dtype=dtype),
        normal(batch, seqlen_k, heads_kv, head_dim, device=device, dtype=dtype),
        normal(batch, seqlen_k, heads_kv, head_dim_v, device=device, dtype=dtype),
    )


def cumulative(lengths, device, first=0):
    return torch.tensor([first, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def make_packed(device, dtype, lengths_q, lengths_k=None, *, first=0, tail=0, heads_q=2, heads_kv=None, head_dim=64,
                head_dim_v=None):  # fmt: skip
    """q, k, v and the two cu_seqlens of a packed batch, with `first` rows before it and `tail` rows behind it."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    q, k, v = make(
        device,
        dtype,
        batch=1,
        seqlen_q=first + sum(lengths_q) + tail,
        seqlen_k=first + sum(lengths_k) + tail,
        heads_q=heads_q,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
    )
    cu_seqlens = {
        "cu_seqlens_q": cumulative(lengths_q, device, first),
        "cu_seqlens_k": cumulative(lengths_k, device, first),
    }
    return q[0], k[0], v[0], cu_seqlens


def make_sinks(heads, device, dtype):
    return torch.randn(heads, device=device, dtype=sink_dtype(dtype))


def call(q, k, v, **options):
    """tilewright's answer: (out, lse)."""
    function = tilewright.attention_varlen if "cu_seqlens_q" in options else tilewright.attention
    return function(q, k, v, **options, return_lse=True)


def plain(q, k, v, **options):
    """The same by the plain formula, with the dtype of its inputs."""
    function = reference.attention_varlen if "cu_seqlens_q" in options else reference.attention
    return function(q, k, v, **options)


def in_float64(options):
    sinks = options.get("sinks")
    return options if sinks is None else {**options, "sinks": sinks.double()}


def check_results(results, oracle, yardstick):
    """(out, lse) against the oracle's."""
    for name, result, right, other in zip(("out", "lse"), results, oracle, yardstick, strict=True):
        reference.check_close(name, result, right, other)


@torch.no_grad()
def check_forward(q, k, v, **options):
    """out and lse of one call against the oracle. Returns them."""
    out, lse = call(q, k, v, **options)
    assert out.dtype == q.dtype and out.is_contiguous() and out.device == q.device
    assert lse.dtype == sink_dtype(q.dtype) and lse.is_contiguous() and lse.device == q.device
    oracle = plain(q.double(), k.double(), v.double(), **in_float64(options))
    check_results((out, lse), oracle, plain(q, k, v, fused=True, **options))
    return out, lse


def run(function, q, k, v, dout, dlse=None, **options):
    """(out, lse) of one call, and its gradients by name, with `dout` into out and, unless None, `dlse` into lse."""
    inputs = {"q": q, "k": k, "v": v}
    if options.get("sinks") is not None:
        inputs["sinks"] = options.pop("sinks")
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    results = function(**inputs, **options)
    given = [(x, dx) for x, dx in zip(results, (dout, dlse), strict=True) if dx is not None and x.requires_grad]
    if not given:  # the plain formula of no sequence at all
        return results, {name: torch.zeros_like(x) for name, x in inputs.items()}
    outputs, into = zip(*given, strict=True)
    # The plain formula does not use every input of a problem with nothing in it.
    grads = torch.autograd.grad(outputs, tuple(inputs.values()), into, allow_unused=True, materialize_grads=True)
    return results, dict(zip(inputs, grads, strict=True))


def gradients(function, q, k, v, dout, dlse=None, **options):
    return run(function, q, k, v, dout, dlse, **options)[1]


def output_shapes(q, v):
    """The shapes of out and lse."""
    return (*q.shape[:-1], v.shape[-1]), (*q.shape[:-3], q.shape[-2], q.shape[-3])


def into_outputs(q, v):
    """Random dout and dlse."""
    out_shape, lse_shape = output_shapes(q, v)
    dout = normal(*out_shape, device=q.device, dtype=q.dtype)
    return dout, torch.randn(lse_shape, device=q.device, dtype=sink_dtype(q.dtype))


def check_gradients(q, k, v, *, dout=None, dlse=None, **options):
    """out and lse of one call and its dq, dk, dv and dsinks against the oracle. Returns the gradients."""
    drawn = into_outputs(q, v)
    dout, dlse = (x if given is None else given for x, given in zip(drawn, (dout, dlse), strict=True))
    results, grads = run(call, q, k, v, dout, dlse, **options)
    for name, grad in grads.items():
        given = options["sinks"] if name == "sinks" else {"q": q, "k": k, "v": v}[name]
        assert grad.dtype == given.dtype and grad.device == given.device
    compare_gradients(results, grads, q, k, v, dout, dlse, **options)
    return grads


def compare_gradients(results, grads, q, k, v, dout, dlse, **options):
    """(out, lse) and the gradients by name against the oracle's of this problem."""
    wide = (x.double() for x in (q, k, v, dout, dlse))
    oracle_results, oracle = run(plain, *wide, **in_float64(options))
    # A backward starts from the rounded out, in PyTorch as here: both from the same, which is checked by itself.
    saved_out = results[0].detach()
    other_results, yardstick = run(plain, q, k, v, dout, dlse, fused=True, saved_out=saved_out, **options)
    check_results(results, oracle_results, other_results)
    for name, grad in grads.items():
        reference.check_close(f"d{name}", grad, oracle[name], yardstick[name])


def backward(q, k, v, dout, dlse=None, *, out=None, lse=None, **keywords):
    """(dq, dk, dv, dsinks) by the gradient operator itself, from the forward's out and lse unless others are given."""
    sinks = keywords.pop("sinks", None)
    cu_seqlens = [keywords.pop(name) for name in ("cu_seqlens_q", "cu_seqlens_k") if name in keywords]
    name = "attention_varlen" if cu_seqlens else "attention"
    if out is None:
        forward = getattr(torch.ops.tilewright, name)
        out, lse = forward(q.detach(), k.detach(), v.detach(), *cu_seqlens, sinks, **keywords)
    operator = getattr(torch.ops.tilewright, f"{name}_backward")
    return operator(dout, dlse, q, k, v, out, lse, *cu_seqlens, sinks, **keywords)
