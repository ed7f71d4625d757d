"""``python -m bench forward | backward | training | step | plot | table``."""

from __future__ import annotations

import argparse
import sys

from bench import attention, draw, step

COMMANDS = {
    "forward": (attention, "time the forward beside the peers"),
    "backward": (attention, "time the backward beside the peers"),
    "training": (attention, "time forward and backward together beside the peers"),
    "step": (step, "time a training step of a GPT beside scaled_dot_product_attention"),
}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of tilewright.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=text), name)
    draw.add_plot_arguments(commands.add_parser("plot", help="draw the recorded results into docs/"))
    draw.add_table_arguments(commands.add_parser("table", help="print the README's tables of the recorded results"))
    args = parser.parse_args()
    if args.command in COMMANDS:
        return COMMANDS[args.command][0].main(args)
    return draw.plot(args) if args.command == "plot" else draw.table(args)


sys.exit(main())
