# PYTHON=python3.12 selects an interpreter, which has environments of its own: .venv-python3.12. By default
# .ci/python chooses one for .venv; an existing .venv is used as it is.
PYTHON =
VENV = .venv$(if $(PYTHON),-$(notdir $(PYTHON)))
# Environment with the ahead-of-time compilers for TPUs and GPUs: two gigabytes that nothing else needs.
COMPILE_VENV = .venv-compile$(if $(PYTHON),-$(notdir $(PYTHON)))
# Environment with mkdocs.
DOCS_VENV = .venv-docs$(if $(PYTHON),-$(notdir $(PYTHON)))
# Extra arguments for the command of a target: make test ARGS="tests/cells -x"
ARGS =

INSTALLED = $(VENV)/.installed
# Two workers: tests mostly compile small programs on one core. Tests of a file share compiled programs.
PYTEST = $(VENV)/bin/python -m pytest -n 2 --dist loadfile

.PHONY: help install install-compile install-docs train test test-slow test-compile test-faults test-all notebooks notebooks-full docs lint release

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## create the virtual environment; other targets do so when needed

install-compile: $(COMPILE_VENV)/.installed ## create the environment of test-compile

train: $(INSTALLED) ## train the default run: a small xLSTM on the text of this Python installation
	$(VENV)/bin/xlstm-jax train experiments/char_lm.py $(ARGS)

test: $(INSTALLED) ## run every test that is neither slow nor exhaustive
	$(PYTEST) -m "not slow and not exhaustive and not faults" $(ARGS)

test-slow: $(INSTALLED) ## run the slow tests
	$(PYTEST) -m "slow and not exhaustive and not faults" $(ARGS)

test-compile: $(COMPILE_VENV)/.installed ## compile kernels and train steps for TPUs and GPUs; no TPU or GPU needed
	TRITON_INTERPRET=0 $(COMPILE_VENV)/bin/python -m pytest -n 2 --dist loadfile tests/compile -m "not slow" $(ARGS)

test-faults: $(INSTALLED) ## kill, starve and damage runs; ARGS='-m "faults and not slow"' runs a part
	$(VENV)/bin/python -m pytest tests/faults -m faults $(ARGS)

test-all: $(INSTALLED) ## run every test; before a release
	$(PYTEST) $(ARGS)

notebooks: $(INSTALLED) ## execute all notebooks in toy sizes, without changing them
	$(VENV)/bin/python notebooks/run.py $(ARGS)

notebooks-full: $(INSTALLED) ## execute notebooks in full and write their outputs; ARGS="01 07" for some
	$(VENV)/bin/python notebooks/run.py --full $(ARGS)

lint: $(INSTALLED) ## check layout, common mistakes and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python

release: $(INSTALLED) ## build the wheel and the sdist and try both in empty environments
	.ci/release

install-docs: $(DOCS_VENV)/.installed ## create the environment of docs

docs: $(DOCS_VENV)/.installed ## build the documentation site into site/; ARGS="serve" shows it while you write
	JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs $(or $(ARGS),build)

$(VENV)/.installed: EXTRAS = dev
$(COMPILE_VENV)/.installed: EXTRAS = dev,compile
$(DOCS_VENV)/.installed: EXTRAS = docs
# Python 3.14 and newer use the versions of Python 3.13.
$(VENV)/.installed $(COMPILE_VENV)/.installed $(DOCS_VENV)/.installed: pyproject.toml $(wildcard constraints/*.txt)
	@$(@D)/bin/python -c '' 2>/dev/null || \
		{ python=$$(.ci/python $(PYTHON)) && echo "$(@D): $$($$python --version), $$python" && $$python -m venv --clear $(@D); }
	@$(@D)/bin/python -m pip --version >/dev/null 2>&1 || $(@D)/bin/python -m ensurepip
	$(@D)/bin/python -m pip install --editable '.[$(EXTRAS)]' --constraint \
		$$($(@D)/bin/python -c 'import sys; print(f"constraints/py3{min(max(sys.version_info[1], 11), 13)}.txt")')
	@touch $@
