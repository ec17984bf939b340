# Two commands: `make demo` shows the whole promise, `make test` runs the test suite. Both start from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per process: two stall each other when anything else runs.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint clean

$(VENV)/ready: pyproject.toml constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints/cpu.txt -e ".[dev]"
	touch $@

demo: $(VENV)/ready
	$(BIN)/fewstep demo --out runs/demo

test: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist loadfile

clean:
	rm -rf $(VENV) runs build src/*.egg-info
