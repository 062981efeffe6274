# Every target sets up what it needs: Python 3.11 or newer and make are enough.
#
#   make demo TORCH=torch==2.13.0    torch with CUDA on Linux, where the default is the CPU build
#   make demo PYTHON=python3.12      another interpreter

PYTHON ?= python3
ifeq ($(shell uname -s),Linux)
TORCH ?= torch==2.13.0+cpu
else
TORCH ?= torch==2.13.0
endif
export PYTHON TORCH

# An environment per TransformerLens: .venv has 3.9.0, and all that is no test runs in it; each of
# the others has its own.
OTHERS := 2.18.0 4.3.0
ENVIRONMENTS := .venv $(OTHERS:%=.venv-tl%)

# Tests never wait for a network; a user of the package may have one.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
PYTEST := python -m pytest --doctest-modules backward_lens_tl tests README.md docs

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: help demo test test-tl2 test-tl4 check check-fast check-all facts-model facts-model-eval
.PHONY: facts-moments mutants tune bench notebooks docs pictures constraints clean FORCE

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/installed ## one prompt through the lens, with the model that ships here: demo.html
	@.venv/bin/backward-lens show --model facts --prompt "Lionel Messi plays for" \
	    --target " Paris" --html demo.html

test: .venv/installed ## tests, doctests and the docs' snippets, on TransformerLens 3.9.0
test-tl2: .venv-tl2.18.0/installed ## the same on TransformerLens 2.18.0
test-tl4: .venv-tl4.3.0/installed ## the same on TransformerLens 4.3.0
test test-tl2 test-tl4:
	$(OFFLINE) $(<D)/bin/$(PYTEST)

check-fast: .venv/installed ## format, lint, types, layers
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

check: check-fast test test-tl2 test-tl4 ## what CI runs: check-fast, test, test-tl2, test-tl4

check-all: check ## check, and the tests that take long
	@for environment in $(ENVIRONMENTS); do \
	    $(OFFLINE) $$environment/bin/$(PYTEST) -m slow || exit 1; \
	done

# MODULES="backward_lens_tl/projection.py backward_lens_tl/host/*" for less than the core that
# pyproject.toml lists, TESTS="tests/test_extremes.py ..." for less than the quick tier. LIMIT is how
# many seconds of tests one mutant gets. What reaches what is kept in mutants/.
SAMPLE ?= 150
SEED ?= 0
LIMIT ?= 60
mutants: .venv/installed ## test the tests: mutants of the core; MODULES="..." SAMPLE=150 SEED=0
	$(OFFLINE) .venv/bin/python tests/mutation.py $(foreach m,$(MODULES),'$m') --sample $(SAMPLE) \
	    --seed $(SEED) --limit $(LIMIT) $(if $(TESTS),--tests $(TESTS))

facts-model: .venv/installed ## train the model that ships here anew
	.venv/bin/python -m facts_model.train

facts-model-eval: .venv/installed ## measure what the model that ships here knows
	.venv/bin/python -m facts_model.evaluate

facts-moments: .venv/installed ## collect the statistics that ship with that model anew
	.venv/bin/python -m facts_model.moments

tune: .venv/installed ## try settings of the editing methods anew, docs/editing/tuning.json
	$(OFFLINE) .venv/bin/python -m benchmarks.tuning

bench: .venv/installed ## measure speed and memory, docs/benchmarks.md; BENCH="--quick" for less
	$(OFFLINE) .venv/bin/python -m benchmarks $(BENCH)

notebooks: .venv/installed ## write the notebooks anew from their scripts, outputs included
	@.venv/bin/jupytext -q --to ipynb notebooks/*.py
	@PYTHONWARNINGS=ignore TQDM_DISABLE=1 $(OFFLINE) .venv/bin/jupyter-execute --inplace \
	    notebooks/*.ipynb

docs: .venv/installed ## build the documentation's site, site/index.html; a warning is an error
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build

pictures: .venv/installed ## take the documentation's screenshots anew, docs/images; needs Chromium
	$(OFFLINE) .venv/bin/python docs/pictures.py

constraints: ## resolve the newest versions into constraints/ (then: make check)
	@for version in 3.9.0 $(OTHERS); do constraints/refresh.sh $$version || exit 1; done

clean: ## remove the environments, caches and builds
	rm -rf $(ENVIRONMENTS) .torch-choice build dist mutants site demo.html
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find backward_lens_tl benchmarks facts_model tests -name __pycache__ -prune -exec rm -rf {} +

# ---- environments: made anew when the pins or the choice of torch change, else brought up to date

.venv/pinned: constraints/tl-3.9.0.txt
$(OTHERS:%=.venv-tl%/pinned): .venv-tl%/pinned: constraints/tl-%.txt

%/pinned: .torch-choice
	@echo "$*: new environment ($(TORCH))"
	@constraints/venv.sh $*
	@grep -v '^torch==' $(filter constraints/%,$^) > $*/constraints.txt
	@touch $@

%/installed: %/pinned pyproject.toml
	@echo "$*: the package, editable, and what it needs; up to five minutes"
	@$*/bin/python -m pip install -qq -c $*/constraints.txt -e ".[dev]"
	@touch $@

# Written only when the choice differs from the last one.
.torch-choice: FORCE
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
