# Needs Python >= 3.11 with pip, and make; everything else is installed into .venv, at the versions of constraints.txt.
# Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV   ?= .venv
TEST_WORKERS ?= 2
BIN    := $(VENV)/bin
# One pip call per target, always with the constraints: asked for without them, torch may come as a CUDA build of gigabytes.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Strict: a page that is not in the nav, a link or an anchor that leads nowhere fails. The variable silences an advertisement.
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.DEFAULT_GOAL := help
.PHONY: help demo serve test lint bench docs format clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## A real model answers two questions, then yours (the first time: downloads and converts it)
	$(BIN)/folovllm chat demo --temperature 0 --ask "What is the capital of France?" --ask "Write one sentence about the sea."

serve: $(VENV)/.demo ## The same model over HTTP: chat, inspector, API (make serve ARGS="--port 9000")
	$(BIN)/folovllm serve demo $(ARGS)

test: lint ## Everything that CI runs: lint, types, import contracts, tests with coverage
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --cov --cov-report=term

lint: $(VENV)/.dev ## ruff, mypy (strict, tests too), the import contracts, and whether the site's links lead somewhere
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(SITE)

bench: $(VENV)/.dev ## The milestones' figures: tables, JSON and plots
	$(BIN)/python -m bench.milestones

docs: $(VENV)/.dev ## Makes the reference pages, checks all pages, builds the site (site/index.html)
	$(BIN)/python -m docs.generate
	$(BIN)/python -m pytest --quiet tests/unit/house/test_docs.py tests/unit/docs
	$(SITE)

format: $(VENV)/.dev ## Formats the code and fixes what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Removes the environment and all caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.* build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Some systems ship Python without ensurepip; the pip that is there then installs itself into the environment.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "FoloVLLM needs Python >= 3.11, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)."; \
		echo "Name another one: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Making $(VENV) ..."
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing FoloVLLM ..."
	@$(INSTALL) -e '.[server]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing FoloVLLM and its tools ..."
	@$(INSTALL) -e '.[dev,docs]'
	@touch $@ $(VENV)/.demo
