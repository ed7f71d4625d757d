"""The demo and the example run from end to end; how well they learn is their own business."""

import os
import re
import subprocess
import sys
from pathlib import Path

import tilewright

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "train.py"


def run(*command, cwd):
    # One thread: other tests run beside it.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_demo(device, tmp_path):
    said = run("-m", "tilewright.demo", "--device", device, "--steps", "3", "--batch", "2", cwd=tmp_path)
    for word in ("loss", "they agree", "tokens/s"):
        assert word in said


def test_training_example(device, tmp_path):
    """Both attentions end in the same loss, and their curves are drawn."""
    sizes = ["--dim", "64", "--layers", "2", "--tokens", "300", "--steps", "5", "--plot", "loss.png"]
    said = run(EXAMPLE, "--device", device, "--attention", "both", *sizes, cwd=tmp_path)
    assert "tokens/s" in said
    tilewrights, torchs = map(float, re.findall(r"held out ([\d.]+)", said))
    assert abs(tilewrights - torchs) < (1e-3 if device == "cpu" else 3e-2)
    assert (tmp_path / "loss.png").exists() or "matplotlib is not installed" in said


def test_doctest_of_the_package():
    """The example at the top of the package and those of its functions."""
    import doctest

    import torch

    names = {"torch": torch, "tilewright": tilewright}
    for module in (tilewright, sys.modules["tilewright.functional"], sys.modules["tilewright.autograd"]):
        assert doctest.testmod(module, extraglobs=names).failed == 0
