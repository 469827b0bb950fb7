# Needs Python 3.11 or newer, and git. `make demo` and `make test` do all the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test slow lint clean

demo: $(VENV)/.demo
	rm -rf runs/demo
	$(BIN)/mmsae extract --config recipes/scenes_extract.yaml
	$(BIN)/mmsae fit --config recipes/scenes_topk.yaml
	$(BIN)/mmsae evaluate --run runs/demo
	$(BIN)/mmsae report --run runs/demo

test: lint
	$(BIN)/python -m pytest -m "not slow" -n 2 --cov=mmsae --cov-report=term:skip-covered --cov-fail-under=85

slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.demo: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[clip]"
	touch $@

$(VENV)/.test: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist runs stores *.egg-info
