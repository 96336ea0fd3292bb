# `make demo` and `make test` each work alone on a fresh clone: both set up .venv first, once.
PYTHON ?= python3
VENV := .venv/bin/python
READY := .venv/ready

.PHONY: setup demo test coverage lint test-slow docs package lowest clean

setup: $(READY)

# torch first: what comes after must not choose another build of it.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet "torch>=2.11,<2.14"
	$(VENV) -m pip install --quiet --editable ".[dev]"
	touch $(READY)

demo: $(READY)
	$(VENV) -m subquad.cli demo

test: lint
	$(VENV) -m pytest -m "not slow" -n 2 $(COVERAGE)

# `make test`, and then the lines and branches that no test ran, also in processes that tests start.
coverage: COVERAGE := --cov --cov-report=term
coverage: test

lint: $(READY)
	$(VENV) -m ruff format --check .
	$(VENV) -m ruff check .
	$(VENV) -m mypy

test-slow: $(READY)
	$(VENV) -m pytest -m slow

docs: $(READY)
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 $(VENV) -m mkdocs build --strict --quiet

package: $(READY)
	scripts/check_package.sh $(PYTHON)

# The core with the lowest version of each dependency.
lowest: $(READY)
	scripts/check_lowest.sh $(PYTHON)

clean:
	rm -rf .venv demo site dist
