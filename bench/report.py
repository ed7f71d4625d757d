"""What the bench prints: rows as they come, then geometric means and errors."""

from __future__ import annotations

import math
from collections.abc import Callable

LEGEND = """\
roof: of the matrix product or the copy in this run, whichever bounds the row.  *: a CUDA graph.
MHz: the SM clock sampled, an upper bound of what it is under load; pipe: the share of the tensor cores' rate at that \
clock, so a lower bound."""


class Table:
    """Prints rows under one header, columns aligned; ``derived`` peers are computed from a measured one."""

    def __init__(self, others: list[str], derived: list[str] | None = None):
        self.others, self.derived = others, derived or []
        self.widths = {name: max(9, len(name) + 2) for name in (*others, *self.derived)}
        print(LEGEND)
        for name in self.derived:
            print(f"~{name}: not measured here: its recorded ratio to cudnn (bench/{name}_backward.py) × cudnn's row")
        names = "".join(f"{name:>{self.widths[name]}}" for name in others)
        names += "".join(f"{'~' + name:>{self.widths[name]}}" for name in self.derived)
        columns = f"{'us':>9}{'TFLOP/s':>9}{'GB/s':>7}{'roof':>6}{'MHz':>6}{'pipe':>6}{names}{'ratio':>8}"
        print(f"{'mask':<28}{'shape':<46}{columns}")

    def print(self, row: dict) -> None:
        """One row."""
        cells = [(number(row["us"]) + "*" * row["graph"], 9), (number(row["tflops"]), 9), (number(row["gbs"]), 7)]
        cells += [(_percent(row["roof"]), 6), (number(row["mhz"]), 6), (_percent(row["pipe"]), 6)]
        cells += [(number(row["peers"].get(name)), self.widths[name]) for name in self.others]
        cells += [(number(row.get("derived", {}).get(name)), self.widths[name]) for name in self.derived]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        line = "".join(f" {text:>{width - 1}}" for text, width in [*cells, (ratio, 8)])
        print(f"{row['mask']:<28}{row['shape']:<46}{line}", flush=True)


def geometric_mean(values: list[float]) -> float:
    """The mean of ratios."""
    return math.exp(sum(map(math.log, values)) / len(values))


def groups(rows: list[dict], value) -> dict[str, tuple[list[dict], float, dict]]:
    """For each group: its rows, the geometric mean of ``value(row)`` and the row with the least."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if value(row) is not None:
            found.setdefault(row["group"], []).append(row)
    return {
        name: (members, geometric_mean([value(row) for row in members]), min(members, key=value))
        for name, members in found.items()
    }


def _ours_to(column: str) -> Callable[[dict], float | None]:
    def ratio(row: dict) -> float | None:
        other = row["peers"].get(column)
        return row["tflops"] / other if other and row["tflops"] else None

    return ratio


def _to_derived_fa3(row: dict) -> float | None:
    other = row.get("derived", {}).get("fa3")
    return row["tflops"] / other if other and row["tflops"] else None


TO_BEST, TO_FA3 = "to the best peer", "to fa3, derived from cudnn"
# What a set is summed up by: in words, and of a row.
RATIOS: dict[str, Callable[[dict], float | None]] = {
    TO_BEST: lambda row: row["ratio"],
    TO_FA3: _to_derived_fa3,
    "packed to unpacked": _ours_to("unpacked"),
    "deterministic to any order": _ours_to("any order"),
}


def print_summary(rows: list[dict]) -> None:
    """Geometric means and worst ratios."""
    for title, value in RATIOS.items():
        found = groups(rows, value)
        if found:
            print(f"\n{'ratio ' + title:<34}{'rows':>6}{'geomean':>9}{'worst':>8}")
        for name, (members, mean, worst) in found.items():
            print(f"{name:<34}{len(members):>6}{mean:>9.3f}{value(worst):>8.3f}  {worst['mask']} {worst['shape']}")
        if len(found) > 1:
            ratios = [value(row) for row in rows if value(row) is not None]
            print(f"{'all':<34}{len(ratios):>6}{geometric_mean(ratios):>9.3f}{min(ratios):>8.3f}")


def print_errors(rows: list[dict]) -> None:
    """Each distinct error once, with how often and where first."""
    seen: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, message in row.get("errors", {}).items():
            seen.setdefault((name, message), []).append(f"{row['mask']} {row['shape']}")
    for (name, message), places in seen.items():
        print(f"{name}: {len(places)} rows failed, first {places[0]}: {message}")


def number(value: float | None) -> str:
    """Three or four digits, whatever the size; nothing for None."""
    if value is None:
        return ""
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
