# evit_jax: everything runs in .venv, which `make` builds from requirements.txt.

PYTHON  ?= python3
WORKDIR ?= runs/digits
KILLS   ?= 200
JOBS    ?= 2
ARGS    ?=

# The site needs none of the package's dependencies: its own environment has the extra `docs` alone.
DOCS_VENV ?= .venv-docs
BIN   := .venv/bin
# Touched last: an install that was interrupted is repeated.
READY := .venv/.ready
# XLA allocates its buffers at every step; with huge pages this is faster.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.PHONY: help venv train test test-slow test-slurm test-browser bench-gpu soak lint docs clean

help:  ## Lists the targets
	@grep -E '^[a-z-]+:.*##' Makefile | awk -F ':.*## ' '{ printf "make %-13s %s\n", $$1, $$2 }'

venv: $(READY)  ## Builds .venv with PYTHON= (3.11 to 3.13); rebuilds it after a change of requirements.txt

# Removed first: with .venv activated, PYTHON may be the one inside it.
$(READY): requirements.txt
	rm -rf .venv
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 to 3.13, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; (3, 11) <= sys.version_info < (3, 14) or \
	  sys.exit(f"$(PYTHON) is Python {v}; evit_jax needs 3.11 to 3.13. Name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -r requirements.txt
	@touch $@

train: $(READY)  ## Trains on digits; ARGS= for more flags, WORKDIR= for another folder
	$(HUGE_PAGES) $(BIN)/python -m evit_jax.main --config configs/digits.py --workdir $(WORKDIR) $(ARGS)

test: $(READY)  ## Runs the fast tests in JOBS= processes of about 3 GB; ARGS= for more flags
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(READY)  ## Runs the slow tests
	$(BIN)/python -m pytest -m slow $(ARGS)

test-slurm: $(READY)  ## Runs the tests against a real Slurm (apt-get install slurm-wlm munge)
	$(BIN)/python -m pytest -m slurm -n 0 tests/launch/slurm $(ARGS)

test-browser: $(READY)  ## Runs the tests in a browser (apt-get install chromium chromium-driver)
	$(BIN)/python -m pytest -m browser -n 0 tests/serving $(ARGS)

bench-gpu: $(READY)  ## Measures models on one GPU in 8 minutes; writes gpu.json and gpu.md
	$(BIN)/python -m evit_jax.benchmark gpu --config configs/deit_s.py --json gpu.json --markdown gpu.md $(ARGS)

soak: $(READY)  ## Kills a short training KILLS= times and compares its result
	$(BIN)/python -m tests.soak --kills $(KILLS)

lint: $(READY)  ## Checks the code with ruff
	$(BIN)/ruff check .

docs: $(DOCS_VENV)/.ready  ## Builds the site in build/docs; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict --quiet

$(DOCS_VENV)/.ready: pyproject.toml
	rm -rf $(DOCS_VENV)
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" > $(DOCS_VENV)/extra.txt
	$(DOCS_VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off --quiet -r $(DOCS_VENV)/extra.txt
	@touch $@

clean:  ## Removes .venv, builds and caches; leaves runs/
	rm -rf .venv $(DOCS_VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
