"""Bad input: one table of what is wrong, the exception, and the words in it: the argument, what it got, what it wants.

The same rows are called through torch.ops.tilewright where they can be said there.
"""

import cases
import pytest
import torch

import tilewright

ROW_LIMIT = 1_000_000_000


def good(device, dtype):
    q, k, v = cases.make(
        device, dtype, batch=2, seqlen_q=5, seqlen_k=7, heads_q=4, heads_kv=2, head_dim=16, head_dim_v=24
    )
    return {"q": q, "k": k, "v": v}


def good_packed(device, dtype):
    q, k, v, cu_seqlens = cases.make_packed(
        device, dtype, [2, 3], [3, 4], heads_q=4, heads_kv=2, head_dim=16, head_dim_v=24
    )
    return {"q": q, "k": k, "v": v, **cu_seqlens}


def every_other(x):
    """x with a last dimension of stride 2."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def widen(x, size):
    """x with another head_dim."""
    return x.new_zeros(*x.shape[:-1], size)


def huge(x):
    """x with a row more than there may be, in the memory of one."""
    return x[:1, :1].expand(1, ROW_LIMIT + 1, -1, -1)


# name: (what changes in a good call, exception, words)
BAD = {
    "q is no tensor": (lambda a: {"q": a["q"].tolist()}, TypeError, ["q"]),
    "k is None": (lambda a: {"k": None}, TypeError, ["k"]),
    "q of integers": (
        lambda a: {"q": a["q"].to(torch.int64)},
        (TypeError, ValueError),
        ["q must be", "bfloat16", "float16", "int64"],
    ),
    "q complex": (lambda a: {"q": a["q"].to(torch.complex64)}, (TypeError, ValueError), ["q must be", "complex64"]),
    "k of another dtype": (
        lambda a: {"k": a["k"].to(torch.int32)},
        (TypeError, ValueError),
        ["k must be", "like q", "int32"],
    ),
    "v of another dtype": (
        lambda a: {"v": a["v"].to(torch.int32)},
        (TypeError, ValueError),
        ["v must be", "like q", "int32"],
    ),
    "q without a batch": (lambda a: {"q": a["q"][0]}, ValueError, ["q", "rank 4", "rank 3", "(5, 4, 16)"]),
    "k without a batch": (lambda a: {"k": a["k"][0]}, ValueError, ["k", "rank 4", "rank 3", "(7, 2, 16)"]),
    "v of rank 5": (lambda a: {"v": a["v"][None]}, ValueError, ["v", "rank 4", "rank 5"]),
    "q a scalar": (lambda a: {"q": a["q"].sum()}, ValueError, ["q", "rank 4", "rank 0"]),
    "k of another batch": (lambda a: {"k": a["k"][:1]}, ValueError, ["k", "batch", "2", "1"]),
    "v of another batch": (lambda a: {"v": a["v"].repeat(2, 1, 1, 1)}, ValueError, ["v", "batch", "2", "4"]),
    "v of another length": (lambda a: {"v": a["v"][:, :6]}, ValueError, ["v", "seqlen_k", "7", "6"]),
    "v of other heads": (lambda a: {"v": a["v"][:, :, :1]}, ValueError, ["v", "heads", "2", "1"]),
    "heads that do not divide": (
        lambda a: {"k": a["k"][:, :, [0, 1, 0]], "v": a["v"][:, :, [0, 1, 0]]},
        ValueError,
        ["k", "heads", "divides", "4", "3"],
    ),
    "more key heads than query heads": (
        lambda a: {"q": a["q"][:, :, :1]},
        ValueError,
        ["k", "heads", "1", "2"],
    ),
    "no query heads": (lambda a: {"q": a["q"][:, :, :0]}, ValueError, ["q", "head", "0"]),
    "no key heads": (
        lambda a: {"k": a["k"][:, :, :0], "v": a["v"][:, :, :0]},
        ValueError,
        ["k", "heads", "0"],
    ),
    "k of another head_dim": (lambda a: {"k": widen(a["k"], 32)}, ValueError, ["k", "head_dim", "16", "32"]),
    "head_dim off 8": (
        lambda a: {"q": widen(a["q"], 12), "k": widen(a["k"], 12)},
        ValueError,
        ["q", "head_dim", "multiple of 8", "256", "12"],
    ),
    "head_dim over 256": (
        lambda a: {"q": widen(a["q"], 264), "k": widen(a["k"], 264)},
        ValueError,
        ["q", "head_dim", "256", "264"],
    ),
    "head_dim 0": (
        lambda a: {"q": widen(a["q"], 0), "k": widen(a["k"], 0)},
        ValueError,
        ["q", "head_dim", "8", "0"],
    ),
    "head_dim_v off 8": (lambda a: {"v": widen(a["v"], 20)}, ValueError, ["v", "head_dim", "multiple of 8", "20"]),
    "head_dim_v over 256": (lambda a: {"v": widen(a["v"], 512)}, ValueError, ["v", "head_dim", "256", "512"]),
    "q's last dimension": (lambda a: {"q": every_other(a["q"])}, ValueError, ["q", "contiguous", "stride 2"]),
    "k's last dimension": (lambda a: {"k": every_other(a["k"])}, ValueError, ["k", "contiguous", "stride 2"]),
    "v's last dimension": (lambda a: {"v": every_other(a["v"])}, ValueError, ["v", "contiguous", "stride 2"]),
    "v's last dimension expanded": (
        lambda a: {"v": a["v"][..., :1].expand_as(a["v"])},
        ValueError,
        ["v", "contiguous", "stride 0"],
    ),
    "too many queries": (
        lambda a: {"q": huge(a["q"]), "k": a["k"][:1], "v": a["v"][:1]},
        ValueError,
        ["q", "1,000,000,000", str(ROW_LIMIT + 1)],
    ),
    "too many keys": (
        lambda a: {"q": a["q"][:1], "k": huge(a["k"]), "v": huge(a["v"])},
        ValueError,
        ["k", "1,000,000,000", str(ROW_LIMIT + 1)],
    ),
    "window left of 0": (lambda a: {"window": (-1, 0)}, ValueError, ["window", "-1", "0 or"]),
    "window right of 0": (lambda a: {"window": (0, -2)}, ValueError, ["window", "-2", "0 or"]),
    "window of one": (lambda a: {"window": (3,)}, (TypeError, ValueError), ["window", "(3,)"]),
    "window of three": (lambda a: {"window": (1, 2, 3)}, (TypeError, ValueError), ["window", "(1, 2, 3)"]),
    "window a number": (lambda a: {"window": 5}, (TypeError, ValueError), ["window", "5"]),
    "window of fractions": (lambda a: {"window": (1.5, 0)}, (TypeError, ValueError), ["window", "1.5"]),
    "sink_tokens negative": (lambda a: {"sink_tokens": -3}, ValueError, ["sink_tokens", "0 or above, got -3"]),
    "softcap negative": (lambda a: {"softcap": -1.0}, ValueError, ["softcap", "-1", "0 or"]),
    "softcap NaN": (lambda a: {"softcap": float("nan")}, ValueError, ["softcap", "nan"]),
    "softcap infinite": (lambda a: {"softcap": float("inf")}, ValueError, ["softcap", "inf"]),
    "softcap too large": (lambda a: {"softcap": 1e39}, ValueError, ["softcap", "1e30", "1e+39"]),
    "softcap too small": (lambda a: {"softcap": 1e-50}, ValueError, ["softcap", "1e-30", "1e-50"]),
    "scale NaN": (lambda a: {"scale": float("nan")}, ValueError, ["scale", "nan"]),
    "scale infinite": (lambda a: {"scale": float("-inf")}, ValueError, ["scale", "inf"]),
    "scale too large": (lambda a: {"scale": -1e39}, ValueError, ["scale", "1e30", "-1e+39"]),
    "sinks too few": (
        lambda a: {"sinks": torch.zeros(3, device=a["q"].device)},
        ValueError,
        ["sinks", "heads_q", "(4,)", "(3,)"],
    ),
    "sinks of rank 2": (
        lambda a: {"sinks": torch.zeros(4, 1, device=a["q"].device)},
        ValueError,
        ["sinks", "(4,)", "(4, 1)"],
    ),
    "sinks of another dtype": (
        lambda a: {"sinks": torch.zeros(4, device=a["q"].device, dtype=torch.bfloat16)},
        (TypeError, ValueError),
        ["sinks", "float32", "bfloat16"],
    ),
    "sinks not contiguous": (
        lambda a: {"sinks": torch.zeros(8, device=a["q"].device)[::2]},
        ValueError,
        ["sinks", "contiguous", "2"],
    ),
}

# Devices other than that of q: "meta" is there on every machine.
BAD_DEVICE = {
    "k elsewhere": (lambda a: {"k": a["k"].to("meta")}, ValueError, ["k", "device", "meta"]),
    "v elsewhere": (lambda a: {"v": a["v"].to("meta")}, ValueError, ["v", "device", "meta"]),
    "q elsewhere": (lambda a: {"q": a["q"].to("meta")}, ValueError, ["device", "meta"]),
    "sinks elsewhere": (lambda a: {"sinks": torch.zeros(4, device="meta")}, ValueError, ["sinks", "device", "meta"]),
}

BAD_PACKED = {
    "q with a batch": (lambda a: {"q": a["q"][None]}, ValueError, ["q", "rank 3", "rank 4"]),
    "v of another length": (lambda a: {"v": a["v"][:6]}, ValueError, ["v", "7", "6"]),
    "cu_seqlens_q of int64": (
        lambda a: {"cu_seqlens_q": a["cu_seqlens_q"].long()},
        (TypeError, ValueError),
        ["cu_seqlens_q", "int32", "int64"],
    ),
    "cu_seqlens_k of floats": (
        lambda a: {"cu_seqlens_k": a["cu_seqlens_k"].float()},
        (TypeError, ValueError),
        ["cu_seqlens_k", "int32", "float32"],
    ),
    "cu_seqlens_q of rank 2": (
        lambda a: {"cu_seqlens_q": a["cu_seqlens_q"][None]},
        ValueError,
        ["cu_seqlens_q", "rank 1", "rank 2"],
    ),
    "cu_seqlens_q empty": (
        lambda a: {"cu_seqlens_q": a["cu_seqlens_q"][:0], "cu_seqlens_k": a["cu_seqlens_k"][:0]},
        ValueError,
        ["cu_seqlens_q", "batch + 1", "0"],
    ),
    "cu_seqlens of two lengths": (
        lambda a: {"cu_seqlens_k": a["cu_seqlens_k"][:2]},
        ValueError,
        ["cu_seqlens_k", "length", "3", "2"],
    ),
    "cu_seqlens_q not contiguous": (
        lambda a: {"cu_seqlens_q": a["cu_seqlens_q"].repeat_interleave(2)[::2]},
        ValueError,
        ["cu_seqlens_q", "contiguous", "2"],
    ),
    "cu_seqlens_q missing": (lambda a: {"cu_seqlens_q": None}, TypeError, ["cu_seqlens_q"]),
    "cu_seqlens_k a list": (lambda a: {"cu_seqlens_k": [0, 3, 7]}, TypeError, ["cu_seqlens_k"]),
    "max_seqlen_q negative": (lambda a: {"max_seqlen_q": -1}, ValueError, ["max_seqlen_q", "-1", "0 or"]),
    "max_seqlen_k negative": (lambda a: {"max_seqlen_k": -5}, ValueError, ["max_seqlen_k", "-5", "0 or"]),
}

# What only the CPU can see before the launch.
BAD_VALUES = {
    "cu_seqlens_q decreasing": ([0, 4, 2], [0, 3, 7], ["cu_seqlens_q", "decrease", "2"]),
    "cu_seqlens_k decreasing": ([0, 2, 5], [0, 7, 3], ["cu_seqlens_k", "decrease", "3"]),
    "cu_seqlens_q past the end": ([0, 2, 6], [0, 3, 7], ["cu_seqlens_q", "5", "6"]),
    "cu_seqlens_k past the end": ([0, 2, 5], [0, 3, 99], ["cu_seqlens_k", "7", "99"]),
    "cu_seqlens_q negative": ([-1, 2, 5], [0, 3, 7], ["cu_seqlens_q", "0 or above", "-1"]),
}


FUNCTIONS = {"attention": (good, tilewright.attention), "attention_varlen": (good_packed, tilewright.attention_varlen)}


def says(error, words):
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


def check(operator, device, change, exception, words):
    """One row of a table, by the public function and by torch.ops."""
    make, function = FUNCTIONS[operator]
    arguments = make(device, torch.bfloat16)
    tensors = set(arguments)
    function(**arguments)  # what the row starts from is good
    arguments |= change(arguments)
    with pytest.raises(exception) as error:
        function(**arguments)
    says(error, words)

    window = arguments.pop("window", (None, None))
    in_schema = isinstance(window, tuple) and len(window) == 2 and 1.5 not in window
    if not in_schema or not all(isinstance(arguments[name], torch.Tensor) for name in tensors):
        return  # torch itself answers for a call that does not fit the schema
    # From torch.ops an error of ours may be a RuntimeError, but says the same.
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        getattr(torch.ops.tilewright, operator)(**arguments, window_left=window[0], window_right=window[1])
    says(error, words)


@pytest.mark.parametrize("name", BAD)
def test_attention(device, name):
    check("attention", device, *BAD[name])


@pytest.mark.parametrize("name", BAD_PACKED)
def test_attention_varlen(device, name):
    check("attention_varlen", device, *BAD_PACKED[name])


@pytest.mark.parametrize("operator", FUNCTIONS)
def test_beyond_64_bits(device, operator):
    """Where torch itself would not say which argument it was."""
    make, function = FUNCTIONS[operator]
    for name, value in (("window", (2**63, 0)), ("sink_tokens", 2**70), ("scale", -(10**400)), ("softcap", 10**20)):
        with pytest.raises(ValueError) as error:
            function(**make(device, torch.bfloat16), **{name: value})
        says(error, [name, "2**63", str(value)])


@pytest.mark.parametrize("operator", FUNCTIONS)
def test_return_lse(device, operator):
    make, function = FUNCTIONS[operator]
    with pytest.raises(TypeError) as error:
        function(**make(device, torch.bfloat16), return_lse="no")
    says(error, ["return_lse", "a bool", "str"])


@pytest.mark.parametrize("name", BAD_DEVICE)
@pytest.mark.parametrize("operator", FUNCTIONS)
def test_other_device(device, operator, name):
    check(operator, device, *BAD_DEVICE[name])


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_cu_seqlens_on_another_device(device, name):
    check("attention_varlen", device, lambda a: {name: a[name].to("meta")}, ValueError, [name, "device", "meta"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"])
def test_cpu_and_gpu(device, name):
    words = ["device", "cpu", "cuda:0"] + ([name] if name != "q" else [])
    check("attention_varlen", device, lambda a: {name: a[name].cpu()}, ValueError, words)
    if name in "qkv":
        check("attention", device, lambda a: {name: a[name].cpu()}, ValueError, words)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype_on_cpu_only", [torch.float32, torch.float64])
def test_dtypes_of_the_cpu_on_a_gpu(device, dtype_on_cpu_only):
    def change(arguments):
        return {name: x.to(dtype_on_cpu_only) for name, x in arguments.items() if x.is_floating_point()}

    words = ["q must be", "bfloat16 or float16", "CUDA", str(dtype_on_cpu_only).removeprefix("torch.")]
    for operator in FUNCTIONS:
        check(operator, device, change, (TypeError, ValueError), words)


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_of_cu_seqlens(name):
    """Only the CPU can see them before the launch; test_varlen.py has what a GPU does."""
    bounds_q, bounds_k, words = BAD_VALUES[name]
    bounds = (torch.tensor(bounds, dtype=torch.int32) for bounds in (bounds_q, bounds_k))
    change = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), bounds, strict=True))
    check("attention_varlen", "cpu", lambda _: change, ValueError, words)


def test_float64_sinks():
    """The dtype of sinks follows that of lse."""
    q, k, v = cases.make("cpu", torch.float64, seqlen_q=4)
    with pytest.raises((TypeError, ValueError)) as error:
        tilewright.attention(q, k, v, sinks=torch.zeros(2))
    says(error, ["sinks", "float64", "float32"])


# What changes in a good call of a gradient operator, and the words: the argument, what it wants, what it got.
BAD_BACKWARD = {
    "dout of other rows": (lambda a: {"dout": a["dout"][..., :1, :, :]}, ["dout", "head_dim_v", "got"]),
    "dout of q's head_dim": (lambda a: {"dout": a["q"]}, ["dout", "head_dim_v", "24", "16"]),
    "dout of another rank": (lambda a: {"dout": a["dout"][None]}, ["dout"]),
    "dout of another dtype": (lambda a: {"dout": a["dout"].double()}, ["dout", "like q", "float64"]),
    "out of other heads": (lambda a: {"out": a["out"][..., :2, :]}, ["out", "heads_q", "got"]),
    "out of another dtype": (lambda a: {"out": a["out"].float()}, ["out", "like q", "float32"]),
    "lse of other rows": (lambda a: {"lse": a["lse"][..., 1:]}, ["lse", "heads_q", "got"]),
    "lse of another dtype": (lambda a: {"lse": a["lse"].to(a["q"].dtype)}, ["lse", "float32", "bfloat16"]),
    "dlse transposed": (lambda a: {"dlse": a["lse"].mT}, ["dlse", "heads_q", "got"]),
    "dlse of another dtype": (lambda a: {"dlse": a["lse"].double()}, ["dlse", "float32", "float64"]),
    "q of another rank": (lambda a: {"q": a["q"][0]}, ["q", "rank"]),
    "k of another head_dim": (lambda a: {"k": widen(a["k"], 32)}, ["k", "head_dim", "16", "32"]),
    "v of other heads": (lambda a: {"v": a["v"][..., :1, :]}, ["v", "heads", "2", "1"]),
    "k's last dimension": (lambda a: {"k": every_other(a["k"])}, ["k", "contiguous", "stride 2"]),
    "sinks too few": (lambda a: {"sinks": a["lse"].new_zeros(3)}, ["sinks", "(4,)", "(3,)"]),
    "window negative": (lambda a: {"window_left": -1}, ["window", "-1"]),
    "softcap negative": (lambda a: {"softcap": -2.0}, ["softcap", "-2"]),
    "scale NaN": (lambda a: {"scale": float("nan")}, ["scale", "nan"]),
    "sink_tokens negative": (lambda a: {"sink_tokens": -3}, ["sink_tokens", "-3"]),
}
BAD_PACKED_BACKWARD = {
    "cu_seqlens_q of int64": (lambda a: {"cu_seqlens_q": a["cu_seqlens_q"].long()}, ["cu_seqlens_q", "int32", "int64"]),
    "cu_seqlens of two lengths": (lambda a: {"cu_seqlens_k": a["cu_seqlens_k"][:2]}, ["cu_seqlens_k", "3", "2"]),
    "max_seqlen_q negative": (lambda a: {"max_seqlen_q": -1}, ["max_seqlen_q", "-1"]),
}


def check_backward(operator, device, change, words):
    """The gradient operators are public too, as torch.ops.tilewright.*_backward."""
    make, function = FUNCTIONS[operator]
    arguments = make(device, torch.bfloat16)
    out, lse = function(**arguments, return_lse=True)
    arguments |= {"dout": torch.randn_like(out), "dlse": None, "out": out, "lse": lse}
    backward = getattr(torch.ops.tilewright, f"{operator}_backward")
    backward(**arguments)
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        backward(**{**arguments, **change(arguments)})
    says(error, words)


@pytest.mark.parametrize("operator", FUNCTIONS)
@pytest.mark.parametrize("name", BAD_BACKWARD)
def test_backward(device, operator, name):
    check_backward(operator, device, *BAD_BACKWARD[name])


@pytest.mark.parametrize("name", BAD_PACKED_BACKWARD)
def test_varlen_backward(device, name):
    check_backward("attention_varlen", device, *BAD_PACKED_BACKWARD[name])


@pytest.mark.gpu
@pytest.mark.parametrize("operator", FUNCTIONS)
@pytest.mark.parametrize("name", ["dout", "out", "lse"])
def test_backward_of_cpu_and_gpu(device, operator, name):
    check_backward(operator, device, lambda a: {name: a[name].cpu()}, [name, "device", "cpu", "cuda:0"])
