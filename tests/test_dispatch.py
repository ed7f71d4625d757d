"""The ways through PyTorch's dispatcher for a torch that lacks the private names of the quickest one."""

import subprocess
import sys
from pathlib import Path

# Without a name while tilewright is imported; torch itself needs it afterwards. Then a part of the suite.
SCRIPT = """
import sys, torch
there = torch._C._AutoDispatchBelowAutograd
del torch._C._AutoDispatchBelowAutograd
import tilewright
torch._C._AutoDispatchBelowAutograd = there
assert tilewright._dispatch.below_autograd is not there
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]]))
"""
TESTS = Path(__file__).resolve().parent
PART = (
    "three_ways or test_autocast or test_grad_modes or forward_mode or torch_func or differentiated_twice "
    "or (nothing_is_dropped and (by_ or under_autocast))"
)


def test_without_private_names():
    """Slower, and right."""
    files = [str(TESTS / f"test_{name}.py") for name in ("torch_integration", "training", "gradients")]
    command = [sys.executable, "-c", SCRIPT, *files, "-k", PART]
    result = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "failed" not in result.stdout
