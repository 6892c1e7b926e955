# make quickstart   environment, components, training on the embedded speech, evaluation: from an empty machine
# make test         environment, linter, tests
# PYTHON=python3.12 picks the interpreter; LIBRISPEECH=DIR also evaluates on real speech (any LibriSpeech tree).

PYTHON ?= python3
BIN := .venv/bin
RUN := outputs/quickstart
LIBRISPEECH ?=
LIMIT ?= 200

.PHONY: quickstart test test-slow lint clean

quickstart: .venv/installed
	$(BIN)/python tools/get_components.py
	$(BIN)/python train.py recipes/quickstart.yaml --output_dir $(RUN)
	$(BIN)/python eval.py --model $(RUN)/final --data data/synthetic_speech --split dev --output_dir $(RUN)/eval --show 8
ifneq ($(LIBRISPEECH),)
	$(BIN)/python eval.py --model $(RUN)/final --data $(LIBRISPEECH) --limit $(LIMIT) \
		--output_dir $(RUN)/eval-librispeech --show 8
endif
	@echo "model: $(RUN)/final   curves: $(RUN)/curves.png   transcripts: $(RUN)/eval/predictions.jsonl"
	@echo "your own file: $(BIN)/audiophi transcribe FILE --model $(RUN)/final"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10

test-slow: .venv/installed
	$(BIN)/python tools/get_components.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

lint: .venv/installed
	$(BIN)/ruff check .

# The stamp is written last, so an interrupted installation is taken up again.
.venv/installed: pyproject.toml
	@$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed, this is ' + sys.version"
	@$(PYTHON) -c "import ensurepip" || (echo "venv is missing: apt-get install python3-venv"; exit 1)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

clean:
	rm -rf .venv outputs cache
