#!/usr/bin/env python3
"""Runs nvcc, and fails when ptxas says that a kernel spills, uses local memory, or has its wgmma serialised.

A compiler launcher: `strict_nvcc.py nvcc <arguments>`, the arguments with -Xptxas=-v. ptxas says these things as
information, and a kernel that spills in its inner loop still passes every test, only slowly.
"""

import os
import re
import subprocess
import sys

# C7510, C7511, C7512 and C7514 say why wgmma were serialised. C7519 (a wait that ptxas adds itself) costs nothing.
SERIALISED = re.compile(r"\(C75(10|11|12|14)\)|wgmma\.mma_async instructions are serialized")
PROPERTIES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
FUNCTION = re.compile(r"(?:Function properties for|Compiling entry function) '?([^' ]+)'?")


def complaints(ptxas_output: str) -> list[str]:
    """What is wrong with the kernels that ptxas speaks of, one line each."""
    found = []
    function = "?"
    for line in ptxas_output.splitlines():
        if match := FUNCTION.search(line):
            function = match.group(1)
        if SERIALISED.search(line) and "C7519" not in line:
            found.append(f"wgmma serialised: {line.strip()}")
        elif (match := PROPERTIES.search(line)) and any(int(number) for number in match.groups()):
            stack, stores, loads = match.groups()
            found.append(f"{function}: local memory: {stack} bytes of stack, {stores} spilled, {loads} reloaded")
    return found


def main(command: list[str]) -> int:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    errors = complaints(result.stdout) if result.returncode == 0 else []
    if result.returncode != 0 or errors:
        sys.stderr.write(result.stdout)
    for error in errors:
        sys.stderr.write(f"tilewright: error: {error}\n")
    if errors and "-o" in command:
        # The object file must not survive, or the next build would take it for good.
        output = command[command.index("-o") + 1]
        if os.path.exists(output):
            os.remove(output)
    return result.returncode or (1 if errors else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
