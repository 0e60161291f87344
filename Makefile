.PHONY: demo test test-oldest test-web style quality docs release-check

PYTHON ?= python3
BIN := .venv/bin
OLDEST_TESTS := tests/decoding/test_losslessness.py tests/runtime/test_caches.py tests/targets/test_attention.py \
	tests/targets/test_tree_masks.py tests/decoding/test_outputs.py tests/decoding/test_requests.py \
	tests/decoding/test_recurrent.py tests/decoding/test_continuation.py tests/decoding/test_candidate_generator.py \
	tests/drafters/test_mtp.py tests/test_registration.py
SOURCES := src tests examples benchmarks
# Where a person looks on, pip says what it downloads; in a log it says nothing.
PIP_SAYS := $(shell test -t 2 || echo --quiet)

.venv/installed: constraints.txt pyproject.toml
	@echo "Once: making a virtual environment in .venv, and installing dream-hf, PyTorch and transformers into it (minutes)."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_SAYS) --constraint constraints.txt --editable ".[dev]"
	@echo "Installed."
	touch $@

demo: .venv/installed  ## Answer a question about a picture, plainly and speculatively
	$(BIN)/dream-hf demo

test: .venv/installed  ## Run the tests on two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

test-oldest: .venv-oldest/installed  ## Run the core of the tests with the oldest transformers that is supported
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest --numprocesses 2 $(OLDEST_TESTS)

test-web: .venv/installed  ## Run the page in a headless Chromium, and the example with FastAPI (Debian: apt-get install chromium chromium-driver)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[browser]"
	$(BIN)/python -m pytest -rs tests/page tests/test_examples.py

.venv-oldest/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	sed 's/^transformers==.*/transformers==5.20.2/' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt --editable ".[test]"
	touch $@

style: .venv/installed  ## Format and fix what can be fixed
	$(BIN)/ruff format $(wildcard $(SOURCES))
	$(BIN)/ruff check --fix $(wildcard $(SOURCES))

quality: .venv/installed  ## What must be clean before a commit
	$(BIN)/ruff format --check $(wildcard $(SOURCES))
	$(BIN)/ruff check $(wildcard $(SOURCES))
	$(BIN)/mypy

.venv-docs/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --constraint constraints.txt $$($(PYTHON) -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

docs: .venv-docs/installed  ## Build the documentation as a site in site/, and check its links and anchors (no torch needed)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

RELEASE := .venv-release

release-check:  ## Build the sdist and the wheel, check both, and run the demo from the wheel in an empty environment
	rm -rf $(RELEASE) dist build
	$(PYTHON) -m venv $(RELEASE)/build
	$(RELEASE)/build/bin/python -m pip install --quiet build twine
	$(RELEASE)/build/bin/python -m build --outdir dist .
	$(RELEASE)/build/bin/twine check --strict dist/*
	! $(PYTHON) -m zipfile --list dist/*.whl | grep --extended-regexp "(^|/)(tests|benchmarks|examples)/"
	$(PYTHON) -m venv $(RELEASE)/empty
	$(RELEASE)/empty/bin/python -m pip install --quiet --constraint constraints.txt "$$(echo dist/*.whl)[demo]"
	cd $(RELEASE) && empty/bin/dream-hf demo --json --repeats 1 | tee demo.json
	grep --quiet '"identical": true' $(RELEASE)/demo.json
