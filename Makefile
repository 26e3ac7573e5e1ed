# Both commands of the README, and what they need. Everything goes into .venv.
PYTHON ?= python3
CONSTRAINTS ?= constraints/plugin-1.6.0.txt
BIN := .venv/bin

.PHONY: demo test lint bench clean

demo: .venv/ready
	$(BIN)/xai-pool-patch demo

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv --clear .venv
	PIP_CONSTRAINT=$(CONSTRAINTS) $(BIN)/python -m pip install --quiet --editable ".[demo,dev]"
	touch $@

clean:
	rm -rf .venv
