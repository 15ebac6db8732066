# Each target sets up what it needs, from a machine with nothing but Python, make and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# torch is by far the largest package: both ends get the one of constraints.txt, unless told otherwise (TORCH=torch==2.9.0)
TORCH ?= $(shell grep ^torch== constraints.txt)
# what test-oldest and test-newest run; nothing stands for everything
TESTS ?=
OLD_VERSIONS_WARN := -W ignore::DeprecationWarning -W ignore::PendingDeprecationWarning -W ignore::FutureWarning

.PHONY: demo demo-hub test test-slow test-all test-explore test-oldest test-newest quality style bench docs dist constraints-oldest clean

demo: $(READY)
	$(BIN)/python examples/quickstart.py

demo-hub: $(READY)
	$(BIN)/python examples/hub_round_trip.py

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-all: test test-slow

test-explore: .venv-explore/.ready
	.venv-explore/bin/python -m pytest -rs tests/explore tests/cli/test_explore.py

test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest -n 2 -m "not slow" $(OLD_VERSIONS_WARN) $(TESTS)

test-newest: .venv-newest/.ready
	.venv-newest/bin/python -m pytest -n 2 -m "not slow" $(TESTS)

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.14

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m tests.benchmarks

docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	.venv-docs/bin/python docs/_site/check.py site

dist:
	rm -rf dist
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check build twine
	.venv-dist/bin/python -m build
	.venv-dist/bin/python -m twine check --strict dist/*

clean:
	rm -rf .venv .venv-* build dist site demo-head

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

# gradio holds Pillow below 13 and tomlkit below 0.15, so that it is no part of the extra dev
.venv-explore/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-explore
	grep -viE "^(pillow|tomlkit)==" constraints.txt > .venv-explore/constraints.txt
	.venv-explore/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-explore/constraints.txt \
	  -e ".[dev,explore]" "playwright>=1.50"
	touch $@

.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt $(TORCH) -e ".[dev]"
	touch $@

.venv-newest/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade $(TORCH) -e ".[dev]"
	touch $@

.venv-docs/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

# to be run when pyproject.toml changes; universal, so that it holds for every system and Python
constraints-oldest:
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip install --quiet --disable-pip-version-check uv
	(echo "# The oldest versions that pyproject.toml allows, by \`make constraints-oldest\`; torch is chosen in the Makefile."; \
	  .venv-uv/bin/uv pip compile --quiet --resolution lowest-direct --universal --python-version 3.10 --extra dev \
	  --no-annotate --no-header pyproject.toml | grep -vE "^(torch|triton|nvidia-.*|cuda-.*|setuptools)=") > constraints-oldest.txt
	rm -rf .venv-uv
