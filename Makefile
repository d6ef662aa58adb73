# Two commands that need nothing but make and Python >= 3.11: `make demo` and `make test`.

PYTHON ?= python3
COMMA := ,
VENV := .venv
BIN := $(VENV)/bin
LINUX := $(filter Linux,$(shell uname -s))
RUN_EXTRA := $(if $(LINUX),[cpu])
TEST_EXTRA := $(if $(LINUX),[cpu$(COMMA)test],[test])

.PHONY: demo test clean

demo: $(VENV)/installed
	@$(BIN)/mlxflash generate --prompt "Once upon a time" --memory 24MB --temp 0.8 --seed 7 --max-tokens 120

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mlxflash needs Python 3.11 or later; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml $(wildcard mlxflash/_native/*.[ch]) | $(VENV)/bin/python
	@echo "Installing mlxflash into $(VENV) (once, a minute or two) ..."
	@$(BIN)/pip install -q --disable-pip-version-check -e '.$(RUN_EXTRA)'
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@$(BIN)/pip install -q --disable-pip-version-check -e '.$(TEST_EXTRA)'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info mlxflash/_native/*.so
