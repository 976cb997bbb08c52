# Two commands are enough on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED = 0
export FLWR_TELEMETRY_ENABLED = 0
# Where it is set, each of the many processes that tests start would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo bench test test-long browser docs lint format clean
help:            ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group dev
	touch $@

demo: $(VENV)/.ready ## set up and run the main job: scenarios/organs.yaml
	$(BIN)/python -m fedmerge.simulate scenarios/organs.yaml

test: $(VENV)/.ready ## set up, check style and types, run the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-long: $(VENV)/.ready ## the tests that take a minute or more each: kills, clusters, deployments
	$(BIN)/python -m pytest -m long

browser: $(VENV)/.ready ## every page in Chromium, which has to be there: axe, a phone, dark paper, print
	$(BIN)/python -m pip install --quiet --group browser
	$(BIN)/python -m pytest -m browser -rs

docs: $(VENV)/.ready ## write the documentation to docs-site/
	$(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.ready ## what merging costs, as ratios; fails where one is above benchmarks/baseline.json
	$(BIN)/python benchmarks/ratios.py

lint: $(VENV)/.ready ## ruff and mypy only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:           ## remove the environment, runs and caches of this folder
	rm -rf $(VENV) runs pool cache docs-site .pytest_cache .mypy_cache .ruff_cache
