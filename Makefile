# `make demo` and `make test` are all it takes on a fresh clone: each makes .venv, installs and builds first.
# Settings: PYTHON (the interpreter .venv is made from), PIP_ARGS (e.g. "--index-url ..."), and ARGS, which is
# passed on: make demo ARGS="--workers 8", make test ARGS="-k ring", make bench ARGS="--workers 2".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

NATIVE_C := $(sort $(wildcard shmloader/native/*.c))
C_FILES := $(wildcard shmloader/_native.c) $(NATIVE_C)
C_HEADERS := $(wildcard shmloader/native/*.h)
WARNINGS := -std=c11 -Wall -Wextra -Wshadow -Wstrict-prototypes -Wvla -Werror -pthread -Ishmloader/native

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help venv demo test native-test lint lint-python lint-c format catalog formats wheel bench clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

venv: $(VENV)/built ## make .venv, install what is pinned in constraints.txt, build the extension

# The stamps say what was done last: "installed" the packages, "built" the extension.
$(VENV)/installed: pyproject.toml setup.cfg constraints.txt
	@echo "venv: installing the packages of constraints.txt into $(VENV) (a minute or two the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "shmloader needs Python >= 3.11, but " + sys.executable + " is " + sys.version.split()[0] + "; set PYTHON")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install $(PIP_ARGS) -c constraints.txt 'setuptools>=77'
	@CFLAGS="$${CFLAGS:-} -Werror" $(PIP) install $(PIP_ARGS) --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@

# The install above has built it, too: then this finds nothing to do, in half a second.
$(VENV)/built: $(VENV)/installed setup.py $(C_FILES) $(C_HEADERS)
	@CFLAGS="$${CFLAGS:-} -Werror" $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: venv ## stream the embedded datasets through a DataLoader, and check them
	@$(BIN)/shmloader demo $(ARGS)

# On as many cores as there are, four at most (tests/conftest.py says so); ARGS="-n 0" for one after the other, as --pdb
# needs. Each set starts fresh interpreters, so what is compiled once is to be kept, even where the environment says not to.
test: venv ## the whole test suite: Python, then the core alone
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)
	@$(MAKE) -C native_tests test

native-test: ## the tests of the C core: no Python, no venv
	@$(MAKE) -C native_tests test

lint: lint-python lint-c ## ruff, mypy, and C warnings as errors

lint-python: venv
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { $(BIN)/ruff format --check .; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@echo "lint: ruff and mypy found nothing"

lint-c: venv
	@$(BIN)/clang-format --dry-run -Werror $(C_FILES) $(C_HEADERS) $(wildcard native_tests/*.[ch])
	@include=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
	for file in $(C_FILES); do \
	    $(CC) -fsyntax-only -O1 $(WARNINGS) -DPy_LIMITED_API=0x030B0000 -isystem "$$include" "$$file"; \
	done
	@if $(CC) -fanalyzer -E -x c /dev/null >/dev/null 2>&1; then \
	    for file in $(NATIVE_C); do $(CC) -O1 -fanalyzer -fdiagnostics-path-format=none $(WARNINGS) -c -o /dev/null "$$file"; done; \
	fi
	@echo "lint: the C compiler found nothing in $(words $(C_FILES)) files"

format: venv ## reformat Python (ruff) and C (clang-format)
	@$(BIN)/ruff check --quiet --fix . && $(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i $(C_FILES) $(C_HEADERS) $(wildcard native_tests/*.[ch])

catalog: venv ## the datasets in docs/datasets.md, as the catalog has them
	@$(BIN)/python tests/catalog_document.py

formats: venv ## the table in docs/formats.md: what is read of each format, and how
	@$(BIN)/python tests/formats_matrix.py

wheel: venv ## the wheel, into dist/
	@rm -rf build dist
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	@rm -rf build
	@ls dist/*.whl

bench: venv ## samples/s beside other loaders, in the same run
	@$(BIN)/python -m bench warm $(ARGS)

clean: ## remove everything that was built, .venv included
	@rm -rf $(VENV) build dist *.egg-info shmloader/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find shmloader tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
	@if [ -f native_tests/Makefile ]; then $(MAKE) -C native_tests clean; fi
