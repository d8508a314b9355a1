PYTHON ?= python3
VENV ?= .venv
# auto: a build for the GPU if there is one, else a CPU build, in which the simulated GPU runs. Or: cpu, gpu.
TORCH ?= auto
PYTEST_ARGS ?=
BENCH_ARGS ?=
GPU_CHECK_ARGS ?=
# How long `make test-faults` tries.
MINUTES ?= 60
# no: leave out Chromium, the frontend packages and Node, and with them the tests that need them.
BROWSER ?= yes
# Threads that wait without spinning: where other programs run too, PyTorch's CPU kernels are many times faster.
export OMP_WAIT_POLICY ?= PASSIVE

BIN := $(VENV)/bin
STAMP := $(VENV)/.qmove-$(TORCH)
BROWSER_STAMP := $(if $(filter no,$(BROWSER)),,$(VENV)/.qmove-browser)
# npm and what it starts find the environment's own node.
NPM := PATH="$(abspath $(BIN)):$$PATH" $(abspath $(BIN))/npm --prefix tests/web
SOURCES := qmove_core simcuda tests tools $(wildcard *.py nodes stand_ins benchmarks examples)

# Tests run many small kernels: waiting for a second thread costs more than it brings, most of all on a busy machine.
test test-kinds test-ray test-faults test-hostile test-hostile-sample: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-kinds test-ray matrix test-faults test-hostile test-hostile-sample check docs publish-check audit format bench gpu-check setup clean

help: ## Show what there is to make
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## Park and restore a real quantized model, and show what plain .to() does beside it
	$(BIN)/python -m qmove_core.cli demo

test: $(STAMP) $(BROWSER_STAMP) ## Run all tests, on a GPU or a simulated one (PYTEST_ARGS="-k budget" for some)
ifneq ($(BROWSER_STAMP),)
	$(NPM) run test
endif
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-faults: $(STAMP) ## Try faults, histories, threads and memory for MINUTES (60), and write docs/results/faults.json
	QMOVE_FAULT_MINUTES=$(MINUTES) QMOVE_FAULT_RESULTS=docs/results/faults.json $(BIN)/python -m pytest tests/faults $(PYTEST_ARGS)
	$(BIN)/python -m tools.guarantees

test-ray: $(STAMP) ## Run the tests with a real Ray Serve, and write docs/results/ray.json
	$(BIN)/python -m pip install --quiet --constraint tools/constraints.txt 'ray[serve]>=2.60'
	QMOVE_RAY=1 QMOVE_RAY_RESULTS=docs/results/ray.json $(BIN)/python -m pytest tests/serving $(PYTEST_ARGS)

# What the guarantees' suites need on a card, without one: every knob of simcuda that is off by default.
HOSTILE ?= tests/guarantees
test-hostile: $(STAMP) ## Run the guarantees' suites on a simulated GPU that is as unkind as real ones
	QMOVE_SIMULATOR=hostile $(BIN)/python -m pytest $(HOSTILE) $(PYTEST_ARGS)

# A sample of it, with the other two allocators, in less than two minutes: for CI.
HOSTILE_SAMPLE := tests/guarantees/test_released.py tests/guarantees/test_exact.py tests/guarantees/test_bounded.py
test-hostile-sample: $(STAMP)
	for allocator in native expandable async; do \
		QMOVE_SIMULATOR=hostile,$$allocator $(BIN)/python -m pytest -q $(HOSTILE_SAMPLE) || exit 1; \
	done

# In an environment of their own: some of the packages bring or patch much else.
KINDS_VENV ?= $(VENV)-kinds
KINDS_STAMP := $(KINDS_VENV)/.qmove-kinds
test-kinds: $(KINDS_STAMP) ## Try every kind of quantized model, and write docs/results/kinds.json and docs/kinds.md
	QMOVE_KINDS=all QMOVE_KINDS_RESULTS=docs/results/kinds.json $(KINDS_VENV)/bin/python -m pytest tests/kinds $(PYTEST_ARGS)
	$(KINDS_VENV)/bin/python -m tools.kinds

$(KINDS_STAMP): pyproject.toml tools/setup_env.py tools/constraints.txt tools/constraints-kinds.txt
	$(PYTHON) tools/setup_env.py $(KINDS_VENV) --torch $(TORCH) --kinds
	@touch $@

# Environments for other releases take 30 GB and half an hour, once.
MATRIX_ARGS ?=
matrix: $(STAMP) ## Run tests with each release that people run, and write docs/releases.md (MATRIX_ARGS="--only torch")
	$(BIN)/python -m tools.matrix $(MATRIX_ARGS)

check: $(STAMP) $(BROWSER_STAMP) ## Check format, lint, types and which room imports which
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
ifneq ($(BROWSER_STAMP),)
	$(NPM) run check
endif

DOCS_STAMP := $(VENV)/.qmove-docs
docs: $(DOCS_STAMP) ## Build the documentation's site in build/site; a broken link or docstring is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

$(DOCS_STAMP): pyproject.toml tools/constraints.txt | $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint tools/constraints.txt --editable '.[docs]'
	@touch $@

publish-check: $(STAMP) ## Have the registry's check and two scanners look at what would be published
	$(BIN)/python -m tools.publish_check $(VENV)-publish

# Not in `check`: it asks an online service, which many a CI cannot reach, and a package index without one
# answers as if nothing were known. So here what cannot be audited is a failure (--strict).
audit: $(STAMP) ## Ask the package index's vulnerability service about the versions in tools/constraints.txt
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip_audit --strict --requirement tools/constraints.txt --no-deps --disable-pip

format: $(STAMP) ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(STAMP) ## Measure qmove beside its peers and write docs/benchmark.md (BENCH_ARGS=--quick: only whether it works)
	$(BIN)/python -m benchmarks.compare $(BENCH_ARGS)

gpu-check: $(STAMP) ## Prove qmove on this GPU in about eight minutes (without one: over the simulated GPU)
	$(BIN)/python -m tools.gpu_check $(GPU_CHECK_ARGS)

setup: $(STAMP) ## Make the environment in .venv; the targets above do it when something has changed

$(STAMP): pyproject.toml tools/setup_env.py tools/constraints.txt
	$(PYTHON) tools/setup_env.py $(VENV) --torch $(TORCH)
	@touch $@

$(VENV)/.qmove-browser: tools/setup_browser.py tests/web/package-lock.json | $(STAMP)
	$(BIN)/python -m tools.setup_browser $(VENV)
	@touch $@

clean: ## Remove the environment, caches and build output
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache qmove-demo.png tests/browser/artefacts tests/web/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
