# make demo and make test set everything up on a fresh machine: a virtual environment with the tested versions, then run.
PYTHON ?= python3
VENV ?= .venv
# test files that run at once; one file stays on one process, so what it shares is built once
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test test-slow fuzz lint format clean

help:
	@echo "make demo       phantoms -> encoder -> probe -> pictures -> report, some minutes on two cores"
	@echo "make test       the default tests"
	@echo "make test-slow  the slow ones too"
	@echo "make fuzz       random transport problems with every back end, damaged files and tables; a quarter of an hour"
	@echo "make lint       ruff, mypy strict, architecture test"

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/otcxr demo --out runs/demo

# of each process: more threads than cores only wait for each other
test test-slow: export OMP_NUM_THREADS = 1

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m 'slow and not gpu' -n $(JOBS) --dist loadfile

fuzz: $(READY)
	$(BIN)/python tests/fuzz_ot.py --problems 1000000 --seed 0
	$(BIN)/python tests/fuzz_ot.py --problems 1000000 --seed 1
	$(BIN)/python tests/fuzz_data.py --inputs 100000

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
