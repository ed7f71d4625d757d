"""The same bits every run, whatever was in the memory that the results are put into."""

import itertools

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


def check_bits_of_gradients(q, k, v, repeats=3, **options):
    """The same gradients from every call, in memory that held something else before. Returns them."""
    dout, dlse = cases.into_outputs(q, v)
    first = cases.gradients(cases.call, q, k, v, dout, dlse, deterministic=True, **options)
    for _ in range(repeats):
        poison(*first.values(), dout)
        again = cases.gradients(cases.call, q, k, v, dout, dlse, deterministic=True, **options)
        for which, grad in again.items():
            assert torch.equal(grad, first[which]), f"d{which} with {options}"
        del again
    return first


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients(device, dtype, name):
    shape, options = PROBLEMS[name]
    q, k, v = cases.make(device, dtype, heads_q=4, heads_kv=2, **shape)
    check_bits_of_gradients(q, k, v, sinks=cases.make_sinks(4, device, dtype), **options)


def test_varlen_gradients(device, dtype):
    """Also the rows that belong to no sequence are written."""
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, [0, 90, 7], [3, 90, 20], first=70, tail=9)
    grads = check_bits_of_gradients(q, k, v, causal=True, **cu_seqlens)
    for name in "qkv":
        assert (grads[name][:70] == 0).all() and (grads[name][-9:] == 0).all(), name


# Batch, seqlen and head_dim: on a GPU with 16 heads whole heads, additions, and second passes of every kind.
CHAINED = {
    "cpu": [(1, 80, 32)],
    "cuda": [(1, 200, 64), (1, 1100, 64), (8, 300, 64), (1, 300, 128), (2, 1100, 128), (2, 300, 192), (2, 300, 256)],
}


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["full", "causal"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_calls_that_feed_each_other(device, dtype, options, deterministic):
    """Each call takes what the one before writes last, in memory full of NaN. On a GPU a kernel starts while the one
    before it ends, and must not read too early: the same with a pause after every call, and with all of them queued."""
    ops = torch.ops.tilewright
    on_gpu = device == "cuda"
    for batch, seqlen, head_dim in CHAINED[device]:
        heads = 16 if on_gpu else 2
        q, k, v = cases.make(device, dtype, batch=batch, seqlen_q=seqlen, heads_q=heads, head_dim=head_dim)
        dout = torch.randn_like(q)

        def chain(pause, q=q, k=k, v=v, dout=dout):
            poison(q, k, v, dout)
            if on_gpu:
                torch.cuda._sleep(3_000_000)  # the host gets far ahead
            results = []
            for _ in range(3):
                out, lse = ops.attention(q, k, v, **options)
                pause()
                grads = ops.attention_backward(dout, None, q, k, v, out, lse, deterministic=deterministic, **options)
                pause()
                results += [out, lse, *grads[:3]]
                q, dout = out, grads[0]
            return results

        apart = chain(torch.cuda.synchronize if on_gpu else lambda: None)
        for _ in range(4):
            for x, y in zip(chain(lambda: None), apart, strict=True):
                if deterministic or not on_gpu:
                    assert torch.equal(x, y), (batch, seqlen, head_dim)
                else:
                    assert (x.double() - y.double()).norm() <= 0.01 * y.double().norm(), (batch, seqlen, head_dim)


MASKS = [{}, {"causal": True}, {"window": (70, 10), "sink_tokens": 3}, {"causal": True, "window": (150, 0)}]
# Of the GPU's kernels; a few tiles of keys, so that several blocks add to the same rows of dq where there is no second
# pass. (test_additions in test_backward_kernels.py has the kernels that have one here.)
DIMS = {"cpu": [(64, 64)], "cuda": [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (40, 72)]}
ROWS = {"cpu": 80, "cuda": 700}


@pytest.mark.parametrize("softcap", [0.0, 9.0])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_every_combination_of_features(device, mask, packed, softcap):
    rows, dtype = ROWS[device], torch.bfloat16
    for (head_dim, head_dim_v), heads_kv, with_sinks in itertools.product(DIMS[device], (4, 2, 1), (False, True)):
        shape = {"heads_q": 4, "heads_kv": heads_kv, "head_dim": head_dim, "head_dim_v": head_dim_v}
        options = {**mask, "softcap": softcap, "sinks": cases.make_sinks(4, device, dtype) if with_sinks else None}
        if packed:
            lengths_q, lengths_k = [rows // 3, 0, rows], [rows, 9, rows - 5]
            q, k, v, cu_seqlens = cases.make_packed(device, dtype, lengths_q, lengths_k, first=3, tail=2, **shape)
        else:
            q, k, v = cases.make(device, dtype, seqlen_q=rows, seqlen_k=rows + 30, **shape)
            cu_seqlens = {}
        check_bits_of_gradients(q, k, v, **options, **cu_seqlens)


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
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_under_load(device, dtype, head_dim):
    """Many tiles in flight, next to other kernels: what blocks take dynamically must not show in the bits."""
    heads = {"heads_q": 16, "heads_kv": 4}
    q, k, v = cases.make(device, dtype, batch=4, seqlen_q=1500, head_dim=head_dim, **heads)
    lengths = [1000, 3, 1500, 700, 0, 2797]
    *packed, cu_seqlens = cases.make_packed(device, dtype, lengths, head_dim=head_dim, **heads)
    dout, dout_packed = torch.randn_like(q), torch.randn_like(packed[0])
    busy = torch.randn(2048, 2048, device=device, dtype=dtype)
    options = {"causal": True, "deterministic": True}
    first = None
    for _ in range(10):
        poison(q)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(5):
                busy @ busy
        results, grads = cases.run(cases.call, q, k, v, dout, **options)
        results_packed, grads_packed = cases.run(cases.call, *packed, dout_packed, **cu_seqlens, **options)
        results = [*results, *results_packed, *grads.values(), *grads_packed.values()]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))
        torch.cuda.synchronize()
