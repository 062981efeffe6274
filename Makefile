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

# An environment per TransformerLens. .venv has 3.9.0; the others run tests only.
OTHERS := 2.18.0 4.3.0
ENVIRONMENTS := .venv $(OTHERS:%=.venv-tl%)

# Tests never wait for a network; a user of the package may have one.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
# Each worker process takes some 1.5 GB of memory and one thread of torch.
WORKERS ?= logical
PYTEST := python -m pytest -n $(WORKERS) --dist worksteal
ALL := --doctest-modules backward_lens_tl tests README.md docs
# The shapes and types of signatures, checked at every call; a third more time.
TYPES := --jaxtyping-packages=backward_lens_tl,beartype.beartype

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: help environments demo test check check-fast check-all coverage mutants facts-model
.PHONY: facts-model-eval facts-moments tune bench gpu-check gpu-wheels notebooks docs pictures
.PHONY: constraints clean FORCE
.PHONY: $(ENVIRONMENTS:%=versions-%) $(ENVIRONMENTS:%=all-%)

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

environments: $(ENVIRONMENTS:%=%/installed) ## one per TransformerLens; the only target that gains from -j2

demo: .venv/installed ## one prompt through the lens, with the model that ships here: demo.html
	@.venv/bin/backward-lens show --model facts --prompt "Lionel Messi plays for" \
	    --target " Paris" --html demo.html

test: .venv/installed ## the tests to run before every commit, on TransformerLens 3.9.0
	$(OFFLINE) .venv/bin/$(PYTEST) $(ALL)

check-fast: .venv/installed ## format, lint, types, layers
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

check: check-fast test $(OTHERS:%=versions-.venv-tl%) ## what CI runs: also the tests that can tell versions apart
$(ENVIRONMENTS:%=versions-%): versions-%: %/installed
	$(OFFLINE) $*/bin/$(PYTEST) tests -m "versions and not slow"

check-all: check-fast $(ENVIRONMENTS:%=all-%) ## every test on every TransformerLens; needs Chromium
all-.venv: PYTEST += $(TYPES)
$(ENVIRONMENTS:%=all-%): all-%: %/installed
	$(OFFLINE) $*/bin/$(PYTEST) $(ALL) -m ""

coverage: .venv/installed ## lines and branches of the package that `make test` reaches
	$(OFFLINE) .venv/bin/$(PYTEST) $(ALL) --cov --cov-report=term:skip-covered

# MODULES="backward_lens_tl/readout/projections.py backward_lens_tl/host/*" for less than the core that
# pyproject.toml lists, TESTS="tests/readout/test_extremes.py ..." for less than the quick tier. LIMIT is how
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

# What a machine with a GPU and no network lacks: its Python has torch, transformers and pytest. The
# folder also gets the package's own metadata, where its version is read from.
GPU_PYTHON ?= 3.12
WHEELS := transformer-lens better-abc datasets dill multiprocess beartype sybil pydantic pydantic-core \
    annotated-types typing-inspection

gpu-wheels: .venv/installed ## wheels for gpu-check on a machine with a GPU and no network
	rm -rf gpu-wheels && mkdir gpu-wheels
	.venv/bin/python -m pip download -q --no-deps --only-binary=:all: -d gpu-wheels \
	    --python-version $(GPU_PYTHON) -c constraints/tl-3.9.0.txt $(WHEELS)
	@.venv/bin/python -c 'from hatchling import build as b; \
	    b.prepare_metadata_for_build_wheel("gpu-wheels")'
	@du -sh gpu-wheels

gpu-check: .venv/installed ## on one NVIDIA GPU, in seven minutes: tests there, then speed at large sizes
	.venv/bin/python -m benchmarks.gpu_check $(GPU_CHECK)

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
	rm -rf $(ENVIRONMENTS) .torch-choice build dist gpu-wheels mutants site demo.html
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
