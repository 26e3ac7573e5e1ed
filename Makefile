# Both commands of the README, and what they need. Everything goes into a virtual environment.
PYTHON ?= python3
PLUGIN ?= 1.6.0
CONSTRAINTS := constraints/plugin-$(PLUGIN).txt
VENV := .venv$(PLUGIN:1.6.0=)
BIN := $(VENV)/bin

.PHONY: demo test bench lint clean

demo: $(VENV)/ready
	$(BIN)/xai-pool-patch demo

test: $(VENV)/ready
	$(BIN)/python -m pytest $(TESTS)

bench: $(VENV)/ready
	$(BIN)/xai-pool-patch bench

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv --clear $(VENV)
	PIP_CONSTRAINT=$(CONSTRAINTS) $(BIN)/python -m pip install --quiet --editable ".[demo,dev]"
	touch $@

clean:
	rm -rf .venv*
