# One virtual environment per Python: .venv for python3, .venv-python3.12 for PYTHON=python3.12.
PYTHON = python3
VENV = $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
# With the compilers for TPUs and GPUs that are not here; apart, as two gigabytes serve nothing else.
COMPILE_VENV = .venv-compile
# What to add to the command of a target: make test ARGS="tests/cells -x"
ARGS =

INSTALLED = $(VENV)/.installed
# Two workers: the tests mostly compile small programs, one core each. The tests of a file share them.
PYTEST = $(VENV)/bin/python -m pytest -n 2 --dist loadfile

.PHONY: help install install-compile train test test-slow test-compile test-all lint

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## the virtual environment; the others make it themselves when needed

install-compile: $(COMPILE_VENV)/.installed ## the environment of test-compile

train: $(INSTALLED) ## the default run: a small xLSTM on the text of this Python installation
	$(VENV)/bin/xlstm-jax train experiments/char_lm.py $(ARGS)

test: $(INSTALLED) ## every test that is neither slow nor exhaustive
	$(PYTEST) -m "not slow and not exhaustive" $(ARGS)

test-slow: $(INSTALLED) ## the slow tests
	$(PYTEST) -m "slow and not exhaustive" $(ARGS)

test-compile: $(COMPILE_VENV)/.installed ## kernels compiled for TPUs and GPUs; without any of them
	TRITON_INTERPRET=0 $(COMPILE_VENV)/bin/python -m pytest -n 2 --dist loadfile tests/compile -m "not slow" $(ARGS)

test-all: $(INSTALLED) ## every test; before a release
	$(PYTEST) $(ARGS)

lint: $(INSTALLED) ## layout, common mistakes and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python

# The environment's own Python is asked where there is one: $(PYTHON) is only needed to make it.
$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(VENV)/bin/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "xlstm-jax needs Python 3.11 or newer and $(PYTHON) is not; name one that is: make PYTHON=python3.12 $(or $(MAKECMDGOALS),install)" >&2; exit 1; }
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --editable '.[dev]' --constraint constraints.txt
	@touch $@

$(COMPILE_VENV)/.installed: pyproject.toml constraints.txt
	test -x $(COMPILE_VENV)/bin/pip || $(PYTHON) -m venv $(COMPILE_VENV)
	$(COMPILE_VENV)/bin/python -m pip install --editable '.[dev,compile]' --constraint constraints.txt
	@touch $@
