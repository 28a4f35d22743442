# make demo   trains and evaluates a small GSTO-HRNet on generated street scenes; results in runs/demo/
# make test   runs all tests
# Both create the environment first. Another Python or torch: make demo PYTHON=python3.12 TORCH="torch>=2.11"
PYTHON ?= python3
# The release that all tests were last run with; gsto_ops itself takes any from 2.11 on.
TORCH ?= torch==2.13.0
# CUDA builds of torch bring their Triton; with a CPU build, name one here to test the Triton kernels in its interpreter.
TRITON ?=
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: demo test gpu gpu-sanitize cuda-check cuda-build lint format wheel clean

demo: $(INSTALLED)
	$(BIN)/gsto demo

# One process per core, each with one thread: the tests' tensors are too small for more. PROCESSES=0 runs all in one process.
PROCESSES ?= auto
test: $(INSTALLED)
	$(BIN)/python -m gsto_ops
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal

# One call for a machine with an NVIDIA GPU and a CUDA toolkit, some minutes long: build for its GPU, GPU tests, tables of
# operators and networks in runs/bench/, and last a summary. It installs into the environment of GPU_PYTHON, whose torch is the one
# to measure, and which has pytest, pytest-xdist, rich and matplotlib; nothing is downloaded. Tests run in several processes,
# because Triton compiles a kernel for nearly each of them. Without a GPU or a build it stops; of what follows nothing waits for
# anything else: all parts run, and those that failed are named at the end.
GPU_PYTHON ?= python3
GPU_PROCESSES ?= 12
gpu:
	$(GPU_PYTHON) -c "import matplotlib, numpy, pytest, rich, torch, xdist; torch.cuda.init()"
	GSTO_BUILD_NATIVE=cuda \
	TORCH_CUDA_ARCH_LIST="$$($(GPU_PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')" \
	  $(GPU_PYTHON) -m pip install --no-build-isolation --no-deps -e .
	$(GPU_PYTHON) -m gsto_ops
	$(GPU_PYTHON) -c "import gsto_ops; gsto_ops.use_backend('triton'); gsto_ops.use_backend('cuda')"
	@failed=""; \
	part() { echo "== $$*"; $(GPU_PYTHON) -m "$$@" || failed="$$failed\n  $$*"; }; \
	part pytest -q -m gpu -n $(GPU_PROCESSES); \
	part gsto_benchmarks bench ops --quick; \
	part gsto_benchmarks bench step; \
	part gsto_benchmarks bench infer --batch 1 --size 1024x2048; \
	part gsto_benchmarks bench summary; \
	if [ -n "$$failed" ]; then printf "failed:$$failed\n"; exit 1; fi; \
	echo "all parts passed"

# The GPU sweep under compute-sanitizer; slow, so on one shape.
gpu-sanitize:
	for tool in memcheck racecheck initcheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(GPU_PYTHON) -m pytest -m gpu tests/gsto_ops/test_sweep.py -k "cuda and shape3" || exit 1; \
	done

# Needs nvcc, not a GPU: compiles every CUDA kernel for sm_80 and sm_90, warnings being errors, and fails on spills.
cuda-check: $(INSTALLED)
	$(BIN)/python tests/cuda_resources.py

# Needs a CUDA toolkit, not a GPU: builds, links and imports the whole extension against a CUDA build of torch.
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.12.1
cuda-build: $(CUDA_VENV)/.torch
	rm -rf build
	GSTO_BUILD_NATIVE=cuda $(CUDA_VENV)/bin/pip wheel --quiet --no-build-isolation --no-deps -w $(CUDA_VENV)/wheel .
	$(CUDA_VENV)/bin/pip install --quiet --no-deps --force-reinstall $(CUDA_VENV)/wheel/*.whl
	cd $(CUDA_VENV) && bin/python -m gsto_ops
	cd $(CUDA_VENV) && bin/python $(abspath tests/check_registration.py)

$(CUDA_VENV)/.torch:
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install --quiet "$(CUDA_TORCH)" numpy "setuptools>=77" ninja "pybind11>=3.0"
	touch $@

lint: $(VENV)/.installed-dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pre-commit run --all-files --show-diff-on-failure

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' | xargs $(BIN)/clang-format -i

wheel: $(INSTALLED)
	$(BIN)/pip wheel --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist *.egg-info gsto_ops/_C*.so gsto_ops/_build.json

# torch is installed first and the package is built against it (no build isolation): one torch, downloaded once.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" $(TRITON) numpy "setuptools>=77" ninja "pybind11>=3.0"
	touch $@

$(INSTALLED): $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation -e ".[train,test]"
	touch $@

$(VENV)/.installed-dev: $(INSTALLED)
	$(BIN)/pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@
