"""The operators inside PyTorch: opcheck, torch.compile, export, autocast, streams, CUDA graphs."""

import concurrent.futures

import cases
import pytest
import torch

import tilewright
from tilewright.autograd import Attention, AttentionVarlen

OPTIONS = {"causal": True, "window": (20, 0), "sink_tokens": 2, "softcap": 8.0, "scale": 0.2}
KEYWORDS = {"causal": True, "window_left": 20, "window_right": 0, "sink_tokens": 2, "softcap": 8.0, "scale": 0.2}
DTYPE = torch.bfloat16  # taken by every device


def problem(device, dtype=DTYPE, *, packed=False, requires_grad=False):
    """q, k, v, [cu_seqlens_q, cu_seqlens_k,] sinks: the operators' tensors in their order."""
    shape = {"heads_q": 4, "heads_kv": 2, "head_dim": 16, "head_dim_v": 24}
    if packed:
        q, k, v, cu_seqlens = cases.make_packed(device, dtype, [9, 0, 21], [12, 4, 21], first=1, tail=2, **shape)
    else:
        q, k, v = cases.make(device, dtype, seqlen_q=9, seqlen_k=13, **shape)
        cu_seqlens = {}
    sinks = cases.make_sinks(4, device, dtype)
    for x in (q, k, v, sinks):
        x.requires_grad_(requires_grad)
    return q, k, v, *cu_seqlens.values(), sinks


@pytest.fixture(autouse=True)
def fresh_compiler():
    """The compiler's limit of recompilations is for the cases of one test, not of all that share its source."""
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_first_call_of_a_thread(device, packed):
    """A thread whose first work on the GPU is ours, with all memory out of the allocator's cache."""
    operator = torch.ops.tilewright.attention_varlen if packed else torch.ops.tilewright.attention
    gradient = torch.ops.tilewright.attention_varlen_backward if packed else torch.ops.tilewright.attention_backward
    q, k, v, *rest = problem(device, packed=packed)
    out, lse = operator(q, k, v, *rest, **KEYWORDS)

    def both():
        again = operator(q, k, v, *rest, **KEYWORDS)
        return *again, *gradient(torch.ones_like(out), None, q, k, v, out, lse, *rest, **KEYWORDS)

    expected = both()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        results = thread.submit(gradient, torch.ones_like(out), None, q, k, v, out, lse, *rest, **KEYWORDS).result()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        results = *thread.submit(operator, q, k, v, *rest, **KEYWORDS).result(), *results
    for result, want in zip(results, expected, strict=True):
        torch.testing.assert_close(result, want, rtol=2e-2, atol=2e-2, equal_nan=True)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(device, packed):
    """Schema, fake kernel, autograd registration, and tracing with symbolic shapes."""
    operator = torch.ops.tilewright.attention_varlen if packed else torch.ops.tilewright.attention
    tensors = problem(device, packed=packed, requires_grad=True)
    hints = {"max_seqlen_q": 21, "max_seqlen_k": 21} if packed else {}
    same_bits = {"deterministic": True}  # as they are compared
    torch.library.opcheck(operator.default, tensors, {**KEYWORDS, **hints, **same_bits}, atol=0, rtol=0)
    torch.library.opcheck(operator.default, tensors[:-1], same_bits, atol=0, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_of_the_backward(device, packed):
    name = "attention_varlen" if packed else "attention"
    tensors = problem(device, packed=packed)
    out, lse = getattr(torch.ops.tilewright, name)(*tensors, **KEYWORDS)
    operator = getattr(torch.ops.tilewright, f"{name}_backward").default
    q, k, v, *rest = tensors
    checks = ("test_schema", "test_faketensor")  # there is no second derivative to register
    for dlse in (None, torch.randn_like(lse)):
        dout = torch.randn_like(out)
        torch.library.opcheck(operator, (dout, dlse, q, k, v, out, lse, *rest), KEYWORDS, test_utils=checks)
        torch.library.opcheck(operator, (dout, dlse, q, k, v, out, lse, *rest[:-1]), KEYWORDS, test_utils=checks)


@pytest.mark.parametrize("packed", [False, True])
def test_torch_ops_says_the_same(device, dtype, packed):
    *tensors, sinks = problem(device, dtype, packed=packed)
    q, k, v, *cu_seqlens = tensors
    if packed:
        named = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens, strict=True))
        result = torch.ops.tilewright.attention_varlen(*tensors, sinks, **KEYWORDS)
        function = AttentionVarlen
    else:
        named = {}
        result = torch.ops.tilewright.attention(*tensors, sinks, **KEYWORDS)
        function = Attention
    expected = cases.call(q, k, v, sinks=sinks, **named, **OPTIONS)
    by_function = function.apply(*tensors, sinks, KEYWORDS)
    for ours, ops, applied in zip(expected, result, by_function, strict=True):
        assert torch.equal(ours, ops) and torch.equal(ours, applied)


@pytest.mark.parametrize("packed", [False, True])
def test_three_ways_to_one_gradient(device, packed):
    """tilewright.attention, torch.ops and the autograd.Function end in the same backward."""
    grads = []
    for way in ("function", "ops", "autograd"):
        torch.manual_seed(7)
        tensors = problem(device, packed=packed, requires_grad=True)
        q, k, v, *rest = tensors
        if way == "ops":
            operator = torch.ops.tilewright.attention_varlen if packed else torch.ops.tilewright.attention
            out, lse = operator(*tensors, **KEYWORDS, deterministic=True)
        elif way == "autograd":
            out, lse = (AttentionVarlen if packed else Attention).apply(*tensors, {**KEYWORDS, "deterministic": True})
        else:
            named = {"cu_seqlens_q": rest[0], "cu_seqlens_k": rest[1]} if packed else {}
            out, lse = cases.call(q, k, v, sinks=rest[-1], **named, **OPTIONS, deterministic=True)
        lse = lse.masked_fill(lse.isinf(), 0.0)
        grads.append(torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v, rest[-1])))
    for of_function, of_ops, of_autograd in zip(*grads, strict=True):
        assert torch.equal(of_function, of_ops) and torch.equal(of_function, of_autograd)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_compile(device, packed, dynamic):
    """One graph, forward and backward, the same bits as without the compiler."""

    def function(q, k, v, *rest):
        named = {"cu_seqlens_q": rest[0], "cu_seqlens_k": rest[1]} if packed else {}
        call = tilewright.attention_varlen if packed else tilewright.attention
        out, lse = call(q, k, v, **named, sinks=rest[-1], **OPTIONS, deterministic=True, return_lse=True)
        return out * 2, lse.masked_fill(lse.isinf(), 0.0)

    tensors = problem(device, packed=packed, requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected, result = function(*tensors), compiled(*tensors)
    for ours, right in zip(result, expected, strict=True):
        assert torch.equal(ours, right)
    leaves = (*tensors[:3], tensors[-1])
    into = [torch.randn_like(x) for x in result]
    grads, expected_grads = (torch.autograd.grad(x, leaves, into) for x in (result, expected))
    assert all(torch.equal(ours, right) for ours, right in zip(grads, expected_grads, strict=True))
    if dynamic and not packed:  # other lengths, the same graph
        q, k, v = cases.make(
            device, DTYPE, batch=3, seqlen_q=30, seqlen_k=20, heads_q=4, heads_kv=2, head_dim=16, head_dim_v=24
        )
        for ours, right in zip(compiled(q, k, v, tensors[-1]), function(q, k, v, tensors[-1]), strict=True):
            assert torch.equal(ours, right)


def test_compile_with_inductor(device):
    """The default compiler, which may choose other strides for what it hands to the operator."""

    def function(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return tilewright.attention(q, k, v, causal=True, deterministic=True)

    q, k, v = (x.transpose(1, 2).contiguous() for x in cases.make(device, DTYPE, seqlen_q=20, head_dim=16))
    for x in (q, k, v):
        x.requires_grad_()
    result, expected = torch.compile(function, fullgraph=True)(q, k, v), function(q, k, v)
    assert torch.equal(result, expected)
    dout = torch.randn_like(result)
    ours, right = (torch.autograd.grad(x, (q, k, v), dout) for x in (result, expected))
    assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_export(device, packed):
    class Module(torch.nn.Module):
        def forward(self, q, k, v, *rest):
            named = {"cu_seqlens_q": rest[0], "cu_seqlens_k": rest[1]} if packed else {}
            call = tilewright.attention_varlen if packed else tilewright.attention
            return call(q, k, v, **named, sinks=rest[-1], **OPTIONS, return_lse=True)

    tensors = problem(device, packed=packed)
    program = torch.export.export(Module(), tensors)
    assert any("tilewright.attention" in str(node.target) for node in program.graph.nodes)
    for ours, right in zip(program.module()(*tensors), Module()(*tensors), strict=True):
        assert torch.equal(ours, right)


def test_export_with_dynamic_lengths(device):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return tilewright.attention(q, k, v, causal=True)

    q, k, v = cases.make(device, DTYPE, seqlen_q=12, seqlen_k=17, head_dim=16)
    batch, rows, keys = (torch.export.Dim(name) for name in ("batch", "rows", "keys"))
    shapes = {"q": {0: batch, 1: rows}, "k": {0: batch, 1: keys}, "v": {0: batch, 1: keys}}
    program = torch.export.export(Module(), (q, k, v), dynamic_shapes=shapes)
    q, k, v = cases.make(device, DTYPE, batch=3, seqlen_q=30, seqlen_k=25, head_dim=16)
    assert torch.equal(program.module()(q, k, v), tilewright.attention(q, k, v, causal=True))


@pytest.mark.parametrize("packed", [False, True])
def test_fake_kernels(device, packed):
    """Meta tensors give meta results of the right shape, dtype and strides, for every dtype."""
    call = tilewright.attention_varlen if packed else tilewright.attention
    for dtype in (torch.bfloat16, torch.float16) if device == "cuda" else (torch.bfloat16, torch.float64):
        tensors = problem(device, dtype, packed=packed)
        results = []
        for target in (device, "meta"):
            q, k, v, *rest = (x.to(target) for x in tensors)
            named = {"cu_seqlens_q": rest[0], "cu_seqlens_k": rest[1]} if packed else {}
            out, lse = call(q, k, v, **named, sinks=rest[-1], **OPTIONS, return_lse=True)
            grads = cases.backward(q, k, v, out, lse, out=out, lse=lse, **named, sinks=rest[-1], **KEYWORDS)
            results.append([out, lse, *grads])
        for real, fake in zip(*results, strict=True):
            assert fake.device.type == "meta"
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_autocast(device):
    """q, k, v are cast to autocast's dtype; sinks are not, and float64 is never cast."""
    q, k, v = cases.make("cpu", torch.float32, seqlen_q=20, head_dim=16)
    q, k, v = q.to(device), k.to(device), v.to(device)
    sinks = cases.make_sinks(2, device, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        expected = cases.call(q.to(dtype), k.to(dtype), v.to(dtype), sinks=sinks, **OPTIONS)
        with torch.autocast(device, dtype=dtype):
            result = cases.call(q, k, v, sinks=sinks, **OPTIONS)
            mixed = cases.call(q.to(dtype), k, v, sinks=sinks, **OPTIONS)
            from_ops = torch.ops.tilewright.attention(q, k, v, sinks, **KEYWORDS)
        for ours, other, ops, right in zip(result, mixed, from_ops, expected, strict=True):
            assert ours.dtype == right.dtype
            assert torch.equal(ours, right) and torch.equal(other, right) and torch.equal(ops, right)
    if device == "cpu":
        with torch.autocast(device, dtype=torch.bfloat16):
            assert tilewright.attention(q.double(), k.double(), v.double()).dtype == torch.float64


def test_autocast_varlen(device):
    q, k, v, cu_seqlens = cases.make_packed("cpu", torch.float32, [5, 12], head_dim=16)
    q, k, v = q.to(device), k.to(device), v.to(device)
    cu_seqlens = {name: x.to(device) for name, x in cu_seqlens.items()}
    expected = tilewright.attention_varlen(q.bfloat16(), k.bfloat16(), v.bfloat16(), **cu_seqlens)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(tilewright.attention_varlen(q, k, v, **cu_seqlens), expected)


def test_grad_modes(device):
    q, k, v = (x.requires_grad_() for x in cases.make(device, DTYPE, seqlen_q=20))
    with torch.no_grad():
        out = tilewright.attention(q, k, v)
        assert not out.requires_grad and out.grad_fn is None
    with torch.inference_mode():
        assert torch.equal(tilewright.attention(q, k, v), out)
    inside, lse = tilewright.attention(q, k, v, return_lse=True)
    assert inside.requires_grad and lse.requires_grad and torch.equal(inside, out)


CALLS = {
    "function": lambda q, k, v: tilewright.attention(q, k, v),
    "operator": lambda q, k, v: torch.ops.tilewright.attention(q, k, v)[0],
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_forward_mode(device, call):
    """There is none: an error, not a result without a tangent."""
    q, k, v = cases.make(device, DTYPE, seqlen_q=5, head_dim=16)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        call(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)), k, v)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: call(x, k, v), (q,), (torch.ones_like(q),))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_forward_mode_through_the_gradient(device, call):
    """Nor there, where only what flows in has a tangent."""
    q, k, v = cases.make(device, DTYPE, seqlen_q=5, head_dim=16)
    q.requires_grad_()
    out = call(q, k, v)

    def gradient(dout):
        return torch.autograd.grad(out, q, dout, retain_graph=True)[0]

    dout = torch.ones_like(out)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(dout, dout)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            gradient(dual)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            cases.backward(q.detach(), k, v, dual)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(gradient, (dout,), (dout,))


def test_parameters_and_tensors(device):
    """nn.Parameter is a tensor like any other."""
    q, k, v = cases.make(device, DTYPE, seqlen_q=20)
    expected = tilewright.attention(q, k, v)
    assert torch.equal(tilewright.attention(torch.nn.Parameter(q), torch.nn.Parameter(k), v), expected)


@pytest.mark.gpu
def test_cuda_graph(device, dtype):
    """Captured once, replayed with other numbers: the bits of a plain call with them."""
    shape = {"seqlen_q": 300, "seqlen_k": 400, "heads_q": 4, "heads_kv": 2}
    q, k, v = cases.make(device, dtype, **shape)
    sinks = cases.make_sinks(4, device, dtype)
    graph, out, lse = _capture(lambda: cases.call(q, k, v, sinks=sinks, causal=True))
    for _ in range(3):
        for x, fresh in zip((q, k, v), cases.make(device, dtype, **shape), strict=True):
            x.copy_(fresh)
        sinks.normal_()
        graph.replay()
        expected, lse_expected = cases.call(q, k, v, sinks=sinks, causal=True)
        assert torch.equal(out, expected) and torch.equal(lse, lse_expected)


@pytest.mark.gpu
def test_cuda_graph_with_other_lengths(device, dtype):
    """cu_seqlens are changed in place between replays: nothing about them was read at capture."""
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, [100, 100, 100, 100], heads_q=4, heads_kv=2)
    graph, out, lse = _capture(lambda: cases.call(q, k, v, **cu_seqlens, causal=True, window=(90, 0)))
    for lengths_q, lengths_k in (
        ([400, 0, 0, 0], [400, 0, 0, 0]),
        ([1, 2, 300, 97], [90, 2, 8, 300]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
        ([10, 20, 30, 40], [40, 30, 20, 10]),
        ([130, 140, 0, 130], [0, 140, 130, 130]),
    ):
        cu_seqlens["cu_seqlens_q"].copy_(cases.cumulative(lengths_q, device))
        cu_seqlens["cu_seqlens_k"].copy_(cases.cumulative(lengths_k, device))
        graph.replay()
        expected, lse_expected = cases.check_forward(q, k, v, **cu_seqlens, causal=True, window=(90, 0))
        assert torch.equal(out, expected) and torch.equal(lse, lse_expected), (lengths_q, lengths_k)


def _capture(function):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = function()
    return graph, out, lse


@pytest.mark.gpu
def test_streams(device, dtype):
    """The kernels run on the current stream: they see what that stream wrote before, and need no other to wait."""
    q, k, v = cases.make(device, dtype, batch=4, seqlen_q=2000, heads_q=8)
    expected = tilewright.attention(q, k, v, causal=True)
    expected_grads = cases.gradients(cases.call, q, k, v, q, causal=True, deterministic=True)
    fresh = [torch.zeros_like(x) for x in (q, k, v)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for x, given in zip(fresh, (q, k, v), strict=True):
            x.copy_(given)
        out = tilewright.attention(*fresh, causal=True)
        grads = cases.gradients(cases.call, *fresh, fresh[0], causal=True, deterministic=True)
    stream.synchronize()
    assert torch.equal(out, expected)
    assert all(torch.equal(grads[name], expected_grads[name]) for name in "qkv")


@pytest.mark.gpu
def test_no_synchronisation(device, dtype):
    """No operator reads a device value back."""
    q, k, v, cu_seqlens = cases.make_packed(device, dtype, [100, 30])
    options = {"causal": True, "sinks": cases.make_sinks(2, device, dtype)}
    torch.cuda.set_sync_debug_mode("error")
    try:
        for deterministic in (False, True):
            options["deterministic"] = deterministic
            cases.gradients(cases.call, q, k, v, q, **cu_seqlens, **options)
            cases.gradients(cases.call, q[None], k[None], v[None], q[None], **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
