"""``python -m bench step``: a whole training step of a GPT of GPT-2 small's size, end to end, with either attention.

bf16 autocast, fused AdamW, eager. Two models with the same weights, one a kind of attention, train on the same random
tokens in alternation, some steps at a time between two synchronisations on the host's clock, as a training loop would.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from bench import peers, report, results
from bench.names import names_of

ROUNDS, STEPS = 12, 5  # rounds of so many steps of each; the median of the rounds counts
WARM_UP = 3


@dataclass(frozen=True)
class Model:
    """What is trained. 12 heads of 64 are GPT-2 small's, 8 of 96 the same width."""

    name: str
    heads: int
    head_dim: int
    layers: int = 12
    seqlen: int = 1024
    batch: int = 16
    vocabulary: int = 50304

    @property
    def dim(self) -> int:
        """The width of the residual stream."""
        return self.heads * self.head_dim


MODELS = {"12x64": Model("12 heads of 64", 12, 64), "8x96": Model("8 heads of 96", 8, 96)}

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def tilewright_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Ours; all (batch, seqlen, heads, head_dim), causal."""
    return torch.ops.tilewright.attention(q, k, v, causal=True)[0]


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's, with the back end that it picks."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class Block(nn.Module):
    """Attention and a perceptron, each normalised before and added after."""

    def __init__(self, model: Model, attention: Attention):
        super().__init__()
        self.heads, self.attention = model.heads, attention
        self.norm1, self.norm2 = nn.LayerNorm(model.dim), nn.LayerNorm(model.dim)
        self.qkv, self.proj = nn.Linear(model.dim, 3 * model.dim), nn.Linear(model.dim, model.dim)
        self.mlp = nn.Sequential(
            nn.Linear(model.dim, 4 * model.dim), nn.GELU("tanh"), nn.Linear(4 * model.dim, model.dim)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.proj(self.attention(q, k, v).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Tokens in, the loss of the next token out."""

    def __init__(self, model: Model, attention: Attention):
        super().__init__()
        self.tokens = nn.Embedding(model.vocabulary, model.dim)
        self.positions = nn.Embedding(model.seqlen, model.dim)
        self.blocks = nn.Sequential(*(Block(model, attention) for _ in range(model.layers)))
        self.norm = nn.LayerNorm(model.dim)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens[:, :-1]) + self.positions.weight
        logits = functional.linear(self.norm(self.blocks(x)), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def add_arguments(parser: argparse.ArgumentParser, _: str) -> None:
    """The options of the step bench."""
    models = ",".join(MODELS)
    parser.add_argument("--model", default=models, type=names_of(MODELS), help=f"one or more of {models}")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--compile", action="store_true", help="the models by torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="a tiny model, briefly; never saved")
    parser.add_argument("--save", nargs="?", type=Path, const=results.RESULTS, help="record (in bench/results)")


def main(args: argparse.Namespace) -> int:
    """Times the chosen models."""
    if args.save and (args.quick or set(args.model) != set(MODELS)):
        sys.exit("bench: a part of the models is not saved; leave out --save, or --quick and --model")
    loaded, built = peers.load_tilewright(None)
    results.check_kernels(built, bool(args.save))
    print(f"tilewright training step on {results.device_name(args.device)}, kernels {results.kernel_id()} ({loaded})")
    print(f"{'model':<44}{'attention':<14}{'ms a step':>10}{'tokens/s':>12}{'ratio':>8}")
    rows = [_row(args, MODELS[name]) for name in args.model]
    if args.save:
        entry = {"rows": rows, "versions": results.versions(args.device, {})}
        name = f"b{args.batch}-bf16" + ("-compiled" if args.compile else "")
        print(f"saved to {results.save(args.save, args.device, 'step', name, entry)}")
    return 0


def _row(args: argparse.Namespace, model: Model) -> dict:
    rounds, steps = (2, 1) if args.quick else (ROUNDS, STEPS)
    model = replace(model, batch=args.batch)
    if args.quick:
        model = replace(model, layers=1, seqlen=64, batch=1, vocabulary=512)
    trained = {"tilewright": tilewright_attention, "torch": torch_attention}
    step_of = {name: _make_step(args, model, attention) for name, attention in trained.items()}
    for step in step_of.values():
        for _ in range(WARM_UP):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in step_of}
    for turn in range(rounds):
        for name in list(step_of) if turn % 2 == 0 else reversed(list(step_of)):
            seconds[name].append(_timed(args, step_of[name], steps) / steps)
    medians = {name: statistics.median(samples) for name, samples in seconds.items()}
    tokens = model.batch * model.seqlen
    words = f"{model.layers} layers, {model.name}, b {model.batch} s {model.seqlen}"
    ratio = medians["torch"] / medians["tilewright"]
    for name, median in medians.items():
        shown = f"{ratio:.3f}" if name == "tilewright" else ""
        print(f"{words:<44}{name:<14}{report.number(median * 1e3):>10}{tokens / median:>12,.0f}{shown:>8}", flush=True)
    return {
        "model": words,
        "ms": {name: round(median * 1e3, 3) for name, median in medians.items()},
        "tokens_per_s": {name: round(tokens / median) for name, median in medians.items()},
        "ratio": round(ratio, 3),
    }


def _make_step(args: argparse.Namespace, model: Model, attention: Attention) -> Callable[[], None]:
    torch.manual_seed(0)
    gpt = GPT(model, attention).to(args.device)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(gpt) if args.compile else gpt
    tokens = torch.randint(model.vocabulary, (model.batch, model.seqlen + 1), device=args.device)

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16):
            loss = forward(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _timed(args: argparse.Namespace, step: Callable[[], None], steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
