"""Benchmarks of questions about audio, in the layouts in which they are released."""

import json

import datasets
import pytest

from audiophi.data.datasets import load_examples
from tests.layouts import tone, write_csv


def asked(example):
    return "".join(item["text"] for item in example.messages[-1]["content"] if item["type"] == "text")


def write_json(path, rows, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=2))
    return path


def test_mmau(tmp_path):
    row = {"id": "x1", "audio_id": "./test-mini-audios/x1.wav", "question": "Who is it?", "choices": ["Man", "Woman"],
           "answer": "Man", "dataset": "AudioSet", "task": "sound", "split": "test-mini", "category": "Reasoning",
           "sub-category": "Acoustic Source Inference", "difficulty": "medium"}  # fmt: skip
    tone(tmp_path / "test-mini-audios" / "x1.wav", 1)
    write_json(tmp_path / "mmau-test-mini.json", [row])
    for spec in (str(tmp_path), f"mmau:{tmp_path}", str(tmp_path / "mmau-test-mini.json")):
        (example,) = load_examples(spec)
        assert asked(example) == "Who is it?\nOptions: Man; Woman." and example.reference == "Man"
        assert (example.metric, example.kind, example.choices) == ("choice", "sound", ("Man", "Woman"))
        assert len(example.clips[0].read(example.id)) == 12_800


def test_air_bench(tmp_path):
    row = {"path": "a.wav", "question": "Which instrument?", "choice_a": "flute", "choice_b": "piano", "choice_c": None,
           "answer_gt": "piano", "task_name": "Music_Instruments", "dataset_name": "nsynth", "uniq_id": 7}  # fmt: skip
    tone(tmp_path / "Foundation" / "Music_Instruments_nsynth" / "a.wav", 1)
    write_json(tmp_path / "Foundation" / "Foundation_meta.json", [row])
    (example,) = load_examples(str(tmp_path / "Foundation"))
    assert example.choices == ("flute", "piano") and example.kind == "Music_Instruments" and example.id == "7"
    assert len(example.clips[0].read("7")) == 12_800


def test_clotho_aqa(tmp_path):
    rows = []
    for question, answers in (("Are there waves?", ("yes", "yes", "no")), ("What is it?", ("Sea", "ocean", "sea"))):
        rows += [{"file_name": "a b.wav", "QuestionText": question, "answer": a, "confidence": "yes"} for a in answers]
    write_csv(tmp_path / "clotho_aqa_test.csv", rows)
    tone(tmp_path / "audio_files" / "a b.wav", 1)
    examples = load_examples(str(tmp_path), split="test")
    assert [(e.metric, e.references) for e in examples] == [("yes_no", ("yes",)), ("exact", ("sea", "ocean"))]
    assert asked(examples[0]) == "Are there waves?" and len(examples[1].clips[0].read("x")) == 12_800
    with pytest.raises(ValueError, match="no split 'dev'; here: test"):
        load_examples(str(tmp_path), split="dev")


@pytest.mark.parametrize("parquet", [False, True])
def test_voicebench(tmp_path, parquet):
    """The question is in the audio, so nothing else is asked."""
    tone(tmp_path / "q.wav", 1)
    audio = {"bytes": (tmp_path / "q.wav").read_bytes(), "path": None} if parquet else "q.wav"
    rows = [{"prompt": "Who wrote it?", "audio": audio, "reference": "Ann"},
            {"prompt": "A or B?", "audio": audio, "reference": "B"}]  # fmt: skip
    if parquet:
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "sd-qa.parquet")
    else:
        write_json(tmp_path / "sd-qa.jsonl", rows, lines=True)
    first, second = load_examples(f"voicebench:{tmp_path}")
    assert [item["type"] for item in first.messages[0]["content"]] == ["audio"] and first.transcript == "Who wrote it?"
    assert (first.metric, second.metric, second.choices) == ("contains", "choice", tuple("ABCD"))
    assert len(first.clips[0].read("x")) == 12_800


def test_speech_ifeval(tmp_path):
    row = {"audio_filepath": "s/a.wav", "transcription": "Okay.", "duration": 0.8, "instruction": "Which emotion?",
           "input": "Which emotion?\n\nAnswer in capitals.", "prompt": "Answer in capitals.", "target": "happy",
           "question_type": "json-1"}  # fmt: skip
    tone(tmp_path / "s" / "a.wav", 1)
    write_json(tmp_path / "speech-ifeval-v1.jsonl", [row], lines=True)
    (example,) = load_examples(str(tmp_path))
    assert asked(example) == "Which emotion?\n\nAnswer in capitals." and example.kind == "json"
    assert (example.transcript, example.metric, example.reference) == ("Okay.", "contains", "happy")
