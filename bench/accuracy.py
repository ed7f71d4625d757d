"""The ``accuracy`` set: relative error against float64, ours beside the peers, of out or of dq, dk and dv."""

from __future__ import annotations

import torch

from bench import peers, shapes
from bench.problem import Inputs, Problem, make_inputs


def run(args, name: str, dtype: torch.dtype, adapters: dict[str, peers.Adapter], timer) -> dict:
    """Norm of the error over the norm of the reference, and the largest error; returns the entry to save. Of the three
    gradients the one with the largest relative error counts.
    """
    work, width = args.command, 19
    what = "out" if work == "forward" else "worst of dq, dk, dv"
    print(f"\n{name}, {str(dtype).removeprefix('torch.')}: |{what} - float64| / |float64| (largest difference)")
    print(f"{'mask':<28}{'shape':<34}" + "".join(f"{label:>{width}}" for label in adapters))
    rows = []
    for problem in shapes.chosen(name, args.device, args.quick, args.only, work):
        x = make_inputs(problem, dtype, args.device, gradients=work == "backward")
        with torch.set_grad_enabled(work == "backward"):
            wanted = reference(problem, x, work)
        row = {"mask": problem.mask, "shape": problem.shape, "error": {}, "largest": {}}
        for label, adapter in adapters.items():
            try:
                with torch.set_grad_enabled(work == "backward"):
                    version = peers.of_work(adapter(problem, x), x, work)
                    with version.context():
                        result = version.call()
            except Exception as error:  # a peer may refuse a dtype with any exception
                if not isinstance(error, peers.Unsupported):
                    print(f"  {label}: {type(error).__name__}: {str(error)[:160]}")
                continue
            results = result if isinstance(result, tuple) else (result,)
            errors = [(ours.double() - right) for ours, right in zip(results, wanted, strict=True)]
            relative = [float(error.norm() / right.norm()) for error, right in zip(errors, wanted, strict=True)]
            worst = relative.index(max(relative))
            row["error"][label] = float(f"{relative[worst]:.3e}")
            row["largest"][label] = float(f"{errors[worst].abs().max():.3e}")
        rows.append(row)
        cells = [
            f"{row['error'][label]:.2e} ({row['largest'][label]:.0e})" if label in row["error"] else ""
            for label in adapters
        ]
        print(f"{problem.mask:<28}{problem.shape:<34}" + "".join(f"{cell:>{width}}" for cell in cells), flush=True)
    return {"rows": rows}


def reference(problem: Problem, x: Inputs, work: str) -> tuple[torch.Tensor, ...]:
    """Attention of equal lengths in float64, written out, a head at a time; causal or full. Out, or its gradients."""
    seqlen_q, seqlen_k = problem.lengths[0]
    group = problem.heads_q // problem.heads_kv
    hidden = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=x.q.device).triu(seqlen_k - seqlen_q + 1)
    wide = [tensor.double() for tensor in (x.q, x.k, x.v)]
    totals = [torch.zeros_like(tensor) for tensor in wide]
    heads = []
    for head in range(problem.heads_q):
        places = (head, head // group, head // group)
        q, k, v = (tensor[:, :, place].detach() for tensor, place in zip(wide, places, strict=True))
        inputs = [tensor.requires_grad_(work == "backward") for tensor in (q, k, v)]
        scores = q @ k.transpose(1, 2) / problem.head_dim**0.5
        if problem.causal:
            scores = scores.masked_fill(hidden, float("-inf"))
        out = scores.softmax(-1) @ v
        heads.append(out.detach())
        if work == "backward":
            for total, place, grad in zip(
                totals, places, torch.autograd.grad(out, inputs, x.dout[:, :, head].double()), strict=True
            ):
                total[:, :, place] += grad
    if work == "backward":
        return tuple(total.detach() for total in totals)
    return (torch.stack(heads, dim=2),)
