"""What the bench prints: rows as they come, then geometric means and errors."""

from __future__ import annotations

import math


class Table:
    """Prints rows under one header, columns aligned."""

    def __init__(self, others: list[str]):
        self.others = others
        names = "".join(f"{name:>9}" for name in others)
        columns = f"{'us':>9}{'TFLOP/s':>9}{'GB/s':>7}{'roof':>6}{'MHz':>6}{'pipe':>6}{names}{'ratio':>8}"
        print(f"{'mask':<28}{'shape':<46}{columns}")

    def print(self, row: dict) -> None:
        """One row; a star stands where a CUDA graph was timed."""
        cells = [(number(row["us"]) + "*" * row["graph"], 9), (number(row["tflops"]), 9), (number(row["gbs"]), 7)]
        cells += [(_percent(row["roof"]), 6), (number(row["mhz"]), 6), (_percent(row["pipe"]), 6)]
        cells += [(number(row["peers"].get(name)), 9) for name in self.others]
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


def unpacked_ratio(row: dict) -> float | None:
    """The speed of a packed batch over that of the same work unpacked."""
    plain = row["peers"].get("unpacked")
    return row["tflops"] / plain if plain and row["tflops"] else None


def print_summary(rows: list[dict]) -> None:
    """Geometric means and worst ratios."""
    for title, value in (("to the best peer", lambda row: row["ratio"]), ("packed to unpacked", unpacked_ratio)):
        found = groups(rows, value)
        if found:
            print(f"\n{'ratio ' + title:<28}{'rows':>6}{'geomean':>9}{'worst':>8}")
        for name, (members, mean, worst) in found.items():
            print(f"{name:<28}{len(members):>6}{mean:>9.3f}{value(worst):>8.3f}  {worst['mask']} {worst['shape']}")
        if len(found) > 1:
            ratios = [value(row) for row in rows if value(row) is not None]
            print(f"{'all':<28}{len(ratios):>6}{geometric_mean(ratios):>9.3f}{min(ratios):>8.3f}")


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
