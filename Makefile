# Two commands do all the set-up, on a machine with Python 3.11 or newer:
#   make demo   environment, install, a spoken reply to a spoken question
#   make test   environment, install, tests
# The first Python that is new enough and runs.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test test-slow lint format clean help

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' Makefile

# torch first: on its own, so that a CPU build that is at hand is taken; the tests use it as their oracle.
$(VENV)/installed: pyproject.toml
	@test -n "$(PYTHON)" || \
	  { echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/it"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2> /dev/null || \
	  { echo "error: $(PYTHON) lacks venv; on Debian: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[test,dev]'
	touch $@

demo: $(VENV)/installed
	mkdir -p out
	$(BIN)/python -m chroma_jax.generate --config=tiny --max_seconds=4 \
	  --question=tests/data/voice_librivox_0920.wav \
	  --voice=tests/data/voice_librivox_0870.wav \
	  --voice_text="and mister john dashwood had then leisure to consider how much there might be prudently in his power to do for them" \
	  --out=out/reply.wav

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n $(WORKERS)

test-slow: $(VENV)/installed-test
	$(BIN)/pytest -m slow

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out .pytest_cache .ruff_cache *.egg-info
