"""Views with every kind of strides, for tensors that an operator reads."""

import torch

LAYOUTS = [
    "head major",
    "row major",
    "sliced from packed qkv",
    "every other",
    "padded rows",
    "odd stride",
    "odd offset",
    "expanded batch",
    "expanded heads",
]
# What autograd also hands to a backward: its last dimension need not be contiguous.
GRADIENT_LAYOUTS = ["expanded", "transposed", "every other element"]


def lay_out(x, layout):
    """x, (batch, seqlen, heads, head_dim), again in memory that is otherwise NaN; expanded: a part of it, repeated."""
    batch, seqlen, heads, dim = x.shape
    nan = {"device": x.device, "dtype": x.dtype, "fill_value": float("nan")}
    if layout == "contiguous":
        return x.contiguous()
    elif layout == "head major":
        view = torch.full((batch, heads, seqlen, dim), **nan).transpose(1, 2)
    elif layout == "row major":
        view = torch.full((seqlen, batch, heads, dim), **nan).transpose(0, 1)
    elif layout == "sliced from packed qkv":
        view = torch.full((batch, seqlen, 3, heads, dim), **nan)[:, :, 1]
    elif layout == "every other":
        view = torch.full((batch * 2, seqlen * 3, heads * 2, dim), **nan)[::2, ::3, ::2]
    elif layout == "padded rows":
        view = torch.full((batch, seqlen, heads, dim + 8), **nan)[..., :dim]
    elif layout == "odd stride":
        view = torch.full((batch, seqlen, heads, dim + 1), **nan)[..., :dim]
    elif layout == "odd offset":
        view = torch.full((batch * seqlen * heads * dim + 1,), **nan)[1:].view(x.shape)
    elif layout == "transposed":
        view = torch.full((batch, seqlen, dim, heads), **nan).transpose(2, 3)
    elif layout == "every other element":
        view = torch.full((batch, seqlen, heads, 2 * dim), **nan)[..., ::2]
    elif layout == "expanded batch":
        return x[:1].expand_as(x)
    elif layout == "expanded heads":
        return x[:, :, :1].expand_as(x)
    elif layout == "expanded":  # the gradient of a sum
        return x.flatten()[0].expand_as(x)
    else:
        raise AssertionError(layout)
    view.copy_(x)
    return view
