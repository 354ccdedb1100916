# Two commands for a fresh clone: `make demo` and `make test`. Each makes .venv and installs what it needs first.
#
# PYTHON   the interpreter that .venv is made with (3.10 or newer), `make test PYTHON=python3.12`
# VENV     where the environment lives
# DEMO     arguments for the demo, `make demo DEMO="--steps 400"`
# OLDEST   versions for `make test-oldest` in place of setup.cfg's lower bounds, `make test-oldest OLDEST="torch==2.11.0"`
# PYTEST   arguments for pytest, `make test PYTEST="-k cache -x"`; by default one process for each core

PYTHON ?= python3
VENV ?= .venv
DEMO ?=
PYTEST ?= --numprocesses auto
OLDEST ?=
OLDEST_TESTS := tests/modeling/test_config.py tests/modeling/test_conv_cache.py tests/modeling/test_retrofit.py \
	tests/modeling/test_registration.py tests/modeling/test_generation.py tests/peft/test_conv_adapter.py
VENV_PYTHON := $(VENV)/bin/python

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest format

help:
	@echo "make demo    retrofit a small Llama, train it beside the original, compare (plots under runs/)"
	@echo "make test    ruff and pytest"
	@echo "make test-oldest  a part of the tests, with the oldest versions that setup.cfg allows"
	@echo "make format  let ruff format the code and fix what it can"

demo: $(VENV)/.installed-demo
	$(VENV_PYTHON) examples/demo.py $(DEMO)

test: $(VENV)/.installed-test
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m pytest $(PYTEST)

test-oldest: $(VENV)-oldest/.installed
	$(VENV)-oldest/bin/python -m pytest $(PYTEST) $(OLDEST_TESTS)

format: $(VENV)/.installed-test
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

# The stamp makes pip run again only when what is to be installed has changed.
$(VENV)/.installed-%: setup.cfg pyproject.toml constraints.txt | $(VENV_PYTHON)
	$(VENV_PYTHON) -m pip install -c constraints.txt -e '.[$*]'
	@touch $@

$(VENV)-oldest/.installed: setup.cfg tests/oldest.py
	'$(PYTHON)' -m venv '$(VENV)-oldest'
	$(VENV)-oldest/bin/python -m pip install $$('$(PYTHON)' tests/oldest.py $(OLDEST)) triton \
		hypothesis pytest pytest-timeout pytest-xdist
	$(VENV)-oldest/bin/python -m pip install --no-deps -e .
	@touch $@

$(VENV_PYTHON):
	@if [ -e '$(VENV)' ]; then \
		echo "error: $(VENV) exists but has no working bin/python; move it away, or set VENV to another folder" >&2; \
		exit 1; \
	fi
	@command -v '$(PYTHON)' >/dev/null || { \
		echo "error: $(PYTHON) not found; set PYTHON to an interpreter, as in: make demo PYTHON=python3.12" >&2; \
		exit 1; \
	}
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: Python 3.10 or newer is needed, $(PYTHON) is $$('$(PYTHON)' --version 2>&1);" \
			"set PYTHON to a newer one, as in: make demo PYTHON=python3.12" >&2; \
		exit 1; \
	}
	@'$(PYTHON)' -c 'import ensurepip, venv' || { \
		echo "error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
		exit 1; \
	}
	'$(PYTHON)' -m venv '$(VENV)'
