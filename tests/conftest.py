"""Devices, dtypes and seeds for the whole suite, and the summary that a run on a GPU leaves in bench/results.

A test that takes `device` runs on every device this machine has; one that takes `dtype` as well runs on every dtype the
device's operators take; one marked `gpu` or `cuda_build` needs a GPU or a build with nvcc and is left out, not skipped,
where there is none.
"""

import hashlib
import os
import random
import sys
import time
from pathlib import Path

import hypothesis
import pytest
import torch

import tilewright

START = time.time()
ROOT = Path(__file__).resolve().parent.parent
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICES = ["cpu", "cuda"] if HOPPER else ["cpu"]
DTYPES = {
    "cpu": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "cuda": [torch.bfloat16, torch.float16],
}

# In CI, which decides about a change, the same random numbers and the same examples every time; elsewhere fresh ones.
CI = os.environ.get("CI", "").lower() not in ("", "0", "false")
hypothesis.settings.register_profile(
    "tilewright",
    deadline=None,
    database=None,
    derandomize=CI,
    print_blob=True,
    # No shrinking: with the oracle in every example it takes minutes, and the examples are small as they are.
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.load_profile("tilewright")


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a Hopper GPU; left out on other machines")
    config.addinivalue_line("markers", "cuda_build: needs a package that was built with nvcc; left out of others")
    # Set before xdist starts its workers, which inherit it.
    os.environ.setdefault("TILEWRIGHT_SEED", "0" if CI else str(random.SystemRandom().getrandbits(32)))
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: more threads would only wait for each other
        torch.set_num_threads(1)


def pytest_report_header():
    gpu = torch.cuda.get_device_name() if HOPPER else "none"
    seed = f"TILEWRIGHT_SEED={os.environ['TILEWRIGHT_SEED']}, Hypothesis draws {'the same' if CI else 'fresh'} examples"
    return f"tilewright: GPU {gpu}, torch {torch.__version__}, {seed}"


def pytest_generate_tests(metafunc):
    names = metafunc.fixturenames
    if "device" not in names:
        return
    devices = ["cuda"] if metafunc.definition.get_closest_marker("gpu") else DEVICES
    if "dtype" in names:
        cases = [pytest.param(d, t, id=f"{d}-{dtype_name(t)}") for d in devices for t in DTYPES[d]]
        metafunc.parametrize(("device", "dtype"), cases)
    else:
        metafunc.parametrize("device", devices)


def pytest_collection_modifyitems(config, items):
    there = {"gpu": HOPPER, "cuda_build": tilewright.build_info()["cuda"]}
    missing = [marker for marker, is_there in there.items() if not is_there]
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in missing)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def seed(request):
    """Other random numbers for every test, from the run's seed; a failure prints what repeats them."""
    run = os.environ["TILEWRIGHT_SEED"]
    seed = int.from_bytes(hashlib.sha256(f"{run} {request.node.nodeid}".encode()).digest()[:4], "little")
    torch.manual_seed(seed)
    print(f"repeat with TILEWRIGHT_SEED={run}")
    return seed


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """After a run of the whole suite on a GPU: bench/results/<gpu>-tests.json."""
    whole = not (config.option.keyword or config.option.markexpr) and all(
        Path(arg).resolve() in (ROOT, ROOT / "tests") for arg in config.args
    )
    if not HOPPER or not whole or config.option.collectonly:
        return
    sys.path.insert(0, str(ROOT))
    from bench import results

    outcomes = ("passed", "failed", "error", "skipped", "deselected")
    summary = {name: len(terminalreporter.stats.get(name, [])) for name in outcomes}
    summary["exit_status"] = int(exitstatus)
    summary["duration_s"] = round(time.time() - START, 1)
    summary["seed"] = int(os.environ["TILEWRIGHT_SEED"])
    summary["gpu"] = torch.cuda.get_device_name()
    # The kernels that ran are those of the package, which need not be those of the sources beside it.
    summary["package_kernel_id"] = tilewright.build_info()["kernel_id"]
    versions = {"tilewright": tilewright.__version__, "pytest": pytest.__version__}
    summary["versions"] = results.versions("cuda", versions)
    path = results.save(results.RESULTS, "cuda", "tests", "suite", summary)
    terminalreporter.write_line(f"wrote {path.relative_to(ROOT)}")
