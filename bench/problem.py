"""One attention problem: its shape, its mask, and the only place that counts FLOPs and bytes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

# What is timed of a problem, and its matrix products against the forward's two: the backward has five (S and dP again,
# dV, dK, dQ); training is both.
WORK = {"forward": 1.0, "backward": 2.5, "training": 3.5}


@dataclass(frozen=True)
class Problem:
    """What one row of a table times. ``lengths`` holds (seqlen_q, seqlen_k) of each sequence of the batch."""

    lengths: tuple[tuple[int, int], ...]
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    sink_tokens: int = 0
    softcap: float = 0.0
    packed: bool = False
    label: str = ""

    @property
    def mask(self) -> str:
        """The mask in words: full, causal, window(1024,0), with sink tokens and softcap where there are any."""
        left, right = self.bounds()
        words = "causal" if self.causal else "full"
        if left is not None or (right is not None and not self.causal):
            words = f"window({left},{right})"
        if self.sink_tokens:
            words += f" sink_tokens {self.sink_tokens}"
        return words + (f" softcap {self.softcap:g}" if self.softcap else "")

    @property
    def shape(self) -> str:
        """The shape in words, b 4 s 4096 h 32/8 d 128."""
        heads = f"{self.heads_q}" if self.heads_q == self.heads_kv else f"{self.heads_q}/{self.heads_kv}"
        dims = f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        if len(set(self.lengths)) == 1:
            seqlen_q, seqlen_k = self.lengths[0]
            seqlen = f"{seqlen_q}" if seqlen_q == seqlen_k else f"{seqlen_q}/{seqlen_k}"
        else:
            seqlen = f"{min(self.lengths)[0]}..{max(self.lengths)[0]}"
        text = f"b {len(self.lengths)} s {seqlen} h {heads} d {dims}" + (" packed" if self.packed else "")
        return f"{self.label}: {text}" if self.label else text

    @property
    def group(self) -> str:
        """The rows over which a geometric mean is taken."""
        kind = "causal" if self.causal else "full"
        if self.window is not None:
            kind = "window"
        dims = f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        return f"d {dims} {kind}"

    def bounds(self) -> tuple[int | None, int | None]:
        """(left, right) of the window with causal folded in; None is unbounded."""
        left, right = self.window or (None, None)
        if self.causal:
            right = 0 if right is None else min(right, 0)
        return left, right

    def visible(self) -> int:
        """Scores that the mask lets through, for one head, summed over the batch."""
        left, right = self.bounds()
        total = 0
        for (seqlen_q, seqlen_k), repeats in _counted(self.lengths):
            position = torch.arange(seqlen_q) + seqlen_k - seqlen_q
            end = torch.full_like(position, seqlen_k) if right is None else (position + right + 1).clamp(0, seqlen_k)
            begin = torch.zeros_like(position) if left is None else (position - left).clamp(0, seqlen_k)
            sinks = torch.minimum(begin, end).clamp(max=self.sink_tokens)
            total += repeats * int(((end - begin).clamp(min=0) + sinks).sum())
        return total

    def flops(self, work: str = "forward") -> float:
        """Two products in the forward, each two operations a visible score and element of the head dimension."""
        return WORK[work] * 2 * self.heads_q * self.visible() * (self.head_dim + self.head_dim_v)

    def bytes(self, element_size: int = 2, work: str = "forward") -> int:
        """Each input read once, each result written once; the backward also reads out, dout and lse."""
        rows_q = sum(length[0] for length in self.lengths)
        rows_k = sum(length[1] for length in self.lengths)
        inputs = rows_q * self.heads_q * self.head_dim + rows_k * self.heads_kv * (self.head_dim + self.head_dim_v)
        out, lse = rows_q * self.heads_q * self.head_dim_v * element_size, 4 * rows_q * self.heads_q
        forward = inputs * element_size + out + lse
        backward = 2 * inputs * element_size + 2 * out + lse
        return {"forward": forward, "backward": backward, "training": forward + backward}[work]


@dataclass
class Inputs:
    """Tensors of one problem: (batch, seqlen, heads, head_dim), or (tokens, heads, head_dim) when packed."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    dout: torch.Tensor | None = None


def make_inputs(problem: Problem, dtype: torch.dtype, device: str, seed: int = 0, gradients: bool = False) -> Inputs:
    """Normal random tensors for ``problem``; the same seed gives the same tensors. With ``gradients`` q, k and v ask
    for theirs, and there is a dout.
    """
    generator = torch.Generator(device).manual_seed(seed)
    lengths_q = [length[0] for length in problem.lengths]
    lengths_k = [length[1] for length in problem.lengths]
    if problem.packed:
        rows_q, rows_k = (sum(lengths_q),), (sum(lengths_k),)
    else:
        rows_q, rows_k = (len(lengths_q), lengths_q[0]), (len(lengths_k), lengths_k[0])

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    def offsets(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

    inputs = Inputs(
        normal(*rows_q, problem.heads_q, problem.head_dim),
        normal(*rows_k, problem.heads_kv, problem.head_dim),
        normal(*rows_k, problem.heads_kv, problem.head_dim_v),
        max_seqlen_q=max(lengths_q),
        max_seqlen_k=max(lengths_k),
    )
    if problem.packed:
        inputs.cu_seqlens_q, inputs.cu_seqlens_k = offsets(lengths_q), offsets(lengths_k)
    if gradients:
        inputs.dout = normal(*rows_q, problem.heads_q, problem.head_dim_v)
        for tensor in (inputs.q, inputs.k, inputs.v):
            tensor.requires_grad_()
    return inputs


def _counted(lengths: tuple[tuple[int, int], ...]) -> list[tuple[tuple[int, int], int]]:
    return [(length, lengths.count(length)) for length in dict.fromkeys(lengths)]
