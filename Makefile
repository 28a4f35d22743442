# make demo   trains and evaluates a small GSTO-HRNet on generated street scenes; results in runs/demo/
# make test   runs all tests
# Both create the environment first. Another Python or torch build: make demo PYTHON=python3.12 TORCH="torch==2.13.0"
PYTHON ?= python3
TORCH ?= torch>=2.11
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: demo test lint format wheel clean

demo: $(INSTALLED)
	$(BIN)/gsto demo

test: $(INSTALLED)
	$(BIN)/python -m gsto_ops
	$(BIN)/python -m pytest

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
	$(BIN)/pip install --quiet "$(TORCH)" numpy "setuptools>=77" ninja "pybind11>=3.0"
	touch $@

$(INSTALLED): $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation -e ".[train,test]"
	touch $@

$(VENV)/.installed-dev: $(INSTALLED)
	$(BIN)/pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@
