"""A task that nobody knew before is one class: trained, evaluated, asked through the pipeline and named on the card,
without a change anywhere else."""

import json
import subprocess
from pathlib import Path

import pytest
from transformers import pipeline

from audiophi import AudioPhiForConditionalGeneration, AudioPhiProcessor
from audiophi.cli import eval as eval_script
from audiophi.data.example import RowError
from audiophi.evaluation.metrics import percent
from audiophi.publishing.card_files import collect
from audiophi.publishing.model_card import make_card
from audiophi.tasks import TASKS
from audiophi.tasks.base import Report, Task, base_example, need_clips
from audiophi.training.recipe import recipe_from_dict
from audiophi.training.stages import run_recipe
from tests.tiny_runs import LM

ROOT = Path(__file__).resolve().parents[1]


class Vowel(Task):
    """Which vowel is the first of what is said?"""

    name = "first_vowel"
    wordings = ("Which vowel comes first?", "Name the first vowel.")
    decoding = {"max_new_tokens": 2}
    shown = main_score = "right"
    shown = ("right",)
    table = (("right %", "right"), ("rows", "rows"))
    report = Report(
        type="audio-text-to-text", name="First vowels", rows=(("right, %", "right"),), needed=("rows",), gap={},
        size="rows", tag="vowels", summary="first vowels", output="the first vowel",
    )  # fmt: skip

    def example(self, row):
        need_clips(row)
        vowels = [letter for letter in row.text or "" if letter in "aeiou"]
        if not vowels:
            raise RowError(f"{row.id}: has no vowel")
        return base_example(self, row, references=(vowels[0].upper(),))

    def fields(self, example, hypothesis):
        return {"right": (hypothesis or "").strip() == example.reference}

    def summarize(self, predictions, **options):
        return {"right": percent(sum(p["right"] for p in predictions), len(predictions)), "rows": len(predictions)}


@pytest.fixture
def vowels(monkeypatch):
    monkeypatch.setitem(TASKS, Vowel.name, Vowel())


def test_one_class_is_a_task(vowels, settings, speech, tmp_path, waveform, capsys):
    source = {"path": str(speech), "task": Vowel.name}
    stage = {**LM, "eval_steps": 4}
    recipe = settings(stage, data={"train": [source], "eval": [source]}, readout="frames", alignment=None)
    final = run_recipe(recipe_from_dict(recipe))
    assert "right" in capsys.readouterr().out  # development scores
    processor = AudioPhiProcessor.from_pretrained(final)
    model = AudioPhiForConditionalGeneration.from_pretrained(final)
    words = list(Vowel.wordings)
    assert processor.tasks == {Vowel.name: {"instructions": words, "trained": words, "in_pieces": False}}
    assert model.generation_config.tasks == {Vowel.name: Vowel.decoding}

    pipe = pipeline("audio-text-to-text", model=model, processor=processor)
    clip = (waveform(1.0), 16_000)
    asked = pipe(clip)["generated_text"]  # the only task it knows
    assert asked == pipe(clip, task=Vowel.name)["generated_text"]
    for told in (asked, pipe(clip, instruction="which VOWEL comes first")["generated_text"]):
        assert len(processor.tokenizer(told)["input_ids"]) <= 2  # decoded as the task says
    assert len(processor.tokenizer(pipe(clip, instruction="Hm?", max_new_tokens=9)["generated_text"])["input_ids"]) > 2

    out = tmp_path / "eval"
    arguments = ["--task", Vowel.name, "--model", str(final), "--data", str(speech), "--output_dir", str(out)]
    assert eval_script.main(arguments) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["rows"] == 16 and metrics["right"] is not None
    card = str(make_card(final, collect(final, metrics=[out / "metrics.json"])))
    assert "First vowels" in card and "vowels" in card and "the first vowel" in card


def test_no_tasks_name_stands_outside_its_file():
    """As a quoted word: in running text "answer" is just a word."""
    command = ["git", "ls-files", "*.py", ":!tests", ":!audiophi/tasks", ":!checkpoints"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    found = {
        (file, name)
        for file in files
        for name in TASKS.keys() - {"speaker", "words", "mixed"}  # a column, a number in metrics.json, a readout
        if any(f"{quote}{name}{quote}" in (ROOT / file).read_text(encoding="utf-8") for quote in "\"'")
    }
    # Columns of data sets, an element of the demo's page, a command line of the benchmark's, Whisper's own tokens; and
    # what the encoder's own decoder does without training.
    assert {file for file, _ in found} <= {
        "audiophi/data/dataset_audiocaps.py", "audiophi/data/dataset_columns.py", "audiophi/data/dataset_questions.py",
        "audiophi/app.py", "benchmarks/transcribe_folder.py", "tools/make_questions.py", "tools/make_responses.py",
        "audiophi/components/wheels.py", "modeling_audiophi/decoder_whisper.py",
        "modeling_audiophi/configuration_audiophi.py",
    }, found  # fmt: skip
