"""``python -m bench forward | backward | training``: one row a shape, ours beside the peers.

``training`` is the forward and the backward together, from the call to the gradients.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench import accuracy, fa3_backward, host, peers, report, results, shapes
from bench.names import names_of
from bench.problem import Inputs, Problem, make_inputs
from bench.timing import MakeVersion, Timer, Timing

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SECONDS_A_ROW = {"short": 0.2}


def add_arguments(parser: argparse.ArgumentParser, work: str) -> None:
    """The options of the bench of ``work``."""
    tables = shapes.TABLES[work]
    sets, dtypes, others = names_of(tables, all=list(tables)), names_of(DTYPES), names_of(peers.PEERS, none=[])
    parser.add_argument("--set", default="standard", type=sets, help=f"one or more of {','.join(tables)}; or all")
    parser.add_argument("--dtype", default="bf16", type=dtypes, help="one or more of bf16,fp16,fp32 (fp32: CPU only)")
    parser.add_argument("--peers", type=others, help=f"one or more of {','.join(peers.PEERS)}; or none")
    parser.add_argument("--only", default="", help="phrases that a row must hold, as 'causal, d 128, s 4096'")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    if work == "forward":
        parser.add_argument("--library", help="a libtilewright_ops.so to load instead of the installed package")
    else:  # autograd is the package's
        parser.set_defaults(library=None)
        parser.add_argument("--deterministic", action="store_true", help="the same bits every run, ours and the peers'")
    parser.add_argument("--quick", action="store_true", help="a few rows, briefly; never saved")
    parser.add_argument(
        "--save", nargs="?", type=Path, const=results.RESULTS, help="record the results (in bench/results)"
    )


def main(args: argparse.Namespace) -> int:
    """Runs the chosen sets of ``args.command``; 1 if ours failed on any row."""
    work = args.command
    deterministic = work != "forward" and args.deterministic
    if args.save and (args.quick or args.only):
        sys.exit("bench: a part of a set is not saved; leave out --save, or --quick and --only")
    of_gpu = ["cudnn", "fa2", "fa3", "fa4"] if work == "forward" else ["cudnn", "fa2", "fa4"]
    wanted = args.peers if args.peers is not None else ["torch"] if args.device == "cpu" else of_gpu
    loaded, built = peers.load_tilewright(args.library)
    results.check_kernels(built, bool(args.save))
    found, missing = peers.available(wanted)
    print(f"tilewright {work} on {results.device_name(args.device)}, kernels {results.kernel_id()} ({loaded})")
    print(f"peers: {', '.join(f'{name} {peers.peer_version(name)}' for name in found) or 'none'}")
    for name, why in missing.items():
        print(f"  {name} is not there: {why[:200]}")

    adapters = {"ours": peers.ours, **found}
    if deterministic:
        adapters = {name: peers.deterministic(name, adapter) for name, adapter in adapters.items()}
        adapters["any order"] = peers.ours  # its dq is summed as the blocks come
    timer = Timer(args.device, through_autograd=work != "forward")
    failed = False
    for dtype in args.dtype:
        for name in args.set:
            run = {"accuracy": accuracy.run, "host": host.run}.get(name, run_set)
            entry = run(args, name, DTYPES[dtype], adapters, timer)
            failed |= any(row["tflops"] is None for row in entry["rows"] if "tflops" in row)
            if args.save:
                entry["versions"] = results.versions(args.device, {n: peers.peer_version(n) for n in found})
                label = f"{name}-{dtype}" + ("-deterministic" if deterministic else "")
                path = results.save(args.save, args.device, work, label, entry)
                print(f"saved to {path}")
    return int(failed)


def run_set(
    args: argparse.Namespace, name: str, dtype: torch.dtype, adapters: dict[str, peers.Adapter], timer: Timer
) -> dict:
    """Times one set; prints a row as it is ready; returns the entry to save."""
    work = args.command
    roofs = timer.roofs(dtype)
    if name == "varlen":
        adapters = {**adapters, "unpacked": peers.unpacked}
    print(
        f"\n{name}, {str(dtype).removeprefix('torch.')}; roofs in this run: matrix product "
        f"{report.number(roofs['matmul_tflops'])} TFLOP/s, copy {report.number(roofs['copy_gbs'])} GB/s"
    )
    derived = ["fa3"] if work == "backward" and name == "standard" and "cudnn" in adapters else []
    table = report.Table([other for other in adapters if other != "ours"], derived)
    standard = shapes.standard()
    rows = []
    seconds = 0.05 if args.quick else SECONDS_A_ROW.get(name, 0.5)
    for problem in shapes.chosen(name, args.device, args.quick, args.only, work):
        with torch.set_grad_enabled(work != "forward"):
            timing = timer.measure(_versions(problem, dtype, args.device, adapters, work), seconds)
        rows.append(_row(problem, dtype, timing, roofs, work))
        fa3_to_cudnn = fa3_backward.ratio_to_cudnn(problem, standard) if derived else None
        if fa3_to_cudnn and rows[-1]["peers"].get("cudnn"):
            rows[-1]["derived"] = {"fa3": float(f"{fa3_to_cudnn * rows[-1]['peers']['cudnn']:.4g}")}
        table.print(rows[-1])
    if not rows:
        print(f"no row holds '{args.only}'")
    report.print_summary(rows)
    report.print_errors(rows)
    return {"roofs": {key: float(f"{value:.4g}") for key, value in roofs.items()}, "rows": rows}


def _versions(
    problem: Problem, dtype: torch.dtype, device: str, adapters: dict[str, peers.Adapter], work: str
) -> dict[str, MakeVersion]:
    sets: dict[int, Inputs] = {}

    def inputs(index: int) -> Inputs:
        if index not in sets:
            sets[index] = make_inputs(problem, dtype, device, seed=index, gradients=work != "forward")
        return sets[index]

    versions = {}
    for name, adapter in adapters.items():
        try:
            adapter(problem, inputs(0))
        except peers.Unsupported:
            continue
        versions[name] = lambda index, adapter=adapter: peers.of_work(
            adapter(problem, inputs(index)), inputs(index), work
        )
    return versions


def _row(problem: Problem, dtype: torch.dtype, timing: Timing, roofs: dict[str, float], work: str) -> dict:
    flops, size = problem.flops(work), problem.bytes(dtype.itemsize, work)
    seconds = timing.seconds.get("ours")

    def tflops(value: float | None) -> float | None:
        return None if value is None else float(f"{flops / value / 1e12:.4g}")

    others = {name: value for name, value in timing.seconds.items() if name != "ours"}
    best = min((value for name, value in others.items() if value and name not in peers.OURS_TOO), default=None)
    floor = max(flops / roofs["matmul_tflops"] / 1e12, size / roofs["copy_gbs"] / 1e9)
    row = {
        "group": problem.group,
        "mask": problem.mask,
        "shape": problem.shape,
        "seqlen": max(length[0] for length in problem.lengths),
        "us": None if seconds is None else round(seconds * 1e6, 2),
        "tflops": tflops(seconds),
        "gbs": None if seconds is None else float(f"{size / seconds / 1e9:.4g}"),
        "roof": None if seconds is None else round(floor / seconds, 3),
        "mhz": timing.clock_mhz,
        "pipe": None,
        "peers": {name: tflops(value) for name, value in others.items()},
        "ratio": None if not (best and seconds) else round(best / seconds, 3),
        "graph": "graph" in timing.method,
        "rounds": timing.rounds,
    }
    if seconds and timing.clock_mhz:
        # Hopper's tensor cores do 4,096 bf16 or fp16 operations a clock and SM.
        sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        row["pipe"] = round(flops / seconds / (4096 * sms * timing.clock_mhz * 1e6), 3)
    if timing.errors:
        row["errors"] = timing.errors
    return row
