# make demo: the whole life of a teacher on drawn ears, a few minutes.   make test: lint and tests.
# make soak: kill it 60 times at random moments, 10 minutes.   make fuzz: 150,000 mutated files, half an hour.
# Both make .venv when it is not there, with the versions of .ci/constraints.txt; uv is used where pip can fetch it.

VENV := .venv
READY := $(VENV)/.ready
INSTALL := install -q -e ".[dev]" -c .ci/constraints.txt
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help demo test soak fuzz clean

help:
	@grep '^# make' Makefile | tr -s ' ' | sed 's/^# //'

demo: $(READY)
	rm -rf demo
	examples/demo.sh demo

test: $(READY)
	ruff check .
	python -m pytest

soak: $(READY)
	python tests/soak.py --kills 60

fuzz: $(READY)
	python tests/fuzz.py --manifests 100000 --pictures 50000 --weights 2000 --embeddings 50000

clean:
	rm -rf $(VENV) demo

$(READY): pyproject.toml .ci/constraints.txt
	@echo "setting up $(VENV): torch and its libraries, several GB; half a minute with a fast line" >&2
	python3 -m venv --clear $(VENV)
	$(VENV)/bin/pip install -q uv -c .ci/constraints.txt || echo "no uv here: pip will do, slower" >&2
	if [ -x $(VENV)/bin/uv ]; then VIRTUAL_ENV=$(CURDIR)/$(VENV) $(VENV)/bin/uv pip $(INSTALL); else $(VENV)/bin/pip $(INSTALL); fi
	touch $(READY)
