"""Training: autocast, checkpointing, saved tensors, compiled and captured steps, memory; no gradient is dropped."""

import itertools

import cases
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tilewright
from tilewright.autograd import Attention, AttentionVarlen

OPTIONS = {"causal": True, "window": (20, 0), "sink_tokens": 2, "softcap": 8.0, "scale": 0.2, "deterministic": True}
DTYPE = torch.bfloat16  # taken by every device


@pytest.fixture(autouse=True)
def fresh_compiler():
    """The compiler's limit of recompilations is for the cases of one test, not of all that share its source."""
    torch.compiler.reset()


def by_function(q, k, v, sinks, cu_seqlens):
    named = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens, strict=False))
    return cases.call(q, k, v, sinks=sinks, causal=True, deterministic=True, **named)


def by_operator(q, k, v, sinks, cu_seqlens):
    operator = torch.ops.tilewright.attention_varlen if cu_seqlens else torch.ops.tilewright.attention
    return operator(q, k, v, *cu_seqlens, sinks, causal=True, deterministic=True)


def by_autograd_function(q, k, v, sinks, cu_seqlens):
    function = AttentionVarlen if cu_seqlens else Attention
    return function.apply(q, k, v, *cu_seqlens, sinks, {"causal": True, "deterministic": True})


def compiled(q, k, v, sinks, cu_seqlens):
    return torch.compile(by_function, fullgraph=True, backend="aot_eager")(q, k, v, sinks, cu_seqlens)


def checkpointed(q, k, v, sinks, cu_seqlens):
    return checkpoint(by_function, q, k, v, sinks, cu_seqlens, use_reentrant=False)


def checkpointed_reentrant(q, k, v, sinks, cu_seqlens):
    return checkpoint(by_function, q, k, v, sinks, cu_seqlens, use_reentrant=True)


def under_autocast(q, k, v, sinks, cu_seqlens):
    with torch.autocast(q.device.type, DTYPE):
        return by_function(q, k, v, sinks, cu_seqlens)


WAYS = [
    by_function,
    by_operator,
    by_autograd_function,
    compiled,
    checkpointed,
    checkpointed_reentrant,
    under_autocast,
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_nothing_is_dropped(device, way, packed):
    """Each input that asks for a gradient gets it, alone or with others, from each output, whatever lies between."""
    shape = {"heads_q": 4, "heads_kv": 2, "head_dim": 16}
    if packed:
        q, k, v, named = cases.make_packed(device, DTYPE, [9, 21], [12, 21], first=1, tail=2, **shape)
    else:
        q, k, v = cases.make(device, DTYPE, seqlen_q=9, seqlen_k=13, **shape)
        named = {}
    given = [q, k, v, cases.make_sinks(4, device, DTYPE)]
    dout, dlse = cases.into_outputs(q, v)
    expected = []
    for into in ((dout, None), (None, dlse)):
        grads = cases.gradients(cases.call, q, k, v, *into, causal=True, deterministic=True, sinks=given[3], **named)
        expected.append(list(grads.values()))
    wanted = [set(range(4)), *({i} for i in range(4)), {0, 3}, {1, 2}]
    if way is compiled:  # a compilation each
        wanted = [set(range(4)), {3}]
    for asked, (through, into) in itertools.product(wanted, enumerate((dout, dlse))):
        if through == 1 and asked == {2}:
            continue  # lse does not depend on v
        inputs = [x.detach().clone().requires_grad_(i in asked) for i, x in enumerate(given)]
        result = way(*inputs, tuple(named.values()))[through]
        assert result.requires_grad
        result.backward(into)
        for i, x in enumerate(inputs):
            if i in asked and not (through == 1 and i == 2):
                assert x.grad is not None and torch.equal(x.grad, expected[through][i]), (through, asked, i)
                assert (x.grad != 0).any()
            else:
                assert x.grad is None or (x.grad == 0).all()


def test_a_scale_that_asks_for_a_gradient(device):
    """It would get none: a TypeError."""
    q, k, v = cases.make(device, DTYPE, seqlen_q=5)
    number = torch.tensor(0.5, requires_grad=True)
    for name in ("scale", "softcap"):
        with pytest.raises(TypeError, match=name):
            tilewright.attention(q, k, v, **{name: number})


def test_keywords_used_again(device):
    """A dict that changes between forward and backward does not change the gradient."""
    q, k, v = cases.make(device, DTYPE, seqlen_q=20)
    expected = cases.gradients(cases.call, q, k, v, q, causal=True)["v"]
    v.requires_grad_()
    keywords = {"causal": True}
    out, _ = Attention.apply(q, k, v, None, keywords)
    keywords["causal"] = False
    assert torch.equal(torch.autograd.grad(out, v, q)[0], expected)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev], ids=lambda f: f.__name__)
def test_torch_func_refuses(device, transform):
    q, k, v = cases.make(device, DTYPE, seqlen_q=5, head_dim=16)
    for call in (tilewright.attention, lambda *x: torch.ops.tilewright.attention(*x)[0]):
        with pytest.raises(RuntimeError, match="functorch|torch.func"):
            transform(lambda x, call=call: call(x, k, v).float().sum())(q)


def test_autocast(device):
    """The gradients come back in the dtype of what was cast."""
    q, k, v = (x.requires_grad_() for x in cases.make(device, torch.float32, seqlen_q=20, head_dim=16))
    sinks = cases.make_sinks(2, device, torch.float32).requires_grad_()
    low = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    with torch.autocast(device, dtype=torch.bfloat16):
        out = tilewright.attention(q, k, v, sinks=sinks, **OPTIONS)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v, sinks), dout)
    expected = torch.autograd.grad(tilewright.attention(*low, sinks=sinks, **OPTIONS), (*low, sinks), dout)
    for ours, right in zip(grads, expected, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, right.float())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_under_autocast(device, use_reentrant):
    """What is computed again is computed in autocast's dtype again."""
    q, k, v = (x.requires_grad_() for x in cases.make(device, torch.float32, seqlen_q=20, head_dim=16))

    def block(q, k, v):
        return tilewright.attention(q, k, v, **OPTIONS).sin()

    with torch.autocast(device, dtype=torch.bfloat16):
        expected = torch.autograd.grad(block(q, k, v).float().square().sum(), (q, k, v))
        loss = checkpoint(block, q, k, v, use_reentrant=use_reentrant).float().square().sum()
    loss.backward()
    for x, right in zip((q, k, v), expected, strict=True):
        assert torch.equal(x.grad, right)


def test_saved_tensor_hooks(device):
    """What the backward reads goes through the hooks (offloading to the CPU is one): q, k, v, out, lse and sinks."""
    leaves = [x.requires_grad_() for x in cases.make(device, DTYPE, seqlen_q=30, head_dim=16)]
    sinks = cases.make_sinks(2, device, DTYPE).requires_grad_()
    dout = torch.randn_like(leaves[0])
    expected = torch.autograd.grad(tilewright.attention(*leaves, sinks=sinks, **OPTIONS), [*leaves, sinks], dout)
    packed, unpacked = [], []

    def pack(x):
        packed.append(x.shape)
        return x.detach().cpu()

    def unpack(x):
        unpacked.append(x.shape)
        return x.to(device)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = tilewright.attention(*leaves, sinks=sinks, **OPTIONS)
    grads = torch.autograd.grad(out, [*leaves, sinks], dout)
    assert len(packed) == 6 and packed == unpacked
    assert all(torch.equal(ours, right) for ours, right in zip(grads, expected, strict=True))


def test_inputs_changed_before_the_backward(device):
    """The backward reads q, k, v, out, lse and cu_seqlens again: when one has changed since, that is an error."""
    for changed in range(7):
        q, k, v, cu_seqlens = cases.make_packed(device, DTYPE, [5, 12], head_dim=16)
        saved = [q, k, v, *cu_seqlens.values()]
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = cases.call(*leaves, **cu_seqlens)
        loss = (out * 2).sum()
        with torch.no_grad():
            [*saved, out, lse][changed].add_(0)
        with pytest.raises(RuntimeError, match="inplace"):
            loss.backward()


class Layer(nn.Module):
    """One layer of a language model over packed sequences."""

    def __init__(self, dim=64, heads=4):
        super().__init__()
        self.heads = heads
        self.sinks = nn.Parameter(torch.zeros(heads))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, cu_seqlens):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        bounds = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        options = {"sinks": self.sinks, "causal": True, "deterministic": True}
        return x + self.proj(tilewright.attention_varlen(q, k, v, **bounds, **options).flatten(1))


def make_step(device, optimizer):
    """A model, its optimizer, and a function that does one step of the training and returns the loss."""
    torch.manual_seed(3)
    model = Layer().to(device)
    optimizer = optimizer(model.parameters())

    def step(x, target, cu_seqlens, forward=model):
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(device, DTYPE):
            out = forward(x, cu_seqlens)
        loss = (out.float() - target).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    for parameter in model.parameters():  # a captured step must find them where they stay
        parameter.grad = torch.zeros_like(parameter)
    return model, optimizer, step


def batches(device, count, rows=70):
    """Other numbers and other lengths each, of the same total."""
    lengths = ([10, 0, 60], [30, 30, 10], [70, 0, 0], [1, 2, 3], [23, 23, 24])
    for i in range(count):
        x, target = torch.randn(rows, 64, device=device), torch.randn(rows, 64, device=device)
        yield x, target, cases.cumulative(lengths[i % len(lengths)], device)


def test_compiled_step(device):
    """Some steps with the compiled model end in the weights that the same steps without the compiler end in."""
    data = list(batches(device, 3))
    models, losses = [], []
    for use_compiler in (False, True):
        model, _, step = make_step(device, lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if use_compiler else model
        losses.append([step(*batch, forward=forward).item() for batch in data])
        models.append(model)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][0] != losses[0][1]
    for (name, ours), right in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-3, msg=name)
    assert models[0].sinks.abs().max() > 0


@pytest.mark.gpu
def test_captured_step(device):
    """Forward, backward and optimiser in one CUDA graph, replayed with other data and other lengths."""

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    data = list(batches(device, 6))
    model, _, step = make_step(device, sgd)
    expected = [step(*batch) for batch in data]

    captured_model, optimizer, captured_step = make_step(device, sgd)
    fixed = [x.clone() for x in data[0]]
    start = [x.detach().clone() for x in captured_model.parameters()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured_step(*fixed)  # also makes the optimiser's state
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = captured_step(*fixed)
    with torch.no_grad():  # as if nothing had been trained yet
        for parameter, value in zip(captured_model.parameters(), start, strict=True):
            parameter.copy_(value)
        for state in optimizer.state.values():
            state["momentum_buffer"].zero_()
    for batch, right in zip(data, expected, strict=True):
        for x, value in zip(fixed, batch, strict=True):
            x.copy_(value)
        graph.replay()
        torch.testing.assert_close(loss, right, rtol=1e-3, atol=1e-4)
    for (name, ours), right in zip(captured_model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-2, atol=1e-3, msg=name)
    assert model.sinks.abs().max() > 0


def workspace(heads, heads_kv, rows, sequences, head_dim, head_dim_v, softcap):
    """Bytes that docs/backward.md allows the backward beside its gradients, for `rows` queries and as many keys."""
    sizes = [(128, 128), (192, 128), (256, 256)]
    if not softcap:
        sizes = [(64, 64), (96, 96), *sizes]
    head_dim, head_dim_v = next((d, d_v) for d, d_v in sizes if d >= head_dim and d_v >= head_dim_v)
    of_dq = 0 if head_dim == 256 else 4 * head_dim  # a second pass needs no sums
    of_splits = 4 * (head_dim + head_dim_v) + 1 if heads > heads_kv else 0
    padded = rows + 128 * sequences  # to whole tiles, each sequence
    return heads * padded * (of_dq + 9) + padded * (1 + heads_kv * of_splits) + (1 << 20)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "head_dim, head_dim_v, softcap",
    [(64, 64, 0), (96, 96, 0), (128, 128, 0), (192, 128, 0), (256, 256, 0), (72, 40, 0), (64, 64, 30), (128, 128, 30)],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_peak_memory(device, head_dim, head_dim_v, softcap, packed, deterministic):
    """The gradients and the documented workspace, and nothing of size seqlen² or a copy a head of dk and dv."""
    heads_q, heads_kv, rows = 8, 1, 8192
    q, k, v = cases.make(
        device,
        DTYPE,
        batch=1,
        seqlen_q=rows,
        heads_q=heads_q,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
    )
    named, sequences = {}, 1
    if packed:
        q, k, v = q[0], k[0], v[0]
        lengths, sequences = [1000, 3000, 0, 4192], 4 + 2
        named = {"cu_seqlens_q": cases.cumulative(lengths, device), "cu_seqlens_k": cases.cumulative(lengths, device)}
    options = {"causal": True, "deterministic": deterministic, "sinks": cases.make_sinks(heads_q, device, DTYPE)}
    options["softcap"] = float(softcap)
    out, lse = cases.call(q, k, v, **named, **options)
    dout = torch.randn_like(out)
    cases.backward(q, k, v, dout, out=out, lse=lse, **named, **options)  # what stays: modules, counters
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    grads = cases.backward(q, k, v, dout, out=out, lse=lse, **named, **options)
    torch.cuda.synchronize()
    # What is asked for: the allocator may give a larger block that is free.
    used = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    of_gradients = sum(x.numel() * x.element_size() for x in grads)
    allowed = of_gradients + workspace(heads_q, heads_kv, rows, sequences, head_dim, head_dim_v, softcap)
    assert of_gradients <= used <= allowed, (
        f"{used:,} bytes, of which the gradients {of_gradients:,}; up to {allowed:,}"
    )
    assert allowed < heads_q * rows * rows  # a byte a score would be seen


@pytest.mark.gpu
def test_memory_of_the_forward_with_a_gradient(device):
    """It keeps out and lse, nothing else."""
    q, k, v = (x.requires_grad_() for x in cases.make(device, DTYPE, seqlen_q=2048, heads_q=8, head_dim=128))
    tilewright.attention(q, k, v, causal=True)
    before = torch.cuda.memory_allocated()
    out = tilewright.attention(q, k, v, causal=True)
    kept = torch.cuda.memory_allocated() - before
    assert kept <= out.numel() * out.element_size() + 4 * out.numel() // 128 + (1 << 16)
