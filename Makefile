# make quickstart   environment, components, training on the embedded speech, evaluation: from an empty machine
# make test         environment, linter, tests
# make bench        all benchmarks, less than 30 minutes on two cores: benchmarks/results.json and BENCHMARKS.md
# make test-slow   tests with real weights; make test-faults: kills, full disks, thousands of broken files
# PYTHON=python3.12 picks the interpreter; LIBRISPEECH=DIR also evaluates on real speech (any LibriSpeech tree).

PYTHON ?= python3
BIN := .venv/bin
RUN := outputs/quickstart
LIBRISPEECH ?=
LIMIT ?= 200
JOBS ?= 2
BENCH ?=

.PHONY: quickstart test test-slow test-faults bench lint clean

quickstart: .venv/installed
	$(BIN)/python tools/get_components.py
	$(BIN)/python train.py recipes/quickstart.yaml --output_dir $(RUN)
	$(BIN)/python eval.py --model $(RUN)/final --data data/synthetic_speech --split test --output_dir $(RUN)/eval --show 8
	$(BIN)/python tools/make_questions.py recipes/quickstart.yaml $(RUN)/questions.jsonl --per_kind 4
	$(BIN)/python eval.py --model $(RUN)/final --data $(RUN)/questions.jsonl --task answer --max_new_tokens 40 \
		--conditions shuffled_audio --output_dir $(RUN)/eval-answers --show 8
	$(BIN)/audiophi card $(RUN)/final --metrics $(RUN)/eval/metrics.json $(RUN)/eval-answers/metrics.json
ifneq ($(LIBRISPEECH),)
	$(BIN)/python eval.py --model $(RUN)/final --data $(LIBRISPEECH) --limit $(LIMIT) \
		--output_dir $(RUN)/eval-librispeech --show 8
	$(BIN)/audiophi card $(RUN)/final --metrics $(RUN)/eval/metrics.json $(RUN)/eval-answers/metrics.json \
		$(RUN)/eval-librispeech/metrics.json
endif
	@echo "model and model card: $(RUN)/final   curves: $(RUN)/curves.png   transcripts: $(RUN)/eval/predictions.jsonl"
	@echo "your own file:  $(BIN)/audiophi transcribe FILE --model $(RUN)/final"
	@echo "a question:     $(BIN)/audiophi ask 'What is the last word?' FILE --model $(RUN)/final"
	@echo "in a browser:   $(BIN)/audiophi demo --model $(RUN)/final"
	@echo "your own data:  $(BIN)/python train.py recipes/quickstart.yaml --name mine --data.train '[{path: FOLDER}]' --stages.1.data null"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --durations=10

test-slow: .venv/installed-test
	$(BIN)/python tools/get_components.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

test-faults: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m faults --durations=10

bench: .venv/installed-test
	$(BIN)/python tools/get_components.py
	$(BIN)/python benchmarks/run_all.py $(BENCH)

lint: .venv/installed-test
	$(BIN)/ruff check .

# pip compiles on one core, and leaves out what PYTHONDONTWRITEBYTECODE forbids: every start would take twice as long.
QUIETLY := --quiet --disable-pip-version-check --no-compile
# Some packages carry templates that are no Python.
COMPILE := $(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true

# The stamps are written last, so an interrupted installation is taken up again.
.venv/installed: pyproject.toml
	@$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed, this is ' + sys.version"
	@$(PYTHON) -c "import ensurepip" || (echo "venv is missing: apt-get install python3-venv"; exit 1)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(QUIETLY) -e ".[demo]"
	@$(COMPILE)
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install $(QUIETLY) -e ".[test]"
	@$(COMPILE)
	touch $@

clean:
	rm -rf .venv outputs cache
