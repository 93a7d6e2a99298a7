# Every target works from nothing but python3 (3.11 or later) and make: it sets up .venv and installs what
# it needs, and no more, from pyproject.toml. The second time only a changed pyproject.toml reinstalls.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# Tests run in one process per core, so each keeps to one thread; NPROC sizes XLA's own pool, where two
# threads have been seen to wait for one another for ever (jaxlib 0.10.2). Compiled programs are kept between runs.
WORKERS ?= auto
TEST_ENV := JAX_PLATFORMS=cpu NPROC=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MPLBACKEND=Agg \
	XLA_FLAGS="--xla_cpu_multi_thread_eigen=false $$XLA_FLAGS" \
	JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal
# Most of a test is compilation. The fast tests do without XLA's costly passes, test-all keeps them.
FAST_ENV := XLA_FLAGS="--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0 $$XLA_FLAGS"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help certify theory test test-all test-lower lint format bench notebooks clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

certify: $(VENV)/.installed-cli ## Run specdef certify; ARGS="..." is passed on
	@$(BIN)/specdef certify $(ARGS)

test: $(VENV)/.installed-test ## Run the fast tests; ARGS="..." goes to pytest
	@$(TEST_ENV) $(FAST_ENV) $(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.installed-test ## Run every test
	@$(TEST_ENV) $(PYTEST) $(ARGS)

test-lower: ## Run the fast tests on the oldest supported versions, in .venv-lower
	@$(MAKE) --no-print-directory VENV=.venv-lower CONSTRAINTS=tests/lower-bounds.txt test

theory: $(VENV)/.installed-test ## Check the theory by machine; ARGS="--full", ARGS="--only 2.4"
	@$(BIN)/python -m theory $(ARGS)

lint: $(VENV)/.installed-dev ## Check style, layout, types and who imports whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/pyright

format: $(VENV)/.installed-dev ## Lay out the code, and mend what ruff can mend
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: $(VENV)/.installed-bench ## Run every benchmark, or the one named by ARGS="NAME"
	@for file in $(if $(ARGS),$(ARGS:%=benchmarks/%.py),$(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))); do \
		name=$$(basename "$$file" .py); echo "benchmark: $$name"; \
		JAX_PLATFORMS=cpu MPLBACKEND=Agg $(BIN)/python -m "benchmarks.$$name" || exit 1; \
	done

notebooks: $(VENV)/.installed-notebooks ## Run notebooks/*.py and write the .ipynb beside each
	@set -- $(wildcard notebooks/*.py); [ $$# -eq 0 ] || \
		JAX_PLATFORMS=cpu $(BIN)/python -m jupytext --to ipynb --execute "$$@"

clean: ## Remove the environments and every cache
	@rm -rf .venv .venv-lower .cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each extra. Make removes no stamp of a failed install, as it is only written after it.
$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(VENV)/.created
	@echo "installing specdef_jax[$*] into $(VENV), about a minute the first time"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e ".[$*]"
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "specdef_jax needs Python 3.11 or later, and $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@
