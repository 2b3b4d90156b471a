# `make quickstart` and `make test` each set themselves up: a virtual environment of their own in
# .venv/, with uv where it can be had and pip where not, pinned by requirements.lock.txt.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
LOCK   := requirements.lock.txt
EXTRA  := .[dev]

.PHONY: help env quickstart test slow soak lint doctest lock clean

help:
	@echo "make quickstart   two contributors patch one model, a maintainer vets and merges them"
	@echo "make test         the test suite"
	@echo "make slow         the tests that take long: experiments at toy size, whole runs on meshes"
	@echo "make soak         the test suite with the long tests and many more fuzz examples"
	@echo "make lint         formatting, lint and types"
	@echo "make doctest      the examples in docstrings"
	@echo "make env          only build the virtual environment ($(VENV)/)"
	@echo "make lock         resolve the lock file anew"

env: $(VENV)/.stamp

$(VENV)/.stamp: pyproject.toml $(LOCK)
	@$(PYTHON) -c "import sys; sys.exit('fishjax needs Python 3.11 or newer, this is %d.%d: set PYTHON=python3.12, say' % sys.version_info[:2] if sys.version_info < (3, 11) else 0)"
	@$(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV)/ (once)" >&2
	@{ $(BIN)/python -m pip install -q --disable-pip-version-check uv \
	   && $(BIN)/uv pip install -q --python $(BIN)/python -c $(LOCK) -e '$(EXTRA)'; } \
	 || $(BIN)/python -m pip install -q --disable-pip-version-check -c $(LOCK) -e '$(EXTRA)'
	@touch $@

quickstart: env
	@$(BIN)/python -m experiments.quickstart --gin_file configs/quickstart.gin $(if $(OUT),--gin_bindings 'OUT = "$(OUT)"') $(if $(SEED),--gin_bindings 'SEED = $(SEED)')

test: env
	@$(BIN)/python -m pytest -n 2 -q -m 'not slow' --durations=40

slow: env
	@$(BIN)/python -m pytest -n 2 -q -m slow --durations=10

soak: env
	@HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest -n 2 -q --soak

lint: env
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

doctest: env
	@$(BIN)/python -m pytest -q -n 2 --doctest-modules fishjax

lock: env
	@$(BIN)/uv pip compile -q --universal --all-extras --no-header --no-annotate --no-emit-index-url --python-version 3.11 pyproject.toml -o $(LOCK)

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
