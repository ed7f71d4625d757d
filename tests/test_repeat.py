"""The same bits every run, whatever was in the memory that the results are put into."""

import cases
import pytest
import torch

import tilewright

NAN = float("nan")


def poison(*like):
    """Frees memory full of NaN of the sizes that come next: the allocator hands it back for the results."""
    blocks = [torch.full_like(x, NAN) for x in like for _ in range(3)]
    if like[0].is_cuda:  # small blocks for whatever the operators allocate for themselves
        blocks += [torch.full((n,), NAN, device=like[0].device) for n in (4, 64, 128, 1024, 8192) for _ in range(8)]
        torch.cuda.synchronize()
    del blocks


PROBLEMS = {
    "plain": ({"seqlen_q": 200, "seqlen_k": 300}, {}),
    "causal": ({"seqlen_q": 300, "seqlen_k": 200}, {"causal": True}),
    "window": ({"seqlen_q": 300}, {"window": (70, 10), "sink_tokens": 3, "softcap": 9.0}),
    "one query": ({"seqlen_q": 1, "seqlen_k": 700}, {}),
    "no keys": ({"seqlen_q": 100, "seqlen_k": 0}, {}),
    "unequal head dims": ({"seqlen_q": 150, "head_dim": 72, "head_dim_v": 40}, {"causal": True}),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_forward(device, dtype, name):
    shape, options = PROBLEMS[name]
    q, k, v = cases.make(device, dtype, heads_q=4, heads_kv=2, **shape)
    out, lse = cases.check_forward(q, k, v, **options)
    out, lse = out.clone(), lse.clone()
    for _ in range(4):
        poison(out, lse)
        out_again, lse_again = cases.call(q, k, v, **options)
        assert torch.equal(out_again, out) and torch.equal(lse_again, lse)
        del out_again, lse_again


def test_varlen(device, dtype):
    """Also the rows that belong to no sequence are written."""
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, [0, 150, 7], [3, 150, 20], first=140, tail=9, heads_q=4)
    out, lse = cases.check_forward(q, k, v, **cu_seqlens, causal=True)
    for _ in range(4):
        poison(out, lse)
        out_again, lse_again = cases.call(q, k, v, **cu_seqlens, causal=True)
        assert torch.equal(out_again, out) and torch.equal(lse_again, lse)


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients(device, dtype, name):
    shape, options = PROBLEMS[name]
    q, k, v = cases.make(device, dtype, heads_q=4, heads_kv=2, **shape)
    sinks = cases.make_sinks(4, device, dtype)
    dout = cases.normal(*q.shape[:-1], v.shape[-1], device=device, dtype=dtype)

    def run():
        return cases.gradients(cases.call, q, k, v, dout, deterministic=True, sinks=sinks, **options)

    first = run()
    for _ in range(3):
        poison(*first.values(), dout)
        for which, grad in run().items():
            assert torch.equal(grad, first[which]), which


def test_varlen_gradients(device, dtype):
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, [0, 90, 7], [3, 90, 20], first=70, tail=9)
    dout = cases.normal(*q.shape, device=device, dtype=dtype)
    first = cases.gradients(cases.call, q, k, v, dout, deterministic=True, causal=True, **cu_seqlens)
    for _ in range(3):
        poison(*first.values())
        again = cases.gradients(cases.call, q, k, v, dout, deterministic=True, causal=True, **cu_seqlens)
        for which, grad in again.items():
            assert torch.equal(grad, first[which]), which


def test_number_of_threads():
    """On the CPU the bits do not depend on it, forward and backward."""
    q, k, v = cases.make("cpu", torch.float32, seqlen_q=200, seqlen_k=260, heads_q=4, heads_kv=2)
    dout = torch.randn_like(q)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            grads = cases.gradients(cases.call, q, k, v, dout, causal=True, sinks=torch.zeros(4))
            results.append([tilewright.attention(q, k, v, causal=True), *grads.values()])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.gpu
def test_under_load(device, dtype):
    """Many tiles in flight, next to other kernels: what blocks take dynamically must not show in the bits."""
    q, k, v = cases.make(device, dtype, batch=4, seqlen_q=1500, heads_q=16, heads_kv=4, head_dim=128)
    lengths = [1000, 3, 1500, 700, 0, 2797]
    packed = cases.make_packed(device, dtype, lengths, heads_q=8, heads_kv=2, head_dim=128)
    busy = torch.randn(2048, 2048, device=device, dtype=dtype)
    first = None
    for _ in range(10):
        poison(q)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(5):
                busy @ busy
        results = [*cases.call(q, k, v, causal=True), *cases.call(*packed[:3], **packed[3], causal=True)]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))
        torch.cuda.synchronize()
