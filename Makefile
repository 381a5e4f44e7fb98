# make help shows what there is. Everything is done in .venv; a second call does only what changed.

VENV := .venv
BIN := $(VENV)/bin
PIP_ARGS ?=

# The first interpreter of a tested version; override with make PYTHON=...
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$python && break; done)

# The interpreters of make test-pythons: names or paths.
PYTHONS ?= python3.11 python3.12 python3.13

CONSTRAINTS := constraints.txt
PINNED := pyproject.toml $(CONSTRAINTS)
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q \
	-c $(CONSTRAINTS) $(PIP_ARGS)

.DEFAULT_GOAL := help
.PHONY: help install quickstart example-smollm2 test test-pythons test-oldest gpu-check gpu-wheels \
	faults lint format docs clean

help: ## Show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 25

install: $(VENV)/.installed ## Install promptshard into .venv

quickstart: $(VENV)/.installed ## Install, train two prompts on a tiny base, show the result
	$(BIN)/promptshard train examples/quickstart.yaml

example-smollm2: $(VENV)/.installed-gguf ## Install, train prompts for a small real language model, show the result
	$(BIN)/promptshard example smollm2 runs/smollm2

test: $(VENV)/.installed-test lint ## Install what tests need, check the code, run every test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 $(PYTEST_ARGS)

test-pythons: ## Run the unit tests and the wheel test with every supported Python
	@for python in $(PYTHONS); do $$python -c '' 2>/dev/null || missing="$$missing $$python"; done; \
	test -z "$$missing" || { echo "error: not found:$$missing; install them, or name those to test: make test-pythons PYTHONS=\"python3.11 /path/to/python3.13\"" >&2; exit 2; }
	@set -e; for python in $(PYTHONS); do \
	venv=$(VENV)-$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	$(MAKE) --no-print-directory VENV=$$venv PYTHON=$$python $$venv/.installed-test; \
	echo "testing with $$($$venv/bin/python --version)"; \
	$$venv/bin/python -m pytest -n auto --maxprocesses 4 $(PYTEST_ARGS) \
		tests/unit tests/integration/test_wheel.py; done

test-oldest: ## Test the main families with the oldest supported transformers
	@$(MAKE) --no-print-directory VENV=$(VENV)-oldest CONSTRAINTS=$(VENV)-oldest/constraints.txt \
		$(VENV)-oldest/.installed-test
	$(VENV)-oldest/bin/python -m pytest -m oldest -n auto --maxprocesses 4 $(PYTEST_ARGS) \
		--ignore=tests/unit/test_gguf_bases.py tests/unit tests/distributed/test_readme.py

gpu-check: $(VENV)/.installed-test ## Check the first GPU in 10 minutes; writes benchmarks/results/gpu-check-*
	$(BIN)/python -m benchmarks.gpu_check $(GPU_CHECK_ARGS)

gpu-wheels: $(VENV)/.installed-test ## Collect what gpu-check needs on a machine without network
	$(BIN)/python -m benchmarks.gpu_wheels $(GPU_WHEELS_ARGS)

faults: $(VENV)/.installed-test ## List the failures that tests reproduce
	@$(BIN)/python -m pytest --list-faults

lint: $(VENV)/.installed-test ## Check format, lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test ## Rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed ## Write the reference and the JSON schema of the run file again
	$(BIN)/python docs/render.py

clean: ## Remove .venv and caches; runs/ stays
	rm -rf $(VENV) $(VENV)-3.* $(VENV)-oldest build *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 found; install one, or give make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/constraints.txt: constraints.txt constraints-oldest.txt | $(BIN)/python
	@awk -F== 'NR == FNR { replaced[$$1]; print; next } !($$1 in replaced)' \
		constraints-oldest.txt constraints.txt > $@

$(VENV)/.installed: $(PINNED) | $(BIN)/python
	@echo "installing promptshard and its libraries into $(VENV) (a few minutes the first time)"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-gguf: $(VENV)/.installed
	$(INSTALL) -e '.[gguf]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing what the tests need into $(VENV)"
	$(INSTALL) -e '.[test,dev]'
	@touch $@
