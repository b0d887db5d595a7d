# `make test` and `make bench` work on a fresh machine: each first sets up what it needs in .venv.
#   make bench ARGS="aot --kernel gla --chip tpu7x"    arguments for the benchmark command line
#   make test ARGS="tests/gla -k decode"               arguments for pytest
#   make test PYTHON=/path/to/python3.12               the Python that .venv is made from

SHELL := /bin/bash
PYTHON ?=
VENV := .venv
RUN := $(VENV)/bin/python -m
READY := $(VENV)/.ready
WORKERS ?= 2
ARGS ?=

.PHONY: bench test lint setup clean

bench: $(READY)
	$(RUN) microbench $(ARGS)

test: $(READY)
	$(RUN) pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(READY)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) pyright

setup: $(READY)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis

# The Python is run, not only looked up: a version manager's shim can exist and not work.
define FIND_PYTHON
works() { "$$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }; \
python=; \
for name in $(or $(PYTHON),python3.12 python3.13 python3.14 python3 python); do \
  if works "$$name"; then python="$$name"; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "No Python >= 3.12 with venv and ensurepip was found. Tried:" >&2; \
  for name in $(or $(PYTHON),python3.12 python3.13 python3.14 python3 python); do \
    found=$$("$$name" --version 2>/dev/null) || found="not found, or does not run"; \
    echo "  $$name: $$found" >&2; \
  done; \
  echo "Install one (Debian, Ubuntu: apt install python3.12-venv; macOS: brew install" >&2; \
  echo "python@3.12), or name it: make $(or $(MAKECMDGOALS),bench) PYTHON=/path/to/python3.12" >&2; \
  exit 1; \
fi
endef

$(READY): pyproject.toml
	@set -e; \
	if ! $(VENV)/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
	  $(FIND_PYTHON); \
	  echo "Creating $(VENV) with $$($$python --version)"; \
	  "$$python" -m venv --clear $(VENV); \
	fi; \
	$(RUN) pip install --quiet --editable '.[tpu,dev]'; \
	touch $@
