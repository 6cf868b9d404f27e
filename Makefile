# One virtual environment per Python: .venv for python3, .venv-python3.12 for PYTHON=python3.12.
PYTHON = python3
VENV = $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
# Environment with the ahead-of-time compilers for TPUs and GPUs: two gigabytes that nothing else needs.
COMPILE_VENV = .venv-compile
# Extra arguments for the command of a target: make test ARGS="tests/cells -x"
ARGS =

INSTALLED = $(VENV)/.installed
# Two workers: tests mostly compile small programs on one core. Tests of a file share compiled programs.
PYTEST = $(VENV)/bin/python -m pytest -n 2 --dist loadfile

.PHONY: help install install-compile train test test-slow test-compile test-all lint

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## create the virtual environment; other targets do so when needed

install-compile: $(COMPILE_VENV)/.installed ## create the environment of test-compile

train: $(INSTALLED) ## train the default run: a small xLSTM on the text of this Python installation
	$(VENV)/bin/xlstm-jax train experiments/char_lm.py $(ARGS)

test: $(INSTALLED) ## run every test that is neither slow nor exhaustive
	$(PYTEST) -m "not slow and not exhaustive" $(ARGS)

test-slow: $(INSTALLED) ## run the slow tests
	$(PYTEST) -m "slow and not exhaustive" $(ARGS)

test-compile: $(COMPILE_VENV)/.installed ## compile kernels and train steps for TPUs and GPUs; no TPU or GPU needed
	TRITON_INTERPRET=0 $(COMPILE_VENV)/bin/python -m pytest -n 2 --dist loadfile tests/compile -m "not slow" $(ARGS)

test-all: $(INSTALLED) ## run every test; before a release
	$(PYTEST) $(ARGS)

lint: $(INSTALLED) ## check layout, common mistakes and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python

# The recipe needs $(PYTHON) only if the environment does not exist yet.
$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(VENV)/bin/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "xlstm-jax needs Python 3.11 or newer, but $(PYTHON) is older or missing; choose another one: make PYTHON=python3.12 $(or $(MAKECMDGOALS),install)" >&2; exit 1; }
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --editable '.[dev]' --constraint constraints.txt
	@touch $@

$(COMPILE_VENV)/.installed: pyproject.toml constraints.txt
	test -x $(COMPILE_VENV)/bin/pip || $(PYTHON) -m venv $(COMPILE_VENV)
	$(COMPILE_VENV)/bin/python -m pip install --editable '.[dev,compile]' --constraint constraints.txt
	@touch $@
