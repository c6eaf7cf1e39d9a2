# Everything runs in .venv, made from the pinned constraints.txt; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
EXTRAS := train,data,dense,export,docs,dev

.PHONY: help setup demo browser test quick check docs tables format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(VENV)/.installed  ## make .venv with the library, its extras and the tools

# onedl-mmcv comes as source and is compiled against the torch that is installed: without build isolation, in which it
# would silently leave its operators out, and with few optimisations, which halves the time (the operators that the
# tests run are none of the slow ones).
$(VENV)/.installed: $(VENV)/.demo
	$(PIP) ninja psutil opencv-python
	MAX_JOBS=2 CFLAGS="-O1 -g0" $(PIP) --no-build-isolation onedl-mmcv
	$(PIP) --no-build-isolation -e ".[$(EXTRAS)]"
	@touch $@

# What the demo needs: a part of what setup makes, without what is compiled.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel
	$(PIP) torch torchvision numpy
	$(PIP) --no-build-isolation -e ".[train]"
	@touch $@

demo: $(VENV)/.demo  ## train BiFormer on scikit-learn's digits, validate it, show what it looks at (minutes, no download)
	$(BIN)/python tools/train.py configs/digits/biformer_t.yaml --output output --experiment demo --overwrite
	$(BIN)/python tools/validate.py --checkpoint output/demo/model_best.safetensors
	$(BIN)/python tools/visualize.py --checkpoint output/demo/model_best.safetensors --out output/demo/see --overwrite

check: setup docs  ## formatting, lint, types, import contract, spelling, the docs site
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

# Chromium is Debian's: a browser that Playwright would download is not used.
browser:  ## install Chromium for the tests of pages, where it is missing and we may
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium > /dev/null; then :; \
	else echo "no Chromium here, and it cannot be installed: tests in a browser will be skipped"; fi

test: check browser  ## everything: checks and the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

quick: check  ## the checks and the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

docs: setup  ## build the docs site in site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

tables: setup  ## write the tables of the README, the docs and the model cards from what was measured and counted
	$(BIN)/python tools/make_tables.py

format: setup  ## format and apply the safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what was generated, the environment included
	rm -rf $(VENV) output build site *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
