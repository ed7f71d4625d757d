"""The ``accuracy`` set: relative error against float64, ours beside the peers."""

from __future__ import annotations

import torch

from bench import peers, shapes
from bench.problem import Inputs, Problem, make_inputs


def run(args, name: str, dtype: torch.dtype, found: dict[str, peers.Adapter], timer) -> dict:
    """Norm of the error over the norm of the reference, and the largest error; returns the entry to save."""
    adapters = {"ours": peers.ours, **found}
    width = 19
    print(f"\n{name}, {str(dtype).removeprefix('torch.')}: |out - float64| / |float64| (largest difference)")
    print(f"{'mask':<28}{'shape':<34}" + "".join(f"{label:>{width}}" for label in adapters))
    rows = []
    for problem in shapes.chosen(name, args.device, args.quick, args.only):
        x = make_inputs(problem, dtype, args.device)
        want = reference(problem, x)
        row = {"mask": problem.mask, "shape": problem.shape, "error": {}, "largest": {}}
        for label, adapter in adapters.items():
            try:
                version = adapter(problem, x)
                with version.context(), torch.no_grad():
                    difference = version.call().double() - want
            except Exception as error:  # a peer may refuse a dtype with any exception
                if not isinstance(error, peers.Unsupported):
                    print(f"  {label}: {type(error).__name__}: {str(error)[:160]}")
                continue
            row["error"][label] = float(f"{difference.norm() / want.norm():.3e}")
            row["largest"][label] = float(f"{difference.abs().max():.3e}")
        rows.append(row)
        cells = [
            f"{row['error'][label]:.2e} ({row['largest'][label]:.0e})" if label in row["error"] else ""
            for label in adapters
        ]
        print(f"{problem.mask:<28}{problem.shape:<34}" + "".join(f"{cell:>{width}}" for cell in cells), flush=True)
    return {"rows": rows}


def reference(problem: Problem, x: Inputs) -> torch.Tensor:
    """Attention of equal lengths in float64, written out, a head at a time; causal or full."""
    seqlen_q, seqlen_k = problem.lengths[0]
    group = problem.heads_q // problem.heads_kv
    hidden = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=x.q.device).triu(seqlen_k - seqlen_q + 1)
    heads = []
    for head in range(problem.heads_q):
        q, k, v = x.q[:, :, head].double(), x.k[:, :, head // group].double(), x.v[:, :, head // group].double()
        scores = q @ k.transpose(1, 2) / problem.head_dim**0.5
        if problem.causal:
            scores = scores.masked_fill(hidden, float("-inf"))
        heads.append(scores.softmax(-1) @ v)
    return torch.stack(heads, dim=2)
