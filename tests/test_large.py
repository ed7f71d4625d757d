"""Tensors past 2³¹ elements: offsets are 64 bits wide. A few rows are compared.

Most of these tensors are a few rows far apart in a buffer whose pages are never touched, so the CPU runs them too.
"""

import cases
import pytest
import torch

import tilewright

FAR = 2**31 + 4096  # elements
DTYPE = torch.bfloat16


def spread(x, dim, distance):
    """x with its rows along `dim` `distance` elements apart."""
    strides = list(x.stride())
    strides[dim] = distance
    last = (x.shape[dim] - 1) * distance
    buffer = torch.empty(last + x.numel(), device=x.device, dtype=x.dtype)
    view = buffer.as_strided(x.shape, strides)
    return view.copy_(x)


@pytest.mark.parametrize("dim, distance", [(0, FAR), (1, FAR // 2), (2, FAR)], ids=["batch", "row", "head"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_far_apart(device, which, dim, distance):
    rows = 3 if dim == 1 else 70  # the last of three rows is past 2**31
    near = dict(zip("qkv", cases.make(device, DTYPE, seqlen_q=rows, head_dim=64), strict=True))
    if dim == 1:
        near = {name: x[:1] for name, x in near.items()}
    far = {**near, which: spread(near[which], dim, distance)}
    expected = cases.call(**near, causal=True)
    for ours, right in zip(cases.call(**far, causal=True), expected, strict=True):
        assert torch.equal(ours, right)


@pytest.mark.parametrize("dim, distance", [(0, FAR), (1, FAR // 2), (2, FAR)], ids=["batch", "row", "head"])
@pytest.mark.parametrize("which", ["q", "k", "v", "out", "dout"])
def test_gradients_far_apart(device, which, dim, distance):
    q, k, v = cases.make(device, DTYPE, batch=1 if dim == 1 else 2, seqlen_q=3 if dim == 1 else 70, head_dim=64)
    out, lse = cases.call(q, k, v, causal=True)
    near = {"q": q, "k": k, "v": v, "out": out, "dout": torch.randn_like(q)}
    far = {**near, which: spread(near[which], dim, distance)}
    expected = cases.backward(**near, lse=lse, causal=True, deterministic=True)
    for grad, right in zip(cases.backward(**far, lse=lse, causal=True, deterministic=True), expected, strict=True):
        assert torch.equal(grad, right)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_varlen_far_apart(device, which):
    q, k, v, cu_seqlens = cases.make_packed(device, DTYPE, [2, 1], heads_q=2)
    near = {"q": q, "k": k, "v": v}
    far = {**near, which: spread(near[which], 0, FAR // 2)}
    for ours, right in zip(cases.call(**far, **cu_seqlens), cases.call(**near, **cu_seqlens), strict=True):
        assert torch.equal(ours, right)
    options = {"dout": torch.randn_like(q), **cu_seqlens, "deterministic": True}
    for ours, right in zip(cases.backward(**far, **options), cases.backward(**near, **options), strict=True):
        assert torch.equal(ours, right)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_more_than_2_31_results(device, packed):
    """q and out themselves are larger than 2³¹ elements, without a hole."""
    heads, head_dim, rows = 128, 128, 2**17 + 192
    assert heads * head_dim * rows > 2**31
    q = torch.randn(1, rows, heads, head_dim, device=device, dtype=DTYPE)
    k, v = (torch.randn(1, rows, 1, head_dim, device=device, dtype=DTYPE) for _ in range(2))
    if packed:  # two sequences, the second across the 2**31st element
        start = 2**17 - 100
        cu_seqlens = torch.tensor([0, start, rows], dtype=torch.int32, device=device)
        named = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        out, lse = cases.call(q[0], k[0], v[0], **named, causal=True, window=(31, 0))
        out, lse = out[None], lse[None]
    else:
        start = 0
        out, lse = cases.call(q, k, v, causal=True, window=(31, 0))
    for first in (start, rows // 2, 2**17 - 32, rows - 64):
        first = max(first, start)
        before = max(first - 31, start)
        part = slice(first, first + 64)
        oracle, lse_oracle = cases.plain(
            q[:, part].double(),
            k[:, before : first + 64].double(),
            v[:, before : first + 64].double(),
            causal=True,
            window=(31, 0),
        )
        torch.testing.assert_close(out[:, part].double(), oracle, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse[:, :, part].double(), lse_oracle, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("heads_kv, packed", [(1, False), (1, True), (128, False)])
def test_more_than_2_31_gradients(device, heads_kv, packed):
    """dq is larger than 2³¹ elements, without a hole; with as many heads of keys dk and dv are, too."""
    heads, head_dim, rows, left = 128, 128, 2**17 + 192, 31
    q, k, v = cases.make(device, DTYPE, batch=1, seqlen_q=rows, heads_q=heads, heads_kv=heads_kv, head_dim=head_dim)
    dout = torch.randn_like(q)
    options = {"causal": True, "window": (left, 0)}
    start = 2**17 - 100 if packed else 0  # the second of two sequences lies across the 2**31st element
    if packed:
        cu_seqlens = torch.tensor([0, start, rows], dtype=torch.int32, device=device)
        named = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        grads = cases.gradients(cases.call, q[0], k[0], v[0], dout[0], **options, **named)
        grads = {name: grad[None] for name, grad in grads.items()}
    else:
        grads = cases.gradients(cases.call, q, k, v, dout, **options)
    for first in (start, rows // 2, 2**17 - 32, rows - 64):
        first = max(first, start)
        # All queries that see the 64 keys from `first` on, and all keys that these queries see.
        before = max(first - left, start)
        own, queries, keys = slice(first, first + 64), slice(first, first + 64 + left), slice(before, first + 64 + left)
        x = (x.double() for x in (q[:, queries], k[:, keys], v[:, keys], dout[:, queries]))
        oracle = cases.gradients(cases.plain, *x, **options)
        skipped = first - before
        for name, skip in (("q", 0), ("k", skipped), ("v", skipped)):
            part, right = grads[name][:, own].double(), oracle[name][:, skip : skip + 64]
            scale = right.abs().max().item()
            torch.testing.assert_close(part, right, rtol=2e-2, atol=1e-2 * scale)


@pytest.mark.gpu
def test_many_batches_and_heads(device):
    """batch × heads past 65,535, the limit of two of a grid's three dimensions."""
    q, k, v = cases.make(device, DTYPE, batch=1100, seqlen_q=3, heads_q=64, heads_kv=8, head_dim=64)
    out, lse = cases.call(q, k, v, causal=True)
    for batch in (0, 1, 1099):
        alone, lse_alone = cases.check_forward(q[batch, None], k[batch, None], v[batch, None], causal=True)
        assert torch.equal(out[batch], alone[0]) and torch.equal(lse[batch], lse_alone[0])
    dout = torch.randn_like(q)
    grads = cases.gradients(cases.call, q, k, v, dout, causal=True, deterministic=True)
    for batch in (0, 1, 1099):
        alone = (x[batch, None] for x in (q, k, v, dout))
        for name, grad in cases.gradients(cases.call, *alone, causal=True, deterministic=True).items():
            torch.testing.assert_close(grads[name][batch], grad[0], rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_long_sequence(device):
    """One head over 200,000 keys: the sums of so many keys stay exact enough."""
    rows = 200_000
    q, k, v = cases.make(device, DTYPE, batch=1, seqlen_q=130, seqlen_k=rows, heads_q=1, head_dim=128)
    cases.check_gradients(q, k, v, causal=True)
    out = tilewright.attention(q, k, torch.ones_like(v))
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-2, atol=0)
