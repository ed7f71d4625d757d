"""Small problems that between them use every compiled instance of the Hopper forward, and which of them uses which.

What forward and backward take for a problem is asked of the package itself (csrc/kernels/*/select.h), by the same
numbers that csrc/kernels/*/launch.cu hand to it; but tiles of keys of a packed batch are counted by its mean length.
"""

import dataclasses

import cases
import torch

from tilewright import _tilewright

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FIRST, TAIL = 3, 5  # rows of a packed batch before and behind its sequences; they hold NaN


@dataclasses.dataclass
class Problem:
    head_dim: int
    head_dim_v: int
    lengths_q: list  # of each sequence
    lengths_k: list
    packed: bool  # otherwise all lengths are the same
    options: dict
    heads_q: int = 4
    heads_kv: int = 2

    def __str__(self):
        batch = "packed" if self.packed else f"{len(self.lengths_q)}x{self.lengths_q[0]}x{self.lengths_k[0]}"
        return f"{batch} {self.head_dim}/{self.head_dim_v} {self.options}"

    @property
    def work(self):
        pairs = sum(q * k for q, k in zip(self.lengths_q, self.lengths_k, strict=True))
        return pairs * (self.head_dim + self.head_dim_v)

    def _choice(self):
        """What both choices go by. A packed batch goes by its mean length."""
        around = FIRST + TAIL if self.packed else 0
        batch = len(self.lengths_q)
        rows, keys = (-((sum(x) + around) // -batch) if self.packed else x[0] for x in (self.lengths_q, self.lengths_k))
        left, right = self.options.get("window", (None, None))
        if self.options.get("causal"):
            right = 0
        return {
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v,
            "softcap": self.options.get("softcap", 0.0) > 0,
            "seqlen_q": rows,
            "seqlen_k": keys,
            "window_left": left,
            "window_right": right,
        }

    def tile(self, multiprocessors):
        """What the forward uses for it."""
        heads = self.heads_q * len(self.lengths_q)
        return _tilewright.forward_tile(**self._choice(), heads=heads, multiprocessors=multiprocessors)

    def backward_tile(self, multiprocessors, deterministic=False):
        """What the backward uses for it."""
        return _tilewright.backward_tile(
            **self._choice(),
            sink_tokens=self.options.get("sink_tokens", 0),
            packed=self.packed,
            deterministic=deterministic,
            heads_kv=self.heads_kv * len(self.lengths_q),
            group=self.heads_q // self.heads_kv,
            multiprocessors=multiprocessors,
        )

    def kernel(self, dtype, multiprocessors):
        """Its name in build_info()["kernels"]."""
        tile = self.tile(multiprocessors)
        score = "softcap" if self.options.get("softcap", 0.0) > 0 else "none"
        return f"forward_{dtype}_{tile['head_dim']}_{tile['head_dim_v']}_{score}_{tile['tile_m']}"

    def make(self, device, dtype):
        """(q, k, v), and the options of the call, cu_seqlens with them."""
        heads = {"heads_q": self.heads_q, "heads_kv": self.heads_kv}
        shape = {**heads, "head_dim": self.head_dim, "head_dim_v": self.head_dim_v}
        if self.packed:
            q, k, v, cu_seqlens = cases.make_packed(
                device, dtype, self.lengths_q, self.lengths_k, first=FIRST, tail=TAIL, **shape
            )
            for x in (q, k, v):
                x[:FIRST], x[-TAIL:] = float("nan"), float("nan")
        else:
            lengths = {"seqlen_q": self.lengths_q[0], "seqlen_k": self.lengths_k[0]}
            q, k, v = cases.make(device, dtype, batch=len(self.lengths_q), **lengths, **shape)
            cu_seqlens = {}
        sinks = cases.make_sinks(self.heads_q, device, dtype) if "sink_tokens" in self.options else None
        return (q, k, v), {**self.options, **cu_seqlens, "sinks": sinks}


def multiprocessors(device="cpu"):
    return torch.cuda.get_device_properties(device).multi_processor_count if device == "cuda" else 132


def head_dims(softcap=False):
    """The head dimensions that kernels are compiled for; without softcap all, with it most of them."""
    steps = range(8, 257, 8)
    tiles = [_tilewright.forward_tile(head_dim, head_dim_v, softcap) for head_dim in steps for head_dim_v in steps]
    return sorted({(tile["head_dim"], tile["head_dim_v"]) for tile in tiles})


# (lengths of q, lengths of k): from a single tile to several rounds of the multiprocessors, for tiles of each height.
PLAIN = [([130], [201]), ([301] * 2, [150] * 2), ([192] * 20, [96] * 20), ([300] * 60, [320] * 60)]
PACKED = [([130, 0, 9], [200, 7, 9]), ([300] * 15, [320, 300, 280] * 5)]
OPTIONS = [{}, {"causal": True}, {"window": (90, 5), "sink_tokens": 3}]


def problems():
    """Smallest first."""
    found = [
        Problem(*dims, lengths_q, lengths_k, sizes is PACKED, {**options, "softcap": softcap})
        for head_dim, head_dim_v in head_dims()
        for dims in ((head_dim, head_dim_v), (head_dim - 8, head_dim_v - 8))
        for sizes in (PLAIN, PACKED)
        for lengths_q, lengths_k in sizes
        for options in OPTIONS
        for softcap in (0.0, 9.0)
    ]
    return sorted(found, key=lambda problem: problem.work)
