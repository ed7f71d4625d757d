"""Recorded results: bench/results/<gpu>-<operator>.json, one entry a set, each with the kernel id it speaks of."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def kernel_id(csrc: Path = ROOT / "csrc") -> str:
    """Which kernels a result speaks of. The same as
    ``(cd csrc && find . -type f | LC_ALL=C sort | xargs -d '\\n' sha256sum) | sha256sum``, first 16 digits.
    """
    files = sorted(b"./" + os.fsencode(path.relative_to(csrc)) for path in csrc.rglob("*") if path.is_file())
    listing = hashlib.sha256()
    for name in files:
        digest = hashlib.sha256((csrc / os.fsdecode(name)).read_bytes()).hexdigest()
        listing.update(digest.encode() + b"  " + name + b"\n")
    return listing.hexdigest()[:16]


def check_kernels(built: str | None, saved: bool) -> None:
    """Complains when the package was built from other kernels than the tree's (None: it does not know)."""
    if built not in (None, kernel_id()):
        print(f"bench: the installed package was built from other kernels, {built}", file=sys.stderr)
        if saved:
            sys.exit("bench: results are saved for the kernels of this tree only; install it again")


def device_name(device: str) -> str:
    """nvidia-h200; cpu-x86_64."""
    if device == "cpu":
        return f"cpu-{platform.machine()}"
    return "-".join(torch.cuda.get_device_name().lower().split())


def versions(device: str, peers: dict[str, str]) -> dict[str, str]:
    """Everything whose version a number depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if device != "cpu":
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found | peers


def save(folder: Path, device: str, operator: str, name: str, entry: dict) -> Path:
    """Puts ``entry`` under ``name``, leaving the other entries of the file as they are."""
    path = folder / f"{device_name(device)}-{operator}.json"
    known = path if path.exists() else RESULTS / path.name
    entries = json.loads(known.read_text()) if known.exists() else {}
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    entries[name] = {"kernel_id": kernel_id(), "date": date, **entry}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(_dump(entries) + "\n")
    return path


def load(operator: str, folder: Path = RESULTS) -> dict[str, dict]:
    """All recorded entries of an operator: {gpu: {set: entry}}."""
    suffix = f"-{operator}.json"
    paths = sorted(folder.glob(f"*{suffix}"))
    return {path.name.removesuffix(suffix): json.loads(path.read_text()) for path in paths}


def _dump(value, depth: int = 0) -> str:
    """JSON with one line a row of results: what a diff can be read by."""
    pad = "  " * (depth + 1)
    if isinstance(value, dict) and depth < 2:  # sets, then their fields
        items = [f"{pad}{json.dumps(key)}: {_dump(item, depth + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + "\n" + "  " * depth + "}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(pad + json.dumps(item) for item in value) + "\n" + "  " * depth + "]"
    return json.dumps(value)
