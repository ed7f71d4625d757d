"""The demo runs from end to end; how well it learns is its own business."""

import os
import subprocess
import sys

import pytest

import tilewright


@pytest.mark.parametrize("steps", [3])
def test_a_few_steps(device, steps, tmp_path):
    command = [sys.executable, "-m", "tilewright.demo", "--device", device, "--steps", str(steps), "--batch", "2"]
    # One thread: other tests run beside it.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    for word in ("loss", "tokens/s"):
        assert word in result.stdout + result.stderr


def test_doctest_of_the_package():
    """The example at the top of the package and those of its functions."""
    import doctest

    import torch

    names = {"torch": torch, "tilewright": tilewright}
    for module in (tilewright, sys.modules["tilewright.functional"], sys.modules["tilewright.autograd"]):
        assert doctest.testmod(module, extraglobs=names).failed == 0
