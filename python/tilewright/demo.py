"""``python -m tilewright.demo``: trains a byte-level GPT of a million parameters on Python's own documentation.

It first compares loss and gradients with those of PyTorch's attention on the same model and batch, then trains with
``tilewright.attention``, then writes some text. On a CPU it takes less than two minutes.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pydoc_data import topics

import torch
from torch import Tensor, nn
from torch.nn import functional

import tilewright

CONTEXT, DIM, HEADS, LAYERS = 128, 128, 4, 5

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # all (batch, seqlen, heads, head_dim), causal


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own attention, in this package's layout."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def tilewright_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """This package's attention."""
    return tilewright.attention(q, k, v, causal=True)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al., RoFormer, 2021): pairs of elements turn with the position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each normalised before and added after."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.attention = attention
        self.norm1, self.norm2 = nn.LayerNorm(DIM, bias=False), nn.LayerNorm(DIM, bias=False)
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.proj = nn.Linear(DIM, DIM, bias=False)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM, bias=False), nn.GELU(), nn.Linear(4 * DIM, DIM, bias=False))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, DIM // HEADS)).unbind(2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # v stays a view: the operators take any strides
        x = x + self.proj(self.attention(q, k, v).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.bytes = nn.Embedding(256, DIM)
        angles = torch.arange(CONTEXT)[:, None, None] * 10000.0 ** -torch.linspace(0, 1, DIM // HEADS // 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.blocks = nn.ModuleList(Block(attention) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(DIM, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:  # what is added to the residual starts small
            nn.init.normal_(block.proj.weight, std=0.02 / math.sqrt(2 * LAYERS))
            nn.init.normal_(block.mlp[2].weight, std=0.02 / math.sqrt(2 * LAYERS))

    def forward(self, tokens: Tensor) -> Tensor:
        x, seqlen = self.bytes(tokens), tokens.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:seqlen], self.sin[:seqlen])
        return functional.linear(self.norm(x), self.bytes.weight)

    def use(self, attention: Attention) -> GPT:
        """Puts another attention into every block."""
        for block in self.blocks:
            block.attention = attention
        return self


def loss_of(model: GPT, batch: Tensor) -> Tensor:
    """Nats a byte: each byte of ``batch`` (batch, CONTEXT + 1) predicted from those before it. bf16 on CUDA."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
        logits = model(batch[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def draw(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` random pieces of the text, (count, CONTEXT + 1)."""
    starts = torch.randint(len(text) - CONTEXT - 1, (count, 1), generator=generator).to(text.device)
    return text[starts + torch.arange(CONTEXT + 1, device=text.device)].long()


def compare(model: GPT, batch: Tensor) -> bool:
    """Prints loss and gradients with this package's attention beside PyTorch's; true if they agree to rounding."""
    losses, gradients = [], []
    for function in (tilewright_attention, torch_attention):
        loss = loss_of(model.use(function), batch)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        losses.append(loss.item())
    error = max(((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in zip(*gradients, strict=True))
    allowed = 5e-2 if batch.is_cuda else 1e-4  # bf16 rounds at 4e-3 in each of the layers, float32 at 6e-8
    agree = error <= allowed and abs(losses[0] - losses[1]) <= allowed * losses[1]
    print(f"loss           tilewright {losses[0]:.6f}   torch {losses[1]:.6f}")
    print(f"gradients      largest relative difference {error:.1e}: {'they agree' if agree else 'THEY DIFFER'}")
    model.use(tilewright_attention)
    return agree


def bar(fraction: float, text: str, done: bool = False) -> None:
    """A progress bar that redraws itself on a terminal; elsewhere a line now and then."""
    filled = round(24 * fraction)
    line = f"[{'#' * filled}{'.' * (24 - filled)}] {text}"
    if sys.stdout.isatty():
        print(f"\r{line}\x1b[K", end="\n" if done else "", flush=True)
    else:
        print(line, flush=True)


def train(model: GPT, text: Tensor, args: argparse.Namespace, generator: torch.Generator) -> None:
    """AdamW, a short warm-up, a cosine to zero that follows the steps or the clock, whichever is further."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    start = shown = time.perf_counter()
    mean, step, progress = None, 0, 0.0
    while progress < 1.0:
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * progress)) / 2
        loss = loss_of(model, draw(text, args.batch, generator))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() if mean is None else torch.lerp(mean, loss.detach(), 0.05)
        step += 1
        now = time.perf_counter()
        progress = min(1.0, max(step / args.steps, (now - start) / args.seconds))
        if now - shown > (0.2 if sys.stdout.isatty() else 5.0) or progress == 1.0:
            shown, speed = now, step * args.batch * CONTEXT / (now - start)
            bar(progress, f"step {step:5}  loss {mean.item():.3f}  {speed:9,.0f} tokens/s", done=progress == 1.0)


@torch.no_grad()
def generate(model: GPT, prompt: str, count: int, generator: torch.Generator, device: str) -> str:
    """``count`` bytes after ``prompt``, sampled at temperature 0.8."""
    tokens = torch.tensor([list(prompt.encode())], device=device)
    for _ in range(count):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(tokens[:, -CONTEXT:])[:, -1].float()
        likely = (logits / 0.8).softmax(-1).cpu()
        tokens = torch.cat([tokens, torch.multinomial(likely, 1, generator=generator).to(device)], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return int(text)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tilewright.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=_positive, help="default 1200, on CUDA 1500")
    parser.add_argument("--seconds", type=_positive, default=75, help="the training ends by then, whatever the steps")
    parser.add_argument("--batch", type=_positive, help="sequences a step, default 4, on CUDA 128")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", default="The import statement ", help="what it continues, a byte at least")
    args = parser.parse_args()
    if not args.prompt:
        parser.error("--prompt must not be empty")
    cuda = args.device == "cuda"
    args.steps = args.steps or (1500 if cuda else 1200)
    args.batch = args.batch or (128 if cuda else 4)

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    corpus = "\n\n".join(topics.topics[key] for key in sorted(topics.topics)).encode()
    text = torch.frombuffer(bytearray(corpus), dtype=torch.uint8).to(args.device)
    cut = len(text) * 19 // 20
    model = GPT(tilewright_attention).to(args.device)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"tilewright {tilewright.__version__} on {torch.cuda.get_device_name() if cuda else 'the CPU'}")
    print(f"model          {size:,} parameters, {LAYERS} layers, {HEADS} heads of {DIM // HEADS}, context {CONTEXT}")
    print(f"text           {len(text):,} bytes of Python's documentation, the last {len(text) - cut:,} held out")
    if not compare(model, draw(text[:cut], args.batch, generator)):
        return 1

    train(model, text[:cut], args, generator)
    with torch.no_grad():
        held_out = draw(text[cut:], 64, generator)
        loss = sum(loss_of(model, part).item() * len(part) for part in held_out.split(8)) / len(held_out)
    print(f"held out       {loss:.3f} nats a byte (a guess among 256 bytes is {math.log(256):.3f})\n")
    print(generate(model, args.prompt, 400, generator, args.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
