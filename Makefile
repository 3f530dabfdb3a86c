# Both main targets set up their own virtual environment; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test thorough matrix lint format clean

quickstart: $(STAMP)
	$(BIN)/limbeck quickstart

# A process a core and one thread a process: tiny models gain nothing from more, and idle OpenMP threads spin against the
# processes beside them. A file's tests stay together, since they share what their fixtures make.
# Further variants of what a quicker test shows, and what takes long, wait for `make thorough`.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not thorough" -n auto --dist loadfile --cov --cov-report=term --durations=25

# Every test, those of further models, backends and precisions too: an hour on 2 cores; before a release.
thorough: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-cov --durations=25

# Half an hour: every architecture, backend and precision.
matrix: $(STAMP)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -n 0 --no-cov tests/exporters/test_matrix.py --matrix docs/matrix.md

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python .ci/type_check.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# pip installs torch first: a range that admits a newer torch would bring several GB of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage
