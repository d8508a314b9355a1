PYTHON ?= python3
VENV ?= .venv
# auto: a build for the GPU if there is one, else a CPU build, in which the simulated GPU runs. Or: cpu, gpu.
TORCH ?= auto
PYTEST_ARGS ?=
# Threads that wait without spinning: where other programs run too, PyTorch's CPU kernels are many times faster.
export OMP_WAIT_POLICY ?= PASSIVE

BIN := $(VENV)/bin
STAMP := $(VENV)/.qmove-$(TORCH)
SOURCES := qmove_core simcuda tests tools $(wildcard *.py nodes benchmarks)

.DEFAULT_GOAL := help
.PHONY: help demo test check format setup clean

help: ## Show what there is to make
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## Park and restore a real quantized model, and show what plain .to() does beside it
	$(BIN)/python -m qmove_core.cli demo

test: $(STAMP) ## Run all tests, on a GPU or a simulated one (PYTEST_ARGS="-k budget" for some)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(STAMP) ## Check format, lint and types
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

format: $(STAMP) ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

setup: $(STAMP) ## Make the environment in .venv; the targets above do it when something has changed

$(STAMP): pyproject.toml tools/setup_env.py tools/constraints.txt
	$(PYTHON) tools/setup_env.py $(VENV) --torch $(TORCH)
	@touch $@

clean: ## Remove the environment, caches and build output
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache qmove-demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
