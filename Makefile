# make demo   a real model on real text, from nothing to results/demo/report.html
# make test   all tests but the long ones: some 20 minutes
# make check  formatting, lint, types
# make audit  exact versions, hashes, licences, and known vulnerabilities where a network answers
# make faults every accident a sweep may have, on a Ray of three nodes: some 45 minutes
# make soak   accidents at random for 10 minutes
# make fuzz   damaged and hostile files for every reader, for 10 minutes
# Each target sets up .venv by itself; it needs Python 3.11 or newer, make and a package index. Another Python in an environment of its own:
# make test PYTHON=python3.12 VENV=.venv-3.12
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export RAY_AUTH_MODE ?= token

.PHONY: demo test check audit faults soak fuzz setup clean

demo: $(READY)
	$(BIN)/iclgd run sweeps/demo.toml
	$(BIN)/iclgd report results/demo

test: $(READY)
	$(BIN)/pytest

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

audit: $(READY)
	$(BIN)/python -m tests.audit

faults: $(READY)
	$(BIN)/python -m tests.faults

soak: $(READY)
	$(BIN)/python -m tests.faults.soak

fuzz: $(READY)
	$(BIN)/python -m tests.fuzz

setup: $(READY)

$(READY): pyproject.toml constraints/python.txt constraints/embedded.txt
	@echo "setting up $(VENV) with $(PYTHON): a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints/python.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement constraints/embedded.txt
	@touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info
