# What CI runs is what you run. Every target sets up .venv first; that takes no time when nothing changed.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
SMK := Snakefile workflow/rules
KERNEL_TESTS := $(addprefix tests/unit/test_, $(addsuffix .py, \
    gpu_attention gpu_kernels gpu_products gpu_prefill prompt_graphs gpu_drafter gpu_trunk_tree \
    choose_kernels graphs gpu_oracle gpu_noise))

export PYTHON
.PHONY: help setup run serve test kernels quality format docs lock clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

setup:  ## create or refresh .venv and the profile links
	@envs/setup.sh

run: setup  ## run the workflow on this machine: make run ARGS="--configfile config/tiny.yaml"
	$(BIN)/snakemake --profile profiles/local $(ARGS)

serve: setup  ## serve an engine, built first if need be: make serve ENGINE=fp8-redrafter
	$(BIN)/snakemake --profile profiles/local $(ARGS) serve_$(ENGINE)

test: setup  ## run the tests: make test ARGS="-k drafter"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder $(ARGS)

kernels: setup  ## run the tests of the GPU's kernels without a GPU, through Triton's interpreter
	test -d .triton || { rm -rf .triton.partial && \
	    $(BIN)/python -m pip install --quiet --no-deps --target .triton.partial --requirement envs/triton.txt && \
	    mv .triton.partial .triton; }
	PYTHONPATH=.triton OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope $(KERNEL_TESTS) $(ARGS)

quality: setup  ## check format, lint, types, and that generated documents are in step
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/snakefmt --check $(SMK)
	$(BIN)/snakemake --lint --configfile config/config.yaml
	$(BIN)/mypy
	$(BIN)/python -m fourfold.config.document --check

format: setup  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/snakefmt $(SMK)

docs: setup  ## regenerate the configuration's schema and reference
	$(BIN)/python -m fourfold.config.document

lock:  ## resolve envs/requirements.in into the lock
	@envs/lock.sh

clean:  ## remove .venv, caches and profile links; results stay
	rm -rf .venv .triton .triton.partial .pytest_cache .ruff_cache .mypy_cache .hypothesis workflow/src/*.egg-info
	for name in local slurm; do if [ "$$(readlink $$name)" = "profiles/$$name" ]; then rm $$name; fi; done
