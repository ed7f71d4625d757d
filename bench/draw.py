"""``python -m bench plot`` and ``python -m bench table``: both read bench/results and nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from bench import report, results
from bench.peers import OURS_TOO
from bench.problem import WORK

BEGIN, END = "<!-- bench table: begin -->", "<!-- bench table: end -->"
FA3_IS_DERIVED = (
    " No wheel holds FA3's backward: the last column is ours over FA3's recorded ratio to cuDNN "
    "([bench/fa3_backward.py](bench/fa3_backward.py)) times cuDNN's speed in this run, derived and not measured."
)
TITLES = {"forward": "forward", "backward": "backward", "training": "forward and backward"}
COLORS = {
    "ours": "#d62728",
    "cudnn": "#1f77b4",
    "fa2": "#9e9e9e",
    "fa3": "#2ca02c",
    "fa4": "#9467bd",
    "torch": "#1f77b4",
}


def add_plot_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``plot``."""
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="the folder to read")
    parser.add_argument("--output", type=Path, default=results.ROOT / "docs", help="the folder to draw into")


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``table``."""
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="the folder to read")
    parser.add_argument("--write", type=Path, help=f"put the table into this file, between '{BEGIN}' and '{END}'")


def plot(args: argparse.Namespace) -> int:
    """Draws TFLOP/s over seqlen, a panel for each head_dim and mask; a file for each work, GPU and kind of the set."""
    try:
        import matplotlib  # only plots need it
    except ImportError as error:
        sys.exit(f"bench: plots need matplotlib ({error})")
    matplotlib.use("svg")
    # The same results draw the same file, with its text as text.
    matplotlib.rcParams.update({"svg.hashsalt": "tilewright", "svg.fonttype": "none"})
    drawn = 0
    for work, gpu, entries in _recorded(args.results):
        for name in filter(_is_standard, entries):
            dtype = name.removeprefix("standard-")
            path = args.output / f"{work}-{gpu}-{dtype}.svg"
            args.output.mkdir(parents=True, exist_ok=True)
            _draw_standard(entries[name], f"{TITLES[work]}, {gpu}, {dtype}", path)
            print(f"drew {path}")
            drawn += 1
    if not drawn:
        print(f"bench: no result of the set 'standard' in {args.results}", file=sys.stderr)
    return int(not drawn)


def _recorded(folder: Path) -> Iterator[tuple[str, str, dict[str, dict]]]:
    """(work, gpu, entries) of every file of results."""
    for work in WORK:
        for gpu, entries in results.load(work, folder).items():
            yield work, gpu, entries


def _draw_standard(entry: dict, title: str, path: Path) -> None:
    from matplotlib import pyplot

    groups = list(dict.fromkeys(row["group"] for row in entry["rows"]))
    columns = (len(groups) + 1) // 2
    figure, axes = pyplot.subplots(2, columns, figsize=(3.4 * columns, 5.6), sharex=True, sharey=True, squeeze=False)
    for index, group in enumerate(groups):
        # Full above, causal below, a head_dim a column, in the order of the set.
        panel = axes[index % 2][index // 2]
        rows = [row for row in entry["rows"] if row["group"] == group]
        seqlens = [row["seqlen"] for row in rows]
        names = dict.fromkeys(name for row in rows for name in row["peers"])
        for name in names:
            panel.plot(seqlens, [row["peers"].get(name) for row in rows], "o-", ms=3, lw=1, label=name, c=_color(name))
        for name in dict.fromkeys(name for row in rows for name in row.get("derived", {})):
            style = {"ls": "--", "lw": 1, "c": _color(name), "label": f"{name}, derived"}
            panel.plot(seqlens, [row.get("derived", {}).get(name) for row in rows], **style)
        panel.plot(seqlens, [row["tflops"] for row in rows], "o-", ms=4, lw=2, label="tilewright", c=_color("ours"))
        panel.axhline(entry["roofs"]["matmul_tflops"], ls=":", lw=1, c="black", label="matrix product 8192³")
        panel.set_xscale("log", base=2)
        panel.set_xticks(seqlens, [str(seqlen) for seqlen in seqlens], rotation=45, fontsize=8)
        panel.set_title(group.replace("d ", "head_dim ", 1), fontsize=10)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("TFLOP/s")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.suptitle(f"attention {title} (kernels {entry['kernel_id']}, {entry['date']})", fontsize=11)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def table(args: argparse.Namespace) -> int:
    """Prints the tables of every GPU, or writes them between the markers of a file."""
    parts = [_tables(work, gpu, entries) for work, gpu, entries in _recorded(args.results)]
    parts += [_step_table(gpu, entries) for gpu, entries in results.load("step", args.results).items()]
    text = "\n".join(parts) or "No result is recorded yet.\n"
    if not args.write:
        print(text)
        return 0
    old = args.write.read_text()
    if BEGIN not in old or END not in old:
        sys.exit(f"bench: {args.write} has no markers {BEGIN} and {END}")
    head, rest = old.split(BEGIN, 1)
    args.write.write_text(f"{head}{BEGIN}\n{text}{END}{rest.split(END, 1)[1]}")
    return 0


def _is_standard(name: str) -> bool:
    """Whether an entry is drawn and has a table of its own; a deterministic one is summed up in a line."""
    return name.startswith("standard-") and not name.endswith("-deterministic")


def _check_current(gpu: str, work: str, entries: dict[str, dict]) -> None:
    current = results.kernel_id()
    for name, entry in entries.items():
        if entry["kernel_id"] != current:
            print(f"bench: {gpu} {work} {name} speaks of kernels {entry['kernel_id']}, not {current}", file=sys.stderr)


def _tables(work: str, gpu: str, entries: dict[str, dict]) -> str:
    _check_current(gpu, work, entries)
    parts = []
    for name, entry in entries.items():
        if _is_standard(name):
            parts.append(_standard_table(work, gpu, name.removeprefix("standard-"), entry))
    of_what = "" if work == "forward" else f" of the {TITLES[work]}"
    for title, build in (
        (f"| set{of_what} | rows | geometric mean | worst row |\n|---|---|---|---|", _set_lines),
        ("| host time of one call | µs | with a gradient asked for |\n|---|---|---|", _host_lines),
        (f"| relative error{of_what} against float64 | ours | best peer |\n|---|---|---|", _accuracy_lines),
    ):
        lines = [line for name, entry in entries.items() for line in build(name, entry)]
        if lines:
            parts.append("\n".join([title, *lines]) + "\n")
    return "\n".join(parts)


def _standard_table(work: str, gpu: str, dtype: str, entry: dict) -> str:
    rows = entry["rows"]
    seqlens = sorted({row["seqlen"] for row in rows})
    versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    derived = any(row.get("derived") for row in rows)
    lines = [
        f"{TITLES[work].capitalize()} on {gpu}, {dtype}, 16,384 tokens, heads × head_dim = 2,048: TFLOP/s, ours / best "
        f"peer. Kernels `{entry['kernel_id']}`, {entry['date']}; {versions}; in the same run a matrix product reached "
        f"{entry['roofs']['matmul_tflops']:.0f} TFLOP/s and a copy {entry['roofs']['copy_gbs']:.0f} GB/s."
        + (FA3_IS_DERIVED if derived else ""),
        "",
        f"| | {' | '.join(map(str, seqlens))} | geometric mean of the ratio | worst |" + " to FA3, derived |" * derived,
        "|---" * (len(seqlens) + 3 + derived) + "|",
    ]
    to_best, to_fa3 = (report.groups(rows, report.RATIOS[name]) for name in (report.TO_BEST, report.TO_FA3))
    for group in dict.fromkeys(row["group"] for row in rows):
        of_seqlen = {row["seqlen"]: row for row in rows if row["group"] == group}
        cells = [_ours_and_best(of_seqlen.get(seqlen)) for seqlen in seqlens]
        found = to_best.get(group)
        cells += [f"**{found[1]:.3f}**", f"{found[2]['ratio']:.3f}"] if found else ["", ""]
        if derived:
            cells.append(f"{to_fa3[group][1]:.2f}" if group in to_fa3 else "")
        lines.append(f"| {group.replace('d ', 'head_dim ', 1)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _step_table(gpu: str, entries: dict[str, dict]) -> str:
    _check_current(gpu, "step", entries)
    lines = [
        f"| training step on {gpu}, tokens/s | tilewright | scaled_dot_product_attention | ratio |\n|---|---|---|---|"
    ]
    for name, entry in entries.items():
        kind = ", ".join(name.split("-")[1:])
        for row in entry["rows"]:
            ours, torchs = (f"{row['tokens_per_s'][name]:,}" for name in ("tilewright", "torch"))
            lines.append(
                f"| {row['model']}, {kind}, kernels `{entry['kernel_id']}` | {ours} | {torchs} | {row['ratio']} |"
            )
    return "\n".join(lines) + "\n"


def _ours_and_best(row: dict | None) -> str:
    if row is None or row["tflops"] is None:
        return ""
    best = max(((value, name) for name, value in row["peers"].items() if value and name not in OURS_TOO), default=None)
    return f"{row['tflops']:.0f}" + (f" / {best[0]:.0f} {best[1]}" if best else "")


def _set_lines(name: str, entry: dict) -> list[str]:
    if _is_standard(name) or name.startswith(("host-", "accuracy-")):
        return []
    lines = []
    title = name.replace("-", ", ")
    for what, value in report.RATIOS.items():
        rows = [row for row in entry["rows"] if value(row) is not None]
        if rows:
            mean, worst = report.geometric_mean([value(row) for row in rows]), min(rows, key=value)
            place = f"{worst['mask']}, {worst['shape']}"
            lines.append(f"| {title}: {what} | {len(rows)} | {mean:.3f} | {value(worst):.3f} ({place}) |")
    return lines


def _host_lines(name: str, entry: dict) -> list[str]:
    if not name.startswith("host-"):
        return []
    shown = [[_or_blank(row[key], ".1f") for key in ("host_us", "host_us_grad")] for row in entry["rows"]]
    return [f"| {row['call']} | {plain} | {grad} |" for row, (plain, grad) in zip(entry["rows"], shown, strict=True)]


def _accuracy_lines(name: str, entry: dict) -> list[str]:
    if not name.startswith("accuracy-"):
        return []
    lines = []
    for row in entry["rows"]:
        others = ((error, peer) for peer, error in row["error"].items() if peer not in ("ours", *OURS_TOO))
        best = min(others, default=None)
        peer = f"{best[0]:.2e} {best[1]}" if best else ""
        ours = _or_blank(row["error"].get("ours"), ".2e")
        lines.append(f"| {name.removeprefix('accuracy-')}, {row['mask']}, {row['shape']} | {ours} | {peer} |")
    return lines


def _color(name: str) -> str:
    return COLORS.get(name, "#ff7f0e")


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
