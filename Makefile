# `make test` from a fresh clone: makes the environment once, then runs every check.
# What is installed is listed in settings.ini. Where it comes from is pip's own configuration
# (for example PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS, to take torch without CUDA).

VENV ?= .venv
PYTHON ?= python3

BIN := $(VENV)/bin
STAMP := $(VENV)/.distill_nb
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

# One value of settings.ini, on one line.
setting = $$($(BIN)/python -c 'import configparser as c; p = c.ConfigParser(); p.read("settings.ini"); print(*p["DEFAULT"]["$(1)"].split())')

# Notebooks and tests call `distill-nb` by name.
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env quickstart test export clean-notebooks readme wheel distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' Makefile

env: $(STAMP)  ## make the environment in VENV (.venv), or bring it up to date with settings.ini

# An environment that is already there is kept: pip adds what is missing.
$(STAMP): settings.ini setup.py
	@echo "Installing into $(VENV): some minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if nvidia-smi >/dev/null 2>&1; then \
	  $(PIP) --editable '.[gpu,dev,tracking]'; \
	else \
	  $(PIP) $(call setting,cpu_torch) && \
	  $(PIP) --editable '.[dev,tracking]' && \
	  $(PIP) --no-deps $(call setting,cpu_unsloth); \
	fi
	touch $@

quickstart: $(STAMP)  ## distil a small model on this machine, from nbs/recipes/quickstart.yaml
	$(BIN)/distill-nb run quickstart

# Each notebook in a process of its own: Unsloth patches transformers for all that follows it. JOBS of them at a time, and
# as many workers for tests/, a file of tests on one of them, the longest first. One thread each: two that wait for each other on a busy machine
# are many times slower. Offline, because a test that needs the network is not a test of this code. tests/test_house.py
# checks exports, README and clean notebooks.
JOBS ?= 2
test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS := 1
test: $(STAMP)  ## run every notebook, then tests/
	@printf '%s\n' nbs/[0-9]*.ipynb | xargs -P $(JOBS) -I {} sh -c \
	  '$(BIN)/nbdev_test --n_workers 0 --path {} >$(VENV)/$$$$.log 2>&1 || { cat $(VENV)/$$$$.log; echo "FAILED: {}"; exit 255; }; rm $(VENV)/$$$$.log; echo {}'
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder tests/test_run.py tests

export: $(STAMP)  ## notebooks -> distill_nb/
	$(BIN)/nbdev_export

clean-notebooks: $(STAMP)  ## strip from the notebooks what does not belong in git
	$(BIN)/nbdev_clean

readme: $(STAMP)  ## nbs/index.ipynb -> README.md
	$(BIN)/python nbs/render_readme.py

wheel: $(STAMP)  ## build dist/*.whl
	rm -rf build
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

distclean:  ## delete the environment and all that was built; runs/ stays
	rm -rf $(VENV) build dist *.egg-info _proc _docs .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
