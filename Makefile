# `make demo` and `make test` each work alone on a fresh clone: both set up .venv first, once.
PYTHON ?= python3
VENV := .venv/bin/python
READY := .venv/ready

.PHONY: setup demo test lint test-slow clean

setup: $(READY)

# torch first: what comes after must not choose another build of it.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet "torch>=2.11,<2.14"
	$(VENV) -m pip install --quiet --editable ".[dev]"
	touch $(READY)

demo: $(READY)
	$(VENV) -m subquad.cli study recipes/nano.yaml --output demo
	$(VENV) -m subquad.cli report demo

test: lint
	$(VENV) -m pytest -m "not slow" -n 2

lint: $(READY)
	$(VENV) -m ruff format --check .
	$(VENV) -m ruff check .
	$(VENV) -m mypy

test-slow: $(READY)
	$(VENV) -m pytest -m slow

clean:
	rm -rf .venv demo
