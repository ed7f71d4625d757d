"""Trains a GPT from scratch on text, with tilewright's attention, PyTorch's, or one after the other.

    python examples/train.py                     # a minute on a CPU
    python examples/train.py --attention both    # and draws both loss curves

The text is Python's own documentation: documents of very different lengths. A batch packs as many of them as it has
room for, one after another without padding, and `attention_varlen` keeps them apart.
"""

import argparse
import math
import sys
import time
from pydoc_data import topics

import torch
from torch import nn
from torch.nn import functional

import tilewright

# What is trained: bytes in, the next byte out. A document is cut where it is longer than the context.
SIZES = {
    "cpu": {"dim": 128, "heads": 4, "layers": 4, "context": 256, "tokens": 1024, "steps": 300},
    "cuda": {"dim": 512, "heads": 8, "layers": 8, "context": 2048, "tokens": 32768, "steps": 1000},
}


def tilewright_attention(q, k, v, cu_seqlens):
    """Of all documents at once; q, k, v are (tokens, heads, head_dim)."""
    return tilewright.attention_varlen(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=True)


def torch_attention(q, k, v, cu_seqlens):
    """The same by PyTorch's attention, which takes one document after another."""
    lengths = cu_seqlens.diff().tolist()
    documents = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
    outs = [functional.scaled_dot_product_attention(*(x[None] for x in qkv), is_causal=True)[0] for qkv in documents]
    return torch.cat(outs, dim=1).transpose(0, 1)


ATTENTIONS = {"tilewright": tilewright_attention, "torch": torch_attention}


class Block(nn.Module):
    """Attention and a perceptron, each normalised before and added after."""

    def __init__(self, dim, heads, attention):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, cu_seqlens):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(1)  # views: nothing is copied
        x = x + self.proj(self.attention(q, k, v, cu_seqlens).flatten(1))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Packed bytes in, logits of the byte after each out."""

    def __init__(self, attention, *, dim, heads, layers, context):
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, attention) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, positions, cu_seqlens):
        x = self.bytes(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x, cu_seqlens)
        return functional.linear(self.norm(x), self.bytes.weight)


class Documents:
    """Python's documentation in pieces of at most `context` bytes and the one after; the last tenth is held out."""

    def __init__(self, context, device):
        texts = [topics.topics[key].encode() for key in sorted(topics.topics)]
        pieces = [text[i : i + context + 1] for text in texts for i in range(0, len(text) - 1, context)]
        pieces = [torch.frombuffer(bytearray(piece), dtype=torch.uint8).long() for piece in pieces]
        cut = len(pieces) * 9 // 10
        self.training, self.held_out, self.device = pieces[:cut], pieces[cut:], device

    def pack(self, pieces, room):
        """As many pieces as there is room for, the last one cut: (tokens, targets, positions, cu_seqlens)."""
        taken, total = [], 0
        for piece in pieces:
            taken.append(piece[: room - total + 1])
            total += len(taken[-1]) - 1
            if room - total < 1:
                break
        lengths = torch.tensor([0, *(len(piece) - 1 for piece in taken)])
        cu_seqlens = lengths.cumsum(0).int()
        positions = torch.cat([torch.arange(len(piece) - 1) for piece in taken])
        tokens, targets = torch.cat([piece[:-1] for piece in taken]), torch.cat([piece[1:] for piece in taken])
        return [x.to(self.device) for x in (tokens, targets, positions, cu_seqlens)]

    def batches(self, room, generator):
        """Packed batches of the training text, without end."""
        while True:
            order = torch.randperm(len(self.training), generator=generator)
            yield self.pack((self.training[i] for i in order.tolist()), room)


def loss_of(model, tokens, targets, positions, cu_seqlens):
    """Nats a byte. bf16 on a GPU."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        logits = model(tokens, positions, cu_seqlens)
    return functional.cross_entropy(logits.float(), targets)


def train(name, args, documents):
    """Trains one model; returns the loss of every step."""
    torch.manual_seed(args.seed)
    sizes = {key: getattr(args, key) for key in ("dim", "heads", "layers", "context")}
    model = GPT(ATTENTIONS[name], **sizes).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = documents.batches(args.tokens, torch.Generator().manual_seed(args.seed))
    losses, seen, start = [], 0, time.perf_counter()
    for step in range(args.steps):
        batch = next(batches)
        warm_up, cosine = min(1.0, (step + 1) / 20), (1 + math.cos(math.pi * step / args.steps)) / 2
        optimizer.param_groups[0]["lr"] = args.lr * warm_up * cosine
        loss = loss_of(model, *batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())  # stays on the device: reading it would wait for the step
        seen += len(batch[0])
        if (step + 1) % max(1, args.steps // 50) == 0 or step + 1 == args.steps:
            mean = torch.stack(losses[-10:]).mean().item()
            speed = seen / (time.perf_counter() - start)
            seen, start = 0, time.perf_counter()
            progress(name, (step + 1) / args.steps, f"step {step + 1:5}  loss {mean:.3f}  {speed:9,.0f} tokens/s")
    with torch.no_grad():
        held_out = loss_of(model, *documents.pack(documents.held_out, 16 * args.tokens)).item()
    print(f"{name}: held out {held_out:.3f} nats a byte; a guess among 256 is {math.log(256):.3f}")
    return torch.stack(losses).tolist()


def progress(name, done, text):
    """A bar that redraws itself on a terminal; elsewhere a line now and then."""
    bar = f"{name:<12}[{'#' * round(24 * done):<24}] {text}"
    if sys.stdout.isatty():
        print(f"\r{bar}\x1b[K", end="\n" if done == 1 else "", flush=True)
    elif done == 1 or round(done * 50) % 10 == 0:
        print(bar, flush=True)


def plot(losses, path):
    """The loss curves, if matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for (name, values), style in zip(losses.items(), ("-", "--"), strict=False):
        axes.plot(values, style, label=name, lw=1.5)
    axes.set(xlabel="step", ylabel="loss, nats a byte", title="GPT on Python's documentation")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    print(f"drew {path}")


def positive(text):
    """A whole number above 0, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return int(text)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", default="tilewright", choices=(*ATTENTIONS, "both"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=tuple(SIZES))
    for name in SIZES["cpu"]:
        text = ", ".join(f"{sizes[name]} on {device}" for device, sizes in SIZES.items())
        parser.add_argument(f"--{name}", type=positive, help=text)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", default="loss.svg", help="where the loss curves are drawn, .svg or .png")
    args = parser.parse_args()
    for name, size in SIZES[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, size)
    if args.dim % (8 * args.heads) or args.dim > 256 * args.heads:
        parser.error(f"--dim / --heads is the head_dim, a multiple of 8 up to 256, got {args.dim} / {args.heads}")

    documents = Documents(args.context, args.device)
    print(f"{sum(map(len, documents.training)):,} bytes in {len(documents.training)} pieces to train on")
    names = list(ATTENTIONS) if args.attention == "both" else [args.attention]
    plot({name: train(name, args, documents) for name in names}, args.plot)


if __name__ == "__main__":
    main()
