"""``python -m bench forward | plot | table``."""

from __future__ import annotations

import argparse
import sys

from bench import draw, forward


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of tilewright.")
    commands = parser.add_subparsers(dest="command", required=True)
    forward.add_arguments(commands.add_parser("forward", help="time the forward beside the peers"))
    draw.add_plot_arguments(commands.add_parser("plot", help="draw the recorded results into docs/"))
    draw.add_table_arguments(commands.add_parser("table", help="print the README's table of the recorded results"))
    args = parser.parse_args()
    if args.command == "forward":
        return forward.main(args)
    return draw.plot(args) if args.command == "plot" else draw.table(args)


sys.exit(main())
