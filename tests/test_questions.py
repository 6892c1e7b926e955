"""Questions that tasks make from words, labels and speakers: right by their own rules, balanced, drawn anew."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from audiophi.cli import eval as eval_script
from audiophi.data.dataset_streams import stream_examples
from audiophi.data.datasets import load_examples
from audiophi.data.example import Clip, RowError, drawing, longest, posed
from audiophi.evaluation import answers
from audiophi.tasks import TASKS
from audiophi.tasks.base import Row
from audiophi.tasks.questions import Questions
from audiophi.training.recipe import RecipeError, recipe_from_dict
from audiophi.training.stages import run_recipe
from processing import AudioPhiProcessor
from processing.chat_audiophi import wording_key
from tests.tiny_runs import LM

CLIP = Clip({"path": "a.wav", "bytes": None})
MAKERS = [task for task in TASKS.values() if isinstance(task, Questions)]
SENTENCES = ("the quick brown fox", "she sells sea shells", "runs away from the bear", "it was the best of times")


def row(number=0, **values):
    return Row(number=number, id=f"row{number}", source="data", clips=(CLIP,), **values)


def rows_of_all_kinds(number=0):
    """A row that every task can ask about, and others of its source."""
    own = row(number, text="The quick, brown fox!", gender="F", age="30", language="English")
    others = tuple(row(number + 1 + i, text=text, gender="M", age="6", language="French")
                   for i, text in enumerate(SENTENCES[1:]))  # fmt: skip
    labels = ("dog bark", "rain", "dog bark", "siren")
    sounds = tuple(row(number + 1 + i, label=label) for i, label in enumerate(labels))
    return own, others, sounds


def questions_of(task, number=0):
    from dataclasses import replace

    own, others, sounds = rows_of_all_kinds(number)
    found = []
    mixed = row(number, text="A lazy dog", label="rain")
    for one, rest in ((own, others), (row(number, label="rain"), sounds), (row(number, speech=False), ()),
                      (mixed, sounds)):  # fmt: skip
        try:
            found.append(task.example(replace(one, others=rest)))
        except RowError:
            pass
    return found


@pytest.mark.parametrize("task", MAKERS, ids=lambda task: task.name)
def test_right_answers_are_right_and_others_wrong(task):
    """By the rule of the question's own metric."""
    examples = [example for number in range(8) for example in questions_of(task, number)]
    assert examples
    for example in examples:
        for question in example.questions:
            only = replace(question, templates=question.templates or question.test_templates)
            one = posed(replace(example, questions=(only,)), lambda what, given: given[0])
            assert one.kind == question.kind and one.references == question.answers[:1]
            assert answers.fields(one, question.answers[0])["correct"] == 1.0, question
            assert not answers.fields(one, "zebra")["correct"]


@pytest.mark.parametrize("task", MAKERS, ids=lambda task: task.name)
def test_wordings_of_tests_are_never_trained(task):
    known = {wording_key(text) for other in TASKS.values() for text in (*other.wordings, *other.test_wordings)}
    trained, tested = set(), set()
    for example in questions_of(task):
        for question in example.questions:
            trained |= {wording_key(text) for text in question.wordings}
            tested |= {wording_key(text) for text in question.test_wordings}
            assert (len(question.wordings) >= 3 or not question.wordings) and question.test_wordings
            assert not any("{" in text and "..." not in text for text in question.wordings)
    assert not trained & tested
    assert not (trained | tested) & known  # or it would be decoded, and answered, as that task's


def test_an_evaluation_asks_the_same_in_wordings_of_its_own(speech):
    rows = load_examples({"path": str(speech), "task": "words"})
    tested = [rows.for_evaluation()[i] for i in range(len(rows))]
    assert tested == [rows.for_evaluation()[i] for i in range(len(rows))]
    for example, open_example in zip(tested, (rows[i] for i in range(len(rows))), strict=True):
        text = example.messages[0]["content"][-1]["text"]
        assert any(text in question.test_wordings for question in open_example.questions)
    assert len({example.kind for example in tested}) > 4


def test_training_asks_anew_in_every_epoch():
    (example, *_) = questions_of(TASKS["words"])
    asked = [posed(example, drawing(0, epoch, 7)) for epoch in range(200)]
    assert asked[:5] == [posed(example, drawing(0, epoch, 7)) for epoch in range(5)]
    kinds = Counter(one.kind for one in asked)
    assert set(kinds) == {question.kind for question in example.questions if question.wordings}
    assert "second_word" not in kinds and min(kinds.values()) > 5
    said = Counter(one.references[0] for one in asked if one.kind == "is_said")
    assert min(said["yes"], said["no"]) > 2
    whole = longest(example)
    text = whole.messages[0]["content"][-1]["text"]
    assert len(text) == max(len(one.messages[0]["content"][-1]["text"]) for one in asked + [whole])


def test_several_questions_are_asked_in_one_chat(speech):
    rows = load_examples({"path": str(speech), "task": "words", "turns": 3})
    for number, example in enumerate(rows[i] for i in range(len(rows))):
        questions = [question for question in example.questions if question.wordings]
        kinds = {question.kind for question in questions}
        chats = [posed(example, drawing(0, epoch, number)) for epoch in range(20)]
        most = longest(example)
        answers = {question.answers[0] for question in example.questions}
        for chat in chats:
            turns = chat.messages
            assert len(turns) == len(most.messages) == 2 * min(3, len(questions)) - 1
            assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2) + ["user"]
            # The clip is heard once, before the first question; no question comes twice.
            assert [item["type"] for item in turns[0]["content"]] == ["audio", "text"]
            asked = [turn["content"][-1]["text"] for turn in turns[::2]]
            assert all(len(turn["content"]) == 1 for turn in turns[2::2]) and len(set(asked)) == len(asked)
            assert {turn["content"] for turn in turns[1::2]} <= answers
            assert sum(map(len, asked)) <= sum(len(turn["content"][-1]["text"]) for turn in most.messages[::2])
        assert len(kinds) < 4 or len({str(chat.messages) for chat in chats}) > 10
        assert len(rows.for_evaluation()[number].messages) == 1
    for example in load_examples({"path": str(speech), "task": "words", "turns": 100}):
        kind_of = {wording: question.kind for question in example.questions for wording in question.wordings}
        asked = [turn["content"][-1]["text"] for turn in posed(example, drawing(0)).messages[::2]]
        kinds = [kind_of[text] for text in asked]
        assert len(set(asked)) == len(asked) == sum(bool(question.wordings) for question in example.questions)
        assert len(set(kinds[: len(set(kinds))])) == len(set(kinds))  # each kind before any comes again
    with pytest.raises(ValueError, match="turns must be 1 or more"):
        load_examples({"path": str(speech), "task": "words", "turns": 0})


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_drawing_of_two_is_a_coin(seed, epoch):
    coins = [drawing(seed, epoch, number)("coin", (0, 1)) for number in range(200)]
    pairs = Counter(zip(coins, coins[1:], strict=False))
    assert 60 < sum(coins) < 140 and min(pairs.values()) > 15


def test_rows_without_what_is_asked_about_are_named():
    for name, values, message in (
        ("words", {"text": "..."}, "nothing said in it"),
        ("choose", {"label": "dog bark"}, "no other label"),
        ("speaker", {"gender": "X"}, "no gender, age or language"),
        ("compare", {"label": "rain"}, "no audio"),
    ):
        with pytest.raises(RowError, match=message):
            TASKS[name].example(row(**values))


def test_a_stream_asks_too(speech):
    found = list(stream_examples([{"path": str(speech), "task": "words"}]))
    assert all(example.questions for example in found)
    assert any(question.kind == "is_said" for question in found[-1].questions)


@pytest.fixture
def sounds(tmp_path, waveform):
    folder = tmp_path / "sounds"
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as manifest:
        for number in range(12):
            soundfile.write(folder / f"{number}.wav", waveform(0.6, number), 16000)
            label = ("dog bark", "rain", "bell")[number % 3]
            manifest.write(json.dumps({"audio": f"{number}.wav", "label": label}) + "\n")
    return folder


def test_a_source_of_several_tasks_is_trained_and_evaluated(settings, speech, sounds, tmp_path):
    train = [
        {"path": str(speech), "task": {"transcribe": 1, "words": 3}, "weight": 2.0},
        {"path": str(sounds), "task": ["choose", "compare"]},
    ]
    data = {"train": train, "eval": [{"path": str(speech), "task": "words"}, {"path": str(sounds), "task": "compare"}]}
    recipe = recipe_from_dict(settings({**LM, "eval_steps": 4}, data=data))
    assert [(s.task, s.weight) for s in recipe.data.train] == [
        ("transcribe", 0.5), ("words", 1.5), ("choose", 0.5), ("compare", 0.5),
    ]  # fmt: skip
    final = run_recipe(recipe)
    assert list(AudioPhiProcessor.from_pretrained(final).tasks) == ["transcribe", "answer"]
    lines = (final.parent / "history.jsonl").read_text()
    assert "accuracy" in lines
    for name, folder in (("words", speech), ("compare", sounds)):
        out = tmp_path / f"eval-{name}"
        arguments = ["--task", name, "--model", str(final), "--data", str(folder), "--output_dir", str(out)]
        assert eval_script.main(arguments) == 0
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["rows"] and metrics["accuracy_by_kind"]


def test_weights_that_are_none_are_refused(settings, speech):
    for task in ({"words": 0}, {}, {"wrods": 1}):
        with pytest.raises(RecipeError, match="weights above 0|wrods"):
            recipe_from_dict(settings(LM, data={"train": [{"path": str(speech), "task": task}]}))


def test_the_questions_of_a_recipe_are_written_down(settings, speech, sounds, tmp_path, monkeypatch):
    import yaml

    from tools import make_questions

    data = {
        "train": [{"path": str(speech)}],
        "eval": [{"path": str(speech), "task": ["transcribe", "words"]}, {"path": str(sounds), "task": "compare"}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings(LM, data=data)))
    out = tmp_path / "questions.jsonl"
    assert make_questions.main([str(tmp_path / "recipe.yaml"), str(out), "--per_kind", "6"]) == 0
    rows = load_examples({"path": str(out)})
    assert rows.task == "answer"
    examples = [rows[i] for i in range(len(rows))]
    kinds = Counter(example.kind for example in examples)
    assert {"first_word", "is_said", "which_clip_sound", "same_sound"} <= kinds.keys() and max(kinds.values()) == 6
    assert {len(example.clips) for example in examples if example.kind == "same_sound"} == {2}
    said = Counter(example.reference for example in examples if example.kind == "is_said")
    assert said["yes"] == said["no"] == 3
    assert all(example.transcript for example in examples if example.kind == "first_word")
    again = tmp_path / "again.jsonl"
    make_questions.main([str(tmp_path / "recipe.yaml"), str(again), "--per_kind", "6"])
    assert again.read_text() == out.read_text()


def test_questions_about_clips_that_a_data_set_holds_itself_have_files(speech, settings, tmp_path):
    import yaml

    from tools import make_questions

    clip = (speech / "0.wav").read_bytes()
    table = datasets.Dataset.from_list([{"audio": {"bytes": clip, "path": "0.wav"}, "text": "the quick brown fox"}])
    table.to_parquet(tmp_path / "held.parquet")
    data = {"train": [{"path": str(speech)}], "eval": [{"path": str(tmp_path / "held.parquet"), "task": "words"}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings(LM, data=data)))
    assert make_questions.main([str(tmp_path / "recipe.yaml"), str(tmp_path / "questions.jsonl")]) == 0
    rows = load_examples({"path": str(tmp_path / "questions.jsonl")})
    assert len(rows) > 3 and Path(rows[0].clips[0].audio["path"]).read_bytes() == clip


def test_speech_is_laid_over_sounds(speech, sounds, tmp_path):
    from tools import make_mixed

    arguments = [str(speech), str(sounds), str(tmp_path / "mixed"), "--clips", "5", "--speech_filter", "speaker=1,2"]
    assert make_mixed.main(arguments) == 0
    rows = load_examples({"path": str(tmp_path / "mixed"), "task": "mixed"})
    assert len(rows) == 5 and {rows[i].speaker for i in range(5)} <= {"1", "2"}
    assert {"sound_behind", "is_behind", "said_and_heard"} == {
        question.kind for i in range(5) for question in rows[i].questions
    }
    rng = np.random.default_rng(0)
    voice, sound = rng.normal(size=1600) * 0.1, rng.normal(size=700)
    added = make_mixed.mix(voice, sound, 10.0) - voice
    assert 10 * np.log10(np.mean(voice**2) / np.mean(added**2)) == pytest.approx(10.0, abs=0.01)


def test_the_llm_itself_responds(speech, tiny_llm_dir, tmp_path, monkeypatch):
    """Its answers are kept as it gave them; an interrupted run goes on; the rows train as any others with questions."""
    from tools import make_responses

    out = tmp_path / "responses.parquet"
    arguments = [str(speech), str(out), "--llm", tiny_llm_dir, "--rows", "6", "--max_new_tokens", "20"]
    ended = lambda rows, args: ((row, "A fox." if number % 3 else None) for number, row in enumerate(rows))  # noqa: E731
    given, calls = make_responses.answers, []

    def spied(rows, args):
        calls.append(len(rows))
        for (row, own), (_, instead) in zip(given(rows, args), ended(rows, args), strict=True):
            assert own is None or own  # a random LLM rarely comes to an end
            yield row, instead

    monkeypatch.setattr(make_responses, "answers", spied)
    assert make_responses.main(arguments) == 0
    lines = (tmp_path / "responses.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "responses.jsonl").write_text("".join(lines[:2]) + lines[2][:9])
    assert make_responses.main(arguments) == 0 and calls == [6, 4]
    rows = load_examples({"path": str(out)})
    assert rows.task == "answer" and {rows[i].kind for i in range(len(rows))} == {"respond"}
    assert rows[0].reference == "A fox." and rows[0].transcript and rows[0].messages
    with pytest.raises(SystemExit):
        make_responses.main([str(speech), str(tmp_path / "x.txt")])
