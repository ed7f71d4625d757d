# make demo    trains a small language model with tilewright's attention, and generates from it
# make test    runs the tests
# make lint, make format, make wheel, make clean
#
# Both commands work in .venv. It is made from PYTHON, takes over the packages that PYTHON has (a torch with CUDA, say), and
# gets from PyPI only what is missing: with everything there, nothing is fetched.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n auto --maxprocesses 8
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# Succeeds when everything asked for is installed already.
HAS := PIP_CONFIG_FILE=/dev/null $(PIP) install --no-index 2>/dev/null >/dev/null
# The tests read the machine code of what was built; a CUDA toolkit brings the tool along, a bare nvcc does not.
HAS_CUOBJDUMP := command -v cuobjdump >/dev/null || test -x /usr/local/cuda/bin/cuobjdump
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc python third_party -type f -not -name '*.pyc')
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.PHONY: demo test lint format wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m tilewright.demo

test: $(VENV)/installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

$(VENV)/environment: third_party/requirements.txt third_party/pins.txt
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(PYTHON) third_party/inherit_packages.py $(BIN)/python
	$(HAS) 'torch>=2.10' || $(PIP) install -c third_party/pins.txt torch
	$(HAS) -r third_party/requirements.txt || $(PIP) install -c third_party/pins.txt -r third_party/requirements.txt
	$(HAS_CUOBJDUMP) || $(PIP) install -c third_party/pins.txt nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	touch $@

$(VENV)/installed: $(VENV)/environment $(SOURCES)
	$(PIP) install --no-build-isolation --no-deps --force-reinstall .
	touch $@

wheel: $(VENV)/environment
	$(PIP) wheel --no-build-isolation --no-deps -w dist .

$(VENV)/linters: $(VENV)/environment
	$(PIP) install --ignore-installed -c third_party/pins.txt ruff clang-format
	touch $@

lint: $(VENV)/linters
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/linters
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist $(VENV)
