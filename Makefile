# Two commands do all the set-up, on a machine with Python 3.11 or newer:
#   make demo   environment, install, a small model trained to answer spoken questions, and asked one
#   make test   environment, install, tests (make test-slow: those that take minutes)
# The first Python that is new enough and runs.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test test-slow lint format clean help

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' Makefile

$(VENV)/installed: pyproject.toml
	@test -n "$(PYTHON)" || \
	  { echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/it"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2> /dev/null || \
	  { echo "error: $(PYTHON) lacks venv; on Debian: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/installed-train: $(VENV)/installed
	$(BIN)/pip install --quiet -e '.[train]'
	touch $@

# torch is the oracle of the parity tests, and nothing else needs it. Only a CPU build is taken, first one that is at hand:
# what PyPI has for Linux brings gigabytes of CUDA.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet '$(TORCH)+cpu' 2> /dev/null || \
	  $(BIN)/pip install --quiet --retries 0 --timeout 15 --index-url $(TORCH_INDEX) '$(TORCH)' 2> /dev/null || \
	  echo "no CPU build of $(TORCH) for this Python: the tests beside PyTorch will be skipped"
	$(BIN)/pip install --quiet -e '.[test,dev]'
	touch $@

# From sound files to a trained model to a spoken reply; what is there already is not made again.
DEMO := out/debug
SPEECH := configs/debug
demo: $(VENV)/installed-train
	mkdir -p $(DEMO)
	@echo "== A model of 1.4 million random weights, with a tokenizer and codebooks of 24 questions and answers"
	test -e $(DEMO)/start/chroma_jax.json || \
	  $(BIN)/python -m chroma_jax.create --size=debug --manifest=$(SPEECH)/data.jsonl --out=$(DEMO)/start
	@echo "== Their sound files become a dataset"
	$(BIN)/python -m chroma_jax.prepare --manifest=$(SPEECH)/data.jsonl --checkpoint=$(DEMO)/start --out=$(DEMO)/data
	@echo "== The Reasoner learns what to answer"
	$(BIN)/python -m chroma_jax.train --config=configs/debug_reasoner.py --workdir=$(DEMO)/reasoner
	@echo "== Backbone and Decoder learn to speak it"
	$(BIN)/python -m chroma_jax.train --config=configs/debug.py --workdir=$(DEMO)/speech
	@echo "== A question is asked: When does the sun rise?"
	$(BIN)/python -m chroma_jax.generate --checkpoint=$(DEMO)/speech/model --max_seconds=5 \
	  --question=$(SPEECH)/03-question.flac --voice=$(SPEECH)/00-slt.flac \
	  --voice_text="In the day the sky is blue." --out=out/reply.wav
	@echo "== The words above were heard in the question's sound; out/reply.wav has their codes, but it is noise to the ear:"
	@echo "   the Codec that makes sound of codes was never trained. For speech you need the published weights (README.md)."

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n $(WORKERS)

test-slow: $(VENV)/installed-test
	$(BIN)/pytest -m slow
	XLA_FLAGS= $(BIN)/pytest -n $(WORKERS) tests/parity

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out .pytest_cache .ruff_cache *.egg-info
