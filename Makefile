# One word for each thing to do with the workbook; `make help` lists them.
SHELL   := /bin/bash
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
RECIPE  ?= micro
ARGS    ?=
PIP     := $(BIN)/python -m pip --disable-pip-version-check -qq install -c constraints.txt
# notebooks under test run two at a time: one thread each, and no progress bars
ONE     := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# test files two at a time, those that take longest first
TWO     := -q -n 2 --dist loadfile --no-loadscope-reorder --durations=10

.DEFAULT_GOAL := help
.PHONY: help run test soak bench gpu lab zh board docs readme export hooks clean

help: ## this list
	@awk -F': .*## ' '/^[a-z]+:.*## /{printf "  make %-7s %s\n", $$1, $$2}' Makefile

run: $(VENV)/.run ## the main job: train a model of the microworld and measure it (RECIPE=micro ARGS="key=value …")
	@$(BIN)/lm-nb run $(RECIPE) $(ARGS)

test: $(VENV)/.dev ## every check: export, README, lint, pytest, the notebooks, the site
	@echo "== 1/6 export: lm_nb/ is what the notebooks say"; $(BIN)/python tools/export.py
	@echo "== 2/6 README.md is what nbs/index.ipynb says"; $(BIN)/python tools/readme.py --check
	@echo "       and translations are of the English that there is"; $(BIN)/python tools/translate.py check
	@echo "== 3/6 lint and types"; $(BIN)/ruff check --quiet --output-format concise . && $(BIN)/mypy
	@echo "== 4/6 notebooks, two at a time: what they give is what they have saved"
	@$(ONE) PATH="$$PWD/$(BIN):$$PATH" $(BIN)/python tools/chapters.py --workers 2
	@echo "== 5/6 documentation site"; $(BIN)/python tools/site.py
	@echo "== 6/6 pytest, two files at a time"; $(ONE) $(BIN)/python -m pytest $(TWO) tests

soak: $(VENV)/.dev ## the fault tests at their full counts (an hour or more); writes nbs/4_training/results/soak.json
	@$(ONE) $(BIN)/python tools/soak.py $(ARGS)

lab: $(VENV)/.dev ## JupyterLab on the chapters (ARGS="--port 9999 …": its own options)
	@mkdir -p runs; $(BIN)/jupyter trust --log-level WARN nbs/*.ipynb nbs/*/*.ipynb >/dev/null
	@PATH="$$PWD/$(BIN):$$PATH" $(BIN)/jupyter lab --config tools/jupyter_server_config.py $(ARGS)

zh: $(VENV)/.dev ## the chapters as Chinese notebooks in zh/ (what is not translated stays English): make lab shows them
	@$(BIN)/python tools/translate.py notebooks
	@$(BIN)/jupyter trust --log-level WARN zh/*.ipynb zh/*/*.ipynb >/dev/null

bench: $(VENV)/.dev ## speed and memory on this machine, side by side
	@$(BIN)/lm-nb bench $(ARGS)

gpu: $(VENV)/.dev ## what a CUDA card does, in nine minutes (ARGS=5: in five; ARGS=--dry: a trial on the CPU)
	@PYTHON=$(BIN)/python tools/gpu.sh $(ARGS)

board: $(VENV)/.run ## TensorBoard on all runs, wherever they lie (ARGS="RECIPE port=7000": one run, another port)
	@$(BIN)/lm-nb board $(ARGS)

docs: $(VENV)/.dev ## build the documentation site in _docs/
	@$(BIN)/python tools/site.py
	@echo "To read it:  $(BIN)/python -m http.server -d _docs 8000   and open http://localhost:8000"

readme: $(VENV)/.dev ## write README.md, README.zh.md and CONTRIBUTING.md from their notebooks
	@$(BIN)/python tools/readme.py

export: $(VENV)/.dev ## write the package lm_nb/ from the notebooks
	@$(BIN)/python tools/export.py --write

hooks: $(VENV)/.dev ## git hooks that keep notebooks clean and merge them by cell
	@PATH="$$PWD/$(BIN):$$PATH" $(BIN)/nbdev-install-hooks

clean: ## remove what was built; runs/, data/ and .venv stay
	@rm -rf _docs _proc build dist .pytest_cache .ruff_cache .hypothesis
	@find lm_nb nbs tests tools -name __pycache__ -prune -exec rm -rf {} +

# --- installation: a stamp file for each step, so that the next call is quick

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: '$(PYTHON)' was not found; install Python 3.11 to 3.13, or name one:" \
	    "make run PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $$($(PYTHON) --version) is too old; Python 3.11 or newer is needed." \
	    "Name another one: make run PYTHON=python3.12" >&2; exit 2; }
	@echo "-- creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "make: python could not create a virtual environment;" \
	    "on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }

$(VENV)/.run: $(BIN)/python pyproject.toml constraints.txt
	@echo "-- installing lm_nb and what it runs on into $(VENV) (minutes the first time: torch is large)"
	@$(PIP) -e . && touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "-- installing JupyterLab and the tools for tests and documentation"
	@$(PIP) -e '.[dev]' && touch $@
