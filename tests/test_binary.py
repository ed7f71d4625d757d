"""What was built: the package says it, and the machine code of the Hopper kernels agrees."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tilewright

LIBRARY = Path(tilewright.__file__).with_name("libtilewright_ops.so")
OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z0-9_.]+)", re.MULTILINE)


def test_build_info():
    info = tilewright.build_info()
    assert info["version"] == tilewright.__version__
    assert re.fullmatch(r"[0-9a-f]{16}", info["kernel_id"])
    assert info["compiler"]
    if info["cuda"]:
        assert info["archs"] == ["sm_90a"] and info["kernels"] and info["cuda_version"]
        assert len(set(info["kernels"])) == len(info["kernels"])
    else:
        assert not info["archs"] and not info["kernels"] and "CPU operators only" in info["notice"]


def test_registered_devices():
    """The CPU operators are always there, the CUDA ones when the build says so (else an error in words may be)."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for operator in ("attention", "attention_varlen"):
        for name in (f"tilewright::{operator}", f"tilewright::{operator}_backward"):
            assert has(name, "CPU")
            assert has(name, "CUDA") or not tilewright.build_info()["cuda"]


def test_only_the_stable_abi():
    """The library asks torch for C functions (aoti_torch_*, torch_*) alone: no C++ name of ATen or c10."""
    symbols = _undefined_symbols(LIBRARY)
    foreign = [name for name in symbols if re.search(r"^_ZNK?(2at|3c10|5torch)", name)]
    assert not foreign, foreign
    assert any(name.startswith("aoti_torch_") for name in symbols)


def _undefined_symbols(library):
    """The names that the dynamic symbol table of an ELF file (64 bits, little endian) does not define."""
    data = library.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"

    def number(offset, size):
        return int.from_bytes(data[offset : offset + size], "little")

    sections = number(0x28, 8)
    headers = [sections + i * number(0x3A, 2) for i in range(number(0x3C, 2))]
    dynsym = next(h for h in headers if number(h + 4, 4) == 11)  # SHT_DYNSYM
    strings = number(headers[number(dynsym + 40, 4)] + 24, 8)
    first, size = number(dynsym + 24, 8), number(dynsym + 32, 8)
    names = []
    for entry in range(first, first + size, 24):
        if number(entry + 6, 2) == 0:  # SHN_UNDEF
            start = strings + number(entry, 4)
            names.append(data[start : data.index(b"\0", start)].decode())
    return names


def _cuobjdump():
    """From PATH, CUDA_HOME, or PyPI's nvidia-cuda-cuobjdump in this environment."""
    found = shutil.which("cuobjdump")
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders += [Path("/usr/local/cuda/bin")]
    folders += [binary.parent for path in sys.path for binary in Path(path).glob("nvidia/*/bin/cuobjdump")]
    found = found or next((str(f / "cuobjdump") for f in folders if (f / "cuobjdump").is_file()), None)
    assert found, "the SASS is read with cuobjdump: put it on PATH or install nvidia-cuda-cuobjdump"
    return found


@pytest.fixture(scope="module")
def sass():
    """{function: set of its opcodes} of everything in the library."""
    command = [_cuobjdump(), "--dump-sass", str(LIBRARY)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    functions = re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]
    return {body.split(None, 1)[0]: set(OPCODE.findall(body)) for body in functions}


def _uses(opcodes, instruction):
    """Whether it is among them, with any modifiers behind those given."""
    return any(opcode == instruction or opcode.startswith(f"{instruction}.") for opcode in opcodes)


@pytest.mark.cuda_build
def test_every_kernel_is_there(sass):
    """As many functions with tensor core instructions as build_info counts kernels, and those of second passes."""
    kernels = [name for name, opcodes in sass.items() if _uses(opcodes, "HGMMA")]
    assert len(kernels) == len(tilewright.build_info()["kernels"]) + len(_second_passes(sass)), kernels


@pytest.mark.cuda_build
def test_sass_of_the_forward(sass):
    """wgmma for the products, TMA in and out."""
    without = _kernels_without(sass, "forward", "UTMALDG", "UTMASTG")
    assert not without["UTMALDG"] and not without["UTMASTG"], without


@pytest.mark.cuda_build
def test_sass_of_the_backward(sass):
    """wgmma for the products, TMA in; dS transposed by stmatrix and dQ added by bulk copies or from registers, or dQ
    computed in a second pass."""
    floats = "REDG.E.ADD.F32"
    without = _kernels_without(sass, "backward", "UTMALDG", "STSM", "UBLKRED", floats)
    assert not without["UTMALDG"] and set(without["STSM"]) <= set(without[floats]), without
    second = _second_passes(sass)
    assert len(second) == len(without[floats]) > 0, (second, without[floats])
    assert set(without[floats]) < set(without["UBLKRED"]), without
    assert len(without["UBLKRED"]) < len(_instances("backward")), without["UBLKRED"]
    assert all(_uses(sass[name], "UTMALDG") and _uses(sass[name], "HGMMA") for name in second), second


def _second_passes(sass):
    return [name for name in sass if "second_pass_sm90" in name]


def _instances(operator):
    return [name for name in tilewright.build_info()["kernels"] if name.startswith(f"{operator}_")]


def _kernels_without(sass, operator, *instructions):
    """{instruction: the operator's kernels that lack it}"""
    kernels = {name: codes for name, codes in sass.items() if f"{operator}_sm90" in name and _uses(codes, "HGMMA")}
    assert len(kernels) == len(_instances(operator)) > 0, sorted(kernels)
    return {x: [name for name, codes in kernels.items() if not _uses(codes, x)] for x in instructions}


@pytest.mark.cuda_build
def test_no_local_memory(sass):
    """Nothing spills, and no array lives outside the registers, in any function."""
    for instruction in ("LDL", "STL"):
        spilled = [name for name, opcodes in sass.items() if _uses(opcodes, instruction)]
        assert not spilled, f"{instruction} in {spilled}"
