PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint clean

demo: .venv/installed  ## train two small models on generated stories and sums, and show what recurrence bought
	$(BIN)/python recipes/demo_more.py --output_dir demo

test: .venv/installed-test  ## the default test suite
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PYTEST_ARGS)

test-slow: .venv/installed-test  ## the tests marked slow
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@ .venv/installed

clean:
	rm -rf .venv build dist *.egg-info
