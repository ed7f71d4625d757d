"""What the other tests rely on: the oracle and the yardstick against torch, the acceptance rule against mistakes."""

import math

import cases
import pytest
import reference
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

INFINITY = float("inf")


def torchs(q, k, v, **options):
    """(out, nothing) of torch's own attention, which lacks most of our options."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(*heads_first, enable_gqa=q.shape[2] != k.shape[2], **options).transpose(1, 2), None


def test_oracle_agrees_with_torch(device):
    q, k, v = cases.make(device, torch.float64, seqlen_q=40, seqlen_k=40, heads_q=4, heads_kv=2)
    dout = torch.randn_like(q)
    ours, grads = cases.run(cases.plain, q, k, v, dout, causal=True)
    theirs, torchs_grads = cases.run(torchs, q, k, v, dout, is_causal=True)
    torch.testing.assert_close(ours[0], theirs[0])
    for name, grad in grads.items():
        torch.testing.assert_close(grad, torchs_grads[name])
    assert math.isclose(float(cases.plain(q, k, v)[1][0, 0, 0]), _logsumexp(q[0, 0, 0], k[0, :, 0]), rel_tol=1e-12)


def _logsumexp(q, k):
    return math.log(sum(math.exp(sum(a * b for a, b in zip(q.tolist(), row, strict=True)) / 8) for row in k.tolist()))


def _mean(error):
    return error.double().square().mean().sqrt().item()


@pytest.mark.parametrize("causal", [False, True])
def test_yardstick_is_torchs_error(device, dtype, causal):
    """Written out for all our options it must be no looser than what torch's fused attention reaches without them."""
    q, k, v = cases.make(device, dtype, seqlen_q=300, heads_q=4, head_dim=128)
    dout = torch.randn_like(q)
    oracle = cases.run(cases.plain, *(x.double() for x in (q, k, v, dout)), causal=causal)
    yardstick = cases.run(cases.plain, q, k, v, dout, causal=causal, fused=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        theirs = cases.run(torchs, q, k, v, dout, is_causal=causal)
    errors = {}
    for name, (results, grads) in {"yardstick": yardstick, "torch": theirs}.items():
        errors[name] = [_mean(results[0] - oracle[0][0]), *(_mean(grads[x] - oracle[1][x]) for x in "qkv")]
    for ours, right in zip(errors["yardstick"], errors["torch"], strict=True):
        assert ours <= 1.5 * right, errors


def _forward(q, k, v, **options):
    """A right answer, by the yardstick's formula from a permuted k and v, so that its sums run in another order."""
    order = torch.randperm(k.shape[1], device=k.device)
    return cases.plain(q, k[:, order], v[:, order], fused=True, **options)


# Right answers with one mistake each.
FORWARD_MISTAKES = {
    "last key dropped": lambda q, k, v: _forward(q, k[:, :-1], v[:, :-1]),
    "scale 1% off": lambda q, k, v: _forward(q, k, v, scale=1.01 * q.shape[-1] ** -0.5),
    "out 1% off": lambda q, k, v: (lambda out, lse: (out * 1.01, lse))(*_forward(q, k, v)),
    "lse 1e-3 off": lambda q, k, v: (lambda out, lse: (out, lse + 1e-3))(*_forward(q, k, v)),
    "causal": lambda q, k, v: cases.plain(q, k, v, fused=True, causal=True),
}


def _set(x, index, value):
    x = x.clone()
    x[index] = value
    return x


ELEMENT_MISTAKES = {
    "NaN": lambda x: _set(x, (0, 3, 1, 5), float("nan")),
    "Inf": lambda x: _set(x, (0, 3, 1, 5), INFINITY),
    "one element 0": lambda x: _set(x, x.abs() == x.abs().max(), 0.0),
    "one row of the next head": lambda x: _set(x, (0, 3, 0), x[0, 3, 1]),
    "shape": lambda x: x[:, :-1],
}


@pytest.mark.parametrize("seqlen_k", [2, 90, 700])
def test_rule(device, dtype, seqlen_k):
    """The rule passes what is right and finds each of these mistakes."""
    q, k, v = cases.make(device, dtype, seqlen_q=65, seqlen_k=seqlen_k)
    oracle = cases.plain(q.double(), k.double(), v.double())
    yardstick = cases.plain(q, k, v, fused=True)
    cases.check_results(_forward(q, k, v), oracle, yardstick)
    for name, mistake in FORWARD_MISTAKES.items():
        with pytest.raises(AssertionError, match="out|lse"):
            cases.check_results(mistake(q, k, v), oracle, yardstick)
            pytest.fail(name)
    for name, mistake in ELEMENT_MISTAKES.items():
        with pytest.raises(AssertionError, match="out"):
            reference.check_close("out", mistake(yardstick[0]), oracle[0], yardstick[0])
            pytest.fail(name)


def test_rule_for_infinities(device, dtype):
    lse = torch.randn(2, 3, 70, device=device, dtype=cases.sink_dtype(dtype))
    oracle = _set(lse.double(), (0, 0, 0), -INFINITY)
    reference.check_close("lse", _set(lse, (0, 0, 0), -INFINITY), oracle, oracle)
    for wrong in (_set(lse, (0, 0, 0), INFINITY), lse, _set(lse, (0, 0), -INFINITY)):
        with pytest.raises(AssertionError, match="lse"):
            reference.check_close("lse", wrong, oracle, oracle)


@pytest.mark.parametrize("seqlen_k", [2, 90, 700])
def test_rule_for_gradients(device, dtype, seqlen_k):
    """Gradients 2% off (less than that is one unit in the last place of bfloat16), or without the part of lse."""
    q, k, v = cases.make(device, dtype, seqlen_q=65, seqlen_k=seqlen_k)
    dout = torch.randn_like(q)
    dlse = torch.randn(2, 2, 65, device=device, dtype=cases.sink_dtype(dtype))
    (out, _), right = cases.run(_forward, q, k, v, dout, dlse)
    _, oracle = cases.run(cases.plain, *(x.double() for x in (q, k, v, dout, dlse)))
    _, yardstick = cases.run(cases.plain, q, k, v, dout, dlse, fused=True, saved_out=out.detach())
    for name, grad in right.items():
        reference.check_close(name, grad, oracle[name], yardstick[name])
        with pytest.raises(AssertionError, match=name):
            reference.check_close(name, grad * 1.02, oracle[name], yardstick[name])
    without_lse = cases.gradients(_forward, q, k, v, dout)
    for name in ("q", "k"):
        with pytest.raises(AssertionError, match=name):
            reference.check_close(name, without_lse[name], oracle[name], yardstick[name])
