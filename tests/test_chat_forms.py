"""The same chats in the form of OpenAI and of ShareGPT train the same model, and come back as they were written."""

import json
from pathlib import Path

import pytest
import soundfile
from transformers import pipeline

from audiophi.data.collator import AudioPhiCollator
from audiophi.training.recipe import recipe_from_dict
from audiophi.training.stages import run_recipe
from tests.tiny_runs import LM

FULL = {**LM, "tune": {"llm": "full"}}
ROLES = {"system": "system", "user": "human", "assistant": "gpt"}


def turn(role, text, *clips):
    items = [*({"type": "audio", "path": clip} for clip in clips), {"type": "text", "text": text}]
    return {"role": role, "content": items if role == "user" else text}


def shared(row):
    """The row as ShareGPT has it: marks in the words, the clips in a column."""
    turns, clips = [], []
    for message in row["messages"]:
        items = message["content"]
        items = items if isinstance(items, list) else [{"type": "text", "text": items}]
        clips += [item["path"] for item in items if item["type"] == "audio"]
        words = "".join("<audio>\n" if item["type"] == "audio" else item["text"] for item in items)
        turns.append({"from": ROLES[message["role"]], "value": words})
    return {"id": row["id"], "conversations": turns, **({"audios": clips} if clips else {})}


@pytest.fixture
def clips(tmp_path, waveform):
    paths = [tmp_path / f"{number}.wav" for number in range(4)]
    for number, path in enumerate(paths):
        soundfile.write(path, waveform(0.6 + 0.2 * number, number), 16000)
    return [str(path) for path in paths]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_messages_and_conversations_train_alike(settings, clips, tmp_path, monkeypatch):
    """200 rows in one file: text alone, one clip, two clips, two turns."""
    rows = []
    for number in range(50):
        one, two = clips[number % 4], clips[(number + 1) % 4]
        be = turn("system", f"Be number {number}.")
        alone = [be, turn("user", "Say a Number."), turn("assistant", f"Number\n{number}")]
        about = [turn("user", "What is it?", one), turn("assistant", "A fox")]
        both = [turn("user", "Are they alike?", one, two), turn("assistant", "No.")]
        rows += [{"messages": chat} for chat in (alone, about, both, [*about, turn("user", "And?", two), both[-1]])]
    rows = [{"id": f"row{number}", **row} for number, row in enumerate(rows)]
    batches, collate = [], AudioPhiCollator.__call__

    def noted(self, items):
        batches[-1].append(collate(self, items))
        return batches[-1][-1]

    monkeypatch.setattr(AudioPhiCollator, "__call__", noted)
    losses = []
    for form, written in (("messages", rows), ("conversations", [shared(row) for row in rows])):
        batches.append([])
        out = tmp_path / form
        data = {"train": [{"path": write(tmp_path / f"{form}.jsonl", written)}]}
        stage = {**FULL, "steps": None, "epochs": 1, "batch_size": 20}
        run_recipe(recipe_from_dict(settings(stage, data=data, output_dir=str(out), logging_steps=1)))
        entries = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
        losses.append([entry["loss"] for entry in entries if "loss" in entry])
    assert len(losses[0]) == 10 and losses[0] == losses[1]
    ours, theirs = batches
    assert len(ours) == len(theirs) >= 10
    for one, other in zip(ours, theirs, strict=True):
        for key in ("input_ids", "labels"):
            assert one[key].equal(other[key])


def test_answers_come_back_verbatim(settings, clips, tmp_path):
    """Capitals, line breaks and JSON, from a model that has learned them by heart."""
    answers = {
        "Say it loudly.": "THE Quick Fox!",
        "List them.": "- a dog\n- The bear\n\nno more",
        "As JSON.": '{"words": ["fox", "SEA"], "many": 2}',
    }
    rows = [{"messages": [turn("user", q, clips[0]), turn("assistant", a)]} for q, a in answers.items()]
    data = {"train": [{"path": write(tmp_path / "rows.jsonl", rows)}]}
    stage = {**FULL, "steps": 800, "batch_size": 3, "learning_rate": 5e-3, "warmup": 0.05}
    final = Path(run_recipe(recipe_from_dict(settings(stage, data=data))))
    pipe = pipeline("audio-text-to-text", model=str(final), device="cpu")
    assert {q: pipe(clips[0], instruction=q)["generated_text"] for q in answers} == answers
