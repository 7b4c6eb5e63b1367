# `make demo` makes a picture and `make test` runs every check, on a machine with Python 3.11 or 3.12 and nothing else.
# Both keep their environment in .venv and install again only when pyproject.toml changed. pip takes its indexes, and
# with them the build of torch, from its own configuration.

VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/denoised generate "a large red circle above a small blue square" --negative-prompt blurry --cfg-scale 4 \
		--cfg-parallel-size 2 --output demo.png

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

clean:
	rm -rf $(VENV) demo.png

# The first interpreter that really runs and is of a version we install on.
$(BIN)/python:
	@for python in $(PYTHON) python3.11 python3.12 python3; do \
		if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then \
			$$python -m venv $(VENV) && exit 0; \
			echo "$$python cannot make an environment; install its venv module (Debian: python3-venv)." >&2; exit 1; \
		fi; \
	done; echo "No Python 3.11 or 3.12 found; install one, or give it as PYTHON=..." >&2; exit 1

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/.installed
