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

# Tests never wait for a network; a user of the package may have one.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
PYTEST := python -m pytest --doctest-modules backward_lens_tl tests README.md

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: help demo test test-tl4 check check-fast check-all facts-model facts-model-eval
.PHONY: notebooks constraints clean FORCE

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/installed ## one prompt through the lens, with the model that ships here: demo.html
	@.venv/bin/backward-lens show --model facts --prompt "Lionel Messi plays for" \
	    --target " Paris" --html demo.html

test: .venv/installed ## tests, doctests and the README's snippets, on TransformerLens 3.9.0
	$(OFFLINE) .venv/bin/$(PYTEST)

test-tl4: .venv-tl4.3.0/installed ## tests, doctests and the README's snippets, on TransformerLens 4.3.0
	$(OFFLINE) .venv-tl4.3.0/bin/$(PYTEST)

check-fast: .venv/installed ## format, lint, types, layers
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

check: check-fast test test-tl4 ## what CI runs: check-fast, test, test-tl4

check-all: check ## check, and the tests that take long
	$(OFFLINE) .venv/bin/$(PYTEST) -m slow
	$(OFFLINE) .venv-tl4.3.0/bin/$(PYTEST) -m slow

facts-model: .venv/installed ## train the model that ships here anew
	.venv/bin/python -m facts_model.train

facts-model-eval: .venv/installed ## measure what the model that ships here knows
	.venv/bin/python -m facts_model.evaluate

notebooks: .venv/installed ## write the notebooks anew from their scripts, outputs included
	@.venv/bin/jupytext -q --to ipynb notebooks/*.py
	@PYTHONWARNINGS=ignore TQDM_DISABLE=1 $(OFFLINE) .venv/bin/jupyter-execute --inplace \
	    notebooks/*.ipynb

constraints: ## resolve the newest versions into constraints/ (then: make check)
	@for version in 3.9.0 4.3.0; do constraints/refresh.sh $$version || exit 1; done

clean: ## remove the environments, caches and builds
	rm -rf .venv .venv-tl4.3.0 .torch-choice build dist demo.html
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find backward_lens_tl facts_model tests -name __pycache__ -prune -exec rm -rf {} +

# ---- environments: made anew when the pins or the choice of torch change, else brought up to date

.venv/pinned: constraints/tl-3.9.0.txt
.venv-tl4.3.0/pinned: constraints/tl-4.3.0.txt

%/pinned: .torch-choice
	@echo "$*: new environment ($(TORCH))"
	@constraints/venv.sh $*
	@grep -v '^torch==' $(filter constraints/%,$^) > $*/constraints.txt
	@touch $@

%/installed: %/pinned pyproject.toml
	@echo "$*: the package, editable, and what it needs; a minute or two"
	@$*/bin/python -m pip install -qq -c $*/constraints.txt -e ".[dev]"
	@touch $@

# Written only when the choice differs from the last one.
.torch-choice: FORCE
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
