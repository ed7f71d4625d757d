"""Loads the compiled operators, and tells what they were built from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_OPERATORS = Path(__file__).with_name("libtilewright_ops.so")


def _load() -> Any:
    if not _OPERATORS.exists():
        raise ImportError(
            f"tilewright's operators are not at {_OPERATORS}: the package was not built. Install it "
            "(pip install . in its checkout) and import it from outside its source folder."
        )
    try:
        torch.ops.load_library(str(_OPERATORS))
    except OSError as error:
        raise ImportError(
            f"tilewright's operators do not load into torch {torch.__version__}; they need torch >= 2.10 ({error})"
        ) from error
    return torch.ops.tilewright


# Modules take the operators from here, so that they are loaded before anything is registered for them.
ops = _load()

from tilewright import _tilewright  # noqa: E402  (after torch: a missing build is reported above)


def build_info() -> dict[str, Any]:
    """What this build of tilewright is and holds.

    Returns:
        A dict: ``version``; ``kernel_id``, 16 hex digits that change with any kernel source; ``cuda``, whether the CUDA
        operators are in it; ``cuda_version``, nvcc's, or ""; ``archs`` and ``kernels``, the GPU architectures and the
        compiled kernel instances; ``compiler``; and ``notice``, in words what a user should know.

    Example:
        >>> tilewright.build_info()["version"]
        '0.1.0'
    """
    info = _tilewright.build_info()
    if info["cuda"]:
        info["notice"] = f"CPU and CUDA operators ({', '.join(info['archs'])}, CUDA {info['cuda_version']})"
    else:
        info["notice"] = "CPU operators only: tilewright was built without nvcc"
    return info
