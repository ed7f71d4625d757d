"""The public way through PyTorch's dispatcher, for a torch that lacks the private names of the quick one."""

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
assert not tilewright._dispatch.QUICK
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]]))
"""
TESTS = Path(__file__).resolve().parent
PART = "three_ways or test_autocast or test_grad_modes or (nothing_is_dropped and (by_ or under_autocast))"


def test_without_private_names():
    """Slower, and right: everything through the operators, their gradient by torch.library.register_autograd."""
    files = [str(TESTS / "test_torch_integration.py"), str(TESTS / "test_training.py")]
    command = [sys.executable, "-c", SCRIPT, *files, "-k", PART]
    result = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "failed" not in result.stdout
