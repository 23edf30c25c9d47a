# Every target sets up what it needs in .venv; nothing needs root, nothing is fetched but packages.
#
#   make sim                      every weight of a decoder block through the RTL, against golden
#   make sim SIM=icarus LANES=16  the same elsewhere; see `make help`
#   make sim-block                the products of that block on 64 tokens, computed by the RTL

PYTHON ?= python3
VENV   ?= .venv
SIM    ?= verilator
LANES  ?= 64
FORMAT ?= BOF4-NF4sS1E5M5
# Model file and tensors; empty means the embedded SmolLM2-135M and its decoder block 0.
MODEL  ?=
TENSORS ?=
OUT    ?= build/verilog
JOBS   ?= 2

# Neighbours, which share builds, stay on one worker until another has nothing left to do.
PARALLEL := -n $(JOBS) --dist worksteal

ifneq ($(words $(VENV)),1)
$(error VENV=$(VENV): make takes no spaces in its targets)
endif

# A word for the shell, whatever is in it.
quoted = '$(subst ','\'',$(1))'

BIN   := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench-ready
LLM_READY := $(VENV)/.llm-ready
SYNTH_READY := $(VENV)/.synth-ready

.DEFAULT_GOAL := help
.PHONY: help tools setup sim sim-block sim-model test test-all test-llm golden bench-golden bench-quantizer coverage verilog datasheet synth \
        lint types format check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: SIM=verilator|icarus LANES=$(LANES) FORMAT=$(FORMAT) MODEL=file.gguf"
	@echo "           TENSORS='blk.3.*' OUT=$(OUT) PYTHON=$(PYTHON) JOBS=$(JOBS)"

setup: $(READY)  ## install everything into .venv

# First of all, whatever is asked for: a tool that is missing would end in an error of another one.
tools:
	@sh scripts/check_tools.sh $(call quoted,$(PYTHON))

$(READY): pyproject.toml constraints.txt requirements-model.txt | tools
	$(call quoted,$(PYTHON)) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[sim,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-model.txt
	@touch $@

sim: $(READY)  ## quantize a decoder block, run it through the RTL, compare every bit
	$(BIN)/sop sim $(if $(MODEL),$(call quoted,$(MODEL))) $(if $(TENSORS),--tensors $(call quoted,$(TENSORS))) \
	    --format $(call quoted,$(FORMAT)) --lanes $(LANES) --sim $(SIM)

# A quantized model with corrections; made once.
MODEL_FILE := build/sim-model.sop.safetensors

sim-model: $(MODEL_FILE)  ## every weight of SmolLM2-135M through the RTL, against golden
	$(BIN)/sop sim-model $(MODEL_FILE)
	@if command -v iverilog >/dev/null; then \
	    $(BIN)/sop sim-model $(MODEL_FILE) --sim icarus --weights 1000000; \
	else echo "Icarus Verilog is not installed: its subset is not simulated"; fi

# Decoder block 0 on real tokens; on Icarus, which is slow, some of its rows on some of them.
SOME := --tokens 16 --first-rows 16

sim-block: $(MODEL_FILE) $(LLM_READY)  ## decoder block 0 on 64 tokens through LUTs and tile, against golden
	$(BIN)/sop sim-matmul $(MODEL_FILE) --tensors 'blk.0.*' --sim $(SIM) \
	    $(if $(filter icarus,$(SIM)),$(SOME),--tokens 64)

$(MODEL_FILE): $(READY)
	@mkdir -p build
	$(BIN)/sop quantize --format $(call quoted,$(FORMAT)) --effort fast --opq 0.0005 --wr 0.0005 \
	    --jobs $(JOBS) -o $@

test: $(READY)  ## run all tests: golden model, command line, RTL on every simulator installed
	$(BIN)/python -m pytest $(PARALLEL)

test-all: $(SYNTH_READY)  ## as test, every configuration on both simulators, over 1,000 seeds of AXI traffic
	$(BIN)/python -m pytest $(PARALLEL) --all-simulations

coverage: $(READY)  ## functional coverage: simulate, count what the pins did, fail if a bin is empty
	$(BIN)/python -m tb.coverage_report build/coverage --run --json build/coverage.json

golden: $(READY)  ## run the golden model's own tests only
	$(BIN)/python -m pytest $(PARALLEL) golden

test-llm: $(LLM_READY)  ## run the tests that need PyTorch: calibration, evaluation, export
	$(BIN)/python -m pytest $(PARALLEL) tests/llm

$(LLM_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[llm]'
	@touch $@

bench-golden: $(BENCH_READY)  ## speed and memory of the golden model, against others' quantizers
	$(BIN)/python scripts/bench_golden.py

bench-quantizer: $(BENCH_READY)  ## seconds and bytes of the quantizer by size of layer, and what whole models take
	$(BIN)/python scripts/bench_quantizer.py

$(BENCH_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

verilog: $(READY)  ## write the Verilog of every unit into OUT
	$(BIN)/sop verilog all --format $(call quoted,$(FORMAT)) --lanes $(LANES) -o $(call quoted,$(OUT))

synth: $(SYNTH_READY)  ## synthesize every unit for gates and FPGAs: docs/resources.json and .md
	$(BIN)/sop synth --format $(call quoted,$(FORMAT)) --hif HIF7 --lookup all --compare --jobs $(JOBS) -o docs

$(SYNTH_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[synth]'
	@touch $@

lint: $(READY)  ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: datasheet
datasheet: $(READY)  ## write docs/datasheet anew: text, and timing diagrams from simulations on Icarus
	$(BIN)/sop datasheet all -o docs/datasheet

types: $(READY)  ## mypy, strict
	$(BIN)/mypy

format: $(READY)  ## reformat the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types test sim  ## everything that CI runs

clean:  ## remove builds; .venv stays
	rm -rf build
