# make demo · make test · make test-all · make chaos · make check · make setup — each makes what it needs; nothing has to be installed
# beforehand but git, make and Python 3.10 or newer with its venv module.
# make cluster · make cluster-down — a Slurm cluster of four nodes on this machine, to play with.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-all chaos check clean cluster cluster-down

setup: $(READY)

# The mark is written last: an install that was cut is done again.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { echo "The venv module is missing; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing into $(VENV): several GB with PyTorch, a few minutes"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/nsi demo demo

# Slurm's packages where they may be installed. loadgroup: one worker for all that shares the Slurm cluster.
test: setup
	@$(BIN)/python -m tests.slurm.cluster install
	$(BIN)/pytest -n 2 --dist loadgroup

# And what takes too long for every day.
test-all: setup
	@$(BIN)/python -m tests.slurm.cluster install
	$(BIN)/pytest -n 2 --dist loadgroup -m ""

cluster: setup
	@$(BIN)/python -m tests.slurm.cluster up

cluster-down: setup
	@$(BIN)/python -m tests.slurm.cluster down

chaos: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf demo .pytest_cache .ruff_cache .hypothesis
