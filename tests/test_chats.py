"""Rows that bring their own question, in every form in which others write them."""

import json

import pytest

from audiophi.data.datasets import load_examples
from audiophi.data.example import AUDIO, RowError

TEXT = "Who speaks?"
ASKED = [{"role": "user", "content": [AUDIO, {"type": "text", "text": TEXT}]}]


def one(tmp_path, row, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (example,) = load_examples(str(path), **options)
    return example


@pytest.mark.parametrize(
    "row",
    [
        {"audio": "a.wav", "instruction": TEXT, "answer": "A Man.\nTwo"},
        {"audio": "a.wav", "question": TEXT, "response": "A Man.\nTwo"},
        {"audio": "a.wav", "prompt": TEXT, "output": ["A Man.\nTwo", "a man"]},
        {"audio": ["a.wav"], "instruction": TEXT, "text": "A Man.\nTwo"},
        {"messages": [{"role": "user", "content": [{"type": "audio", "path": "a.wav"}, {"type": "text", "text": TEXT}]},
                      {"role": "assistant", "content": "A Man.\nTwo"}]},
        {"messages": [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "a.wav"}},
                                                   {"type": "input_text", "text": TEXT}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "A Man.\nTwo"}]}]},
        {"conversations": [{"from": "human", "value": f"<audio>\n{TEXT}"}, {"from": "gpt", "value": "A Man.\nTwo"}],
         "audio": "a.wav"},
        {"messages": [{"role": "user", "content": f"<audio>{TEXT}"}, {"role": "assistant", "content": "A Man.\nTwo"}],
         "audios": ["a.wav"]},
        {"messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "A Man.\nTwo"}],
         "audio": "a.wav"},
    ],
)  # fmt: skip
def test_all_forms_say_the_same(tmp_path, row):
    example = one(tmp_path, row)
    assert example.task == "answer" and list(example.messages) == ASKED
    assert example.reference == "A Man.\nTwo"  # as it was written
    assert [clip.audio["path"] for clip in example.clips] == [str(tmp_path / "a.wav")]
    assert example.clips[0].transcript is None  # CTC learns nothing from it


def test_several_turns_clips_and_none(tmp_path):
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "<audio>And <audio>?"},
        {"role": "assistant", "content": "Dog, cat."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    example = one(tmp_path, {"messages": turns, "audios": ["a.wav", "b.wav"]})
    assert [m["role"] for m in example.messages] == ["system", "user", "assistant", "user"]
    parts = [AUDIO, {"type": "text", "text": "And "}, AUDIO, {"type": "text", "text": "?"}]
    assert example.messages[1]["content"] == parts and len(example.clips) == 2 and example.references == ("Yes.",)
    turns = [{"role": "user", "content": "2 + 2 <audio>?"}, {"role": "assistant", "content": "4"}]
    text = one(tmp_path, {"messages": turns})
    assert text.clips == () and text.messages[0]["content"] == [{"type": "text", "text": "2 + 2 <audio>?"}]


def test_choices_are_told_and_the_transcript_is_for_ctc(tmp_path):
    row = {"audio": "a.wav", "instruction": "What is it?", "answer": "dog", "choices": ["dog", "cat"],
           "metric": "choice", "kind": "sound", "transcript": "hello"}  # fmt: skip
    example = one(tmp_path, row)
    assert example.messages[0]["content"][1]["text"] == "What is it?\nOptions: dog; cat."
    assert (example.choices, example.metric, example.kind) == (("dog", "cat"), "choice", "sound")
    assert example.transcript == "hello" == example.clips[0].transcript
    told = one(tmp_path, {**row, "instruction": "Is it a dog or a cat?"})
    assert told.messages[0]["content"][1]["text"] == "Is it a dog or a cat?"


def test_a_source_may_ask_in_its_own_words(tmp_path):
    assert one(tmp_path, {"audio": "a.wav", "text": "ja"}, instruction="Translate into German.").task == "answer"
    asked = one(tmp_path, {"audio": "a.wav", "text": "ja"}, instruction="transcribe the speech")
    assert asked.task == "transcribe" and asked.messages[0]["content"][1]["text"] == "transcribe the speech"
    own = one(tmp_path, {"audio": "a.wav", "text": "ja", "instruction": "Schreib mit."}, task="transcribe")
    assert own.task == "transcribe" and own.messages[0]["content"][1]["text"] == "Schreib mit."


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": [{"role": "user", "content": "<audio><audio>?"}, {"role": "assistant", "content": "x"}],
          "audios": ["a.wav"]}, "2 <audio> marks, more than its 1 clips"),
        ({"messages": [{"role": "user", "content": "<audio>?"}, {"role": "assistant", "content": "x"}],
          "audios": ["a.wav", "b.wav"]}, "1 <audio> marks, fewer than its 2 clips"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "an answer without a question"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "turn 1: its content is neither"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "unknown type 'image'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no answer"),
        ({"audio": "a.wav", "instruction": "x", "answer": " "}, "no answer"),
        ({"audio": "a.wav", "instruction": "x", "answer": {"de": "y"}}, "no text but dict"),
    ],
)  # fmt: skip
def test_wrong_rows_are_named(tmp_path, row, message):
    with pytest.raises(RowError, match=message) as caught:
        one(tmp_path, row)
    assert "row" in str(caught.value)
