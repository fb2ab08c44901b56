# make demo: run every command of the workflow on drawn ears, a few minutes.
# make setup: create .venv only, half a minute with a fast connection; the other targets create it if it does not exist.
# make quick: format, lint and the quick tests, about a minute: run it after every edit.
# make test: format, lint, types and all tests, as CI runs them, some 8 minutes.   make check: the same.
# make lint: format, lint and types only, half a minute.   make docs: generate the pages of the commands from their help.
# make soak: kill runs 60 times at random moments and resume them, 10 minutes.   make fuzz: 150,000 mutated files, half an hour.
# make bench: measure speed and memory, compared with alternatives and limits, half an hour.
# make students: train a teacher on drawn ears, and two small models with and without it, up to an hour.
# make clean: remove .venv and the folders of demo and students.
# .venv has the versions of .ci/constraints.txt; uv is used where pip can fetch it.

VENV := .venv
READY := $(VENV)/.ready
INSTALL := install -q -e ".[dev]" -c .ci/constraints.txt
# Compile bytecode once, at set-up, instead of in every process that a test starts.
UV := VIRTUAL_ENV="$(CURDIR)/$(VENV)" $(VENV)/bin/uv pip
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

PYTEST := python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo students quick test check lint docs soak fuzz bench clean

help:
	@grep '^# make' Makefile | sed 's/^# make //; s/   make /\n/' | awk -F ': ' '{ printf "make %-10s%s\n", $$1, $$2 }'

setup: $(READY)

demo: $(READY)
	rm -rf demo
	python examples/demo.py demo

students: $(READY)
	rm -rf students
	python examples/students.py students

quick: $(READY)
	ruff format --check .
	ruff check .
	$(PYTEST) -m "not slow"

test check: lint
	$(PYTEST)

lint: $(READY)
	ruff format --check .
	ruff check .
	mypy

docs: $(READY)
	python examples/docs/make.py

soak: $(READY)
	python tests/soak.py --kills 60

fuzz: $(READY)
	python tests/fuzz.py --manifests 100000 --pictures 50000 --weights 2000 --embeddings 50000
	python -m pytest tests/test_properties.py tests/test_fast_pictures.py tests/test_identity_metrics.py --hypothesis-profile searching

bench: $(READY)
	if [ -x $(VENV)/bin/uv ]; then $(UV) install -q -e ".[bench]" -c .ci/constraints.txt; else $(VENV)/bin/pip install -q -e ".[bench]" -c .ci/constraints.txt; fi
	python examples/benchmarks/bench.py

clean:
	rm -rf $(VENV) demo students

$(READY): pyproject.toml .ci/constraints.txt
	@echo "setting up $(VENV): torch and its libraries, several GB; half a minute with a fast connection" >&2
	python3 -m venv --clear $(VENV)
	$(VENV)/bin/pip install -q uv -c .ci/constraints.txt || echo "uv cannot be installed; using pip, which is slower" >&2
	if [ -x $(VENV)/bin/uv ]; then $(UV) $(INSTALL) --compile-bytecode; else $(VENV)/bin/pip $(INSTALL); fi
	touch $(READY)
