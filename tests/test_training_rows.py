"""Training on rows of every form: chats about no clip, one or several, several questions about a clip, streams."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile

from audiophi.training.bad_rows import BadRows, TooManyBadRows
from audiophi.training.batches import BatchSchedule
from audiophi.training.build import build_model, build_processor
from audiophi.training.continuing import check_same_recipe, remember_recipe
from audiophi.training.corpus import Corpus
from audiophi.training.recipe import RecipeError, Source, recipe_from_dict
from audiophi.training.stages import run_recipe, trained_tasks
from audiophi.training.streams import StreamingSet
from modeling_audiophi import AudioPhiForConditionalGeneration
from processing import AudioPhiProcessor
from tests.layouts import write_clotho
from tests.tiny_runs import ALIGN, LM, largest_difference, train

BOTH = {**LM, "name": "both", "loss": "both"}


def write_rows(folder: Path, rows: list[dict]) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def user(text: str, *clips: str) -> dict:
    content = [*({"type": "audio", "path": clip} for clip in clips), {"type": "text", "text": text}]
    return {"role": "user", "content": content}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture
def chats(tmp_path, waveform):
    """A file of chats: text alone, about one clip, about two, and over two turns, four of each."""
    folder = tmp_path / "chats"
    folder.mkdir()
    for number in range(4):
        soundfile.write(folder / f"{number}.wav", waveform(0.8 + 0.2 * number, number), 16000)
    rows = []
    for number in range(4):
        one, two = f"{number}.wav", f"{(number + 1) % 4}.wav"
        rows += [
            {"messages": [user("Say a number."), assistant(f"number {number}")]},
            {"messages": [user("What is it?", one), assistant("a fox")]},
            {"messages": [user("Are they alike?", one, two), assistant("no")]},
            {"messages": [user("What is it?", one), assistant("a dog"), user("And this?", two), assistant("a bear")]},
        ]
    return write_rows(folder, rows)


def bad_rows(settings) -> list[dict]:
    return [json.loads(line) for line in (Path(settings()["output_dir"]) / "bad_rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", [LM, BOTH], ids=["lm", "both"])
@pytest.mark.parametrize("keys", [{}, {"cache": False}, {"loss_on": "last"}], ids=["cached", "live", "last"])
def test_chats_of_every_form_train(settings, speech, chats, stage, keys):
    data = {"train": [{"path": str(chats)}, {"path": str(speech), "limit": 4}], "eval": [{"path": str(chats)}]}
    stage = {**stage, "steps": 2, "batch_size": 6, "noise": 0.1}
    train(settings(stage, data=data, **keys))
    assert not bad_rows(settings)
    processor = AudioPhiProcessor.from_pretrained(Path(settings()["output_dir"]) / "final")
    assert list(processor.tasks) == ["transcribe", "answer"]


@pytest.mark.parametrize("streaming", [False, True])
def test_text_alone_trains_the_llm_and_nothing_else(settings, chats, streaming):
    """With a batch for each row, so that some have no audio."""
    data = {"train": [{"path": str(chats)}], "streaming": streaming}
    train(settings({**LM, "steps": 16, "batch_size": 1}, data=data))
    frozen = {**LM, "name": "frozen", "steps": 16, "batch_size": 1, "tune": {"adapter": "full"}}
    train(settings(frozen, data=data, output_dir=settings()["output_dir"] + "2"))


def test_a_stage_with_nothing_to_learn_from_is_refused(settings, tmp_path):
    path = write_rows(tmp_path, [{"messages": [user("Hello."), assistant("Hi.")]}])
    frozen = {**LM, "tune": {"adapter": "full"}}
    with pytest.raises(RecipeError, match="no row with audio"):
        train(settings(frozen, data={"train": [{"path": str(path)}]}))


def test_several_questions_about_a_clip_live_apart(settings, tmp_path, waveform):
    """They have one id and one file; one that cannot be read costs its own rows."""
    soundfile.write(tmp_path / "good.wav", waveform(1.0), 16000)
    soundfile.write(tmp_path / "bad.wav", waveform(1.0), 16000)
    (tmp_path / "bad.wav").write_bytes((tmp_path / "bad.wav").read_bytes()[:60])
    rows = [
        {"audio": f"{name}.wav", "id": "same", "question": f"question {number}?", "answer": str(number), "seconds": 1}
        for number in range(3)
        for name in ("good", "bad")
    ]
    data = {"train": [{"path": str(write_rows(tmp_path, rows))}], "max_bad_rows": 0.5}
    recipe = recipe_from_dict(settings({**LM, "steps": 2}, data=data))
    corpus = Corpus(recipe.data.train, BadRows(tmp_path / "list.jsonl", 0.5))
    assert [corpus.example(row).reference for row in corpus.rows] == ["0", "0", "1", "1", "2", "2"]
    for cache in (True, False):
        keys = {"cache": cache, "output_dir": str(tmp_path / f"out{cache}")}
        run_recipe(replace(recipe, **keys))
        listed = [json.loads(line) for line in (tmp_path / f"out{cache}" / "bad_rows.jsonl").read_text().splitlines()]
        assert {row["row"] for row in listed} <= {1, 3, 5} and {row["id"] for row in listed} == {"same"}
        assert not cache or len(listed) == 3
    assert len(list((tmp_path / "cache").glob("*/*.npy"))) == 1


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_full_when_either_budget_is():
    seconds, tokens = [0.0] * 40 + [5.0] * 40, [10 + 40 * (n % 2) for n in range(80)]
    schedule = BatchSchedule(seconds, tokens=tokens, epochs=1, batch_seconds=50, batch_tokens=200)
    batches = list(schedule)
    assert sorted(draw.row for batch in batches for draw in batch) == list(range(80))
    for batch in batches:
        assert len(batch) * max(seconds[draw.row] for draw in batch) <= 50
        assert len(batch) * max(tokens[draw.row] for draw in batch) <= 200
    silent = [batch for batch in batches if not any(seconds[draw.row] for draw in batch)]
    assert len(silent) < 20, "text alone is grouped by its length"
    heaviest = max(len(batch) * max(tokens[draw.row] for draw in batch) for batch in batches)
    assert heaviest > 100


def test_text_alone_needs_a_budget_of_its_own(settings, chats):
    stage = {**LM, "batch_size": None, "batch_seconds": 20.0, "steps": 2}
    data = {"train": [{"path": str(chats)}]}
    with pytest.raises(RecipeError, match="lm: .*batch_tokens"):
        train(settings(stage, data=data))
    train(settings({**stage, "batch_tokens": 100}, data=data))


# ---- streams ---------------------------------------------------------------------------------------------------------


def stream_of(settings, sources: list[dict], stage=ALIGN, **keys) -> StreamingSet:
    recipe = recipe_from_dict(settings(stage, data={"train": sources, "streaming": True, "max_bad_rows": 0.5}))
    processor = build_processor(recipe)
    build_model(replace(recipe, alignment=None, readout=None), processor, None)
    bad = BadRows(Path(recipe.output_dir) / "bad.jsonl", 0.5)
    return StreamingSet(recipe.data.train, bad, processor, recipe.stages[0], recipe, **keys)


def first_pass(stream) -> list[dict]:
    found = []
    for batch in stream:
        if any(item["epoch"] for item in batch):
            return found
        found += batch
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_trains_with_workers(settings, speech, chats, workers):
    data = {"train": [{"path": str(speech)}, {"path": str(chats)}], "streaming": True}
    stages = ({**ALIGN, "steps": 5}, {**LM, "steps": 5})
    train(settings(*stages, data=data, num_workers=workers))
    assert not bad_rows(settings)


def test_each_process_decodes_its_own_rows(settings, speech, monkeypatch):
    from audiophi.data.example import Clip

    read, clip_read = [], Clip.read
    monkeypatch.setattr(Clip, "read", lambda clip, name, rate: read.append(name) or clip_read(clip, name, rate))
    drawn = [first_pass(stream_of(settings, [{"path": str(speech)}], rank=rank, world_size=3)) for rank in range(3)]
    numbers = [sorted(item["id"] for item in items) for items in drawn]
    assert numbers == [list(range(rank, 16, 3)) for rank in range(3)]
    assert len(read) <= 16 + 3 * 6, "rows of others were decoded"


def test_a_streams_limits_are_its_sources(settings, speech, tmp_path):
    items = first_pass(stream_of(settings, [{"path": str(speech), "max_seconds": 1.3}]))
    assert sorted(item["id"] for item in items) == [0, 1, 2, 3, 9, 10, 11, 12]
    root = write_clotho(tmp_path / "clotho", ("development",))
    limited = {"path": f"clotho:{root}", "split": "development", "max_seconds": 0.01}
    items = first_pass(stream_of(settings, [{"path": str(speech)}, limited], LM))
    assert {item["id"] for item in items} == set(range(16)), "a prefix hid the source's limit"
    for audio in sorted(root.rglob("*.wav"))[:1]:
        audio.unlink()
    stream = stream_of(settings, [{"path": str(speech)}, {**limited, "max_seconds": None}], LM)
    first_pass(stream)
    assert len(stream.bad.expected) <= 1 and len(stream.bad) == 1 - len(stream.bad.expected)
    twice = [{"path": str(speech), "max_seconds": 1.3}, {"path": str(speech)}]
    with pytest.raises(RecipeError, match="max_seconds"):
        stream_of(settings, twice)


def test_too_many_bad_rows_end_a_stream_whoever_reads_them(settings, tmp_path, waveform):
    """A quarter of the rows cannot be used; each of four processes sees a quarter of them all."""
    soundfile.write(tmp_path / "a.wav", waveform(0.5), 16000)
    rows = [{"audio": "a.wav" if n % 8 < 6 else "missing.wav", "text": "a fox", "seconds": 0.5} for n in range(480)]
    source = {"path": str(write_rows(tmp_path, rows))}
    for world in (1, 4):
        ended = 0
        for rank in range(world):
            stream = stream_of(settings, [source], rank=rank, world_size=world)
            stream.bad.max_share = 0.2
            try:
                first_pass(stream)
            except TooManyBadRows:
                ended += 1
        assert ended


def test_a_streams_tasks_are_known(settings, chats, speech, tmp_path):
    root = write_clotho(tmp_path / "clotho", ("development",))
    sources = [{"path": str(speech)}, {"path": str(chats)}, {"path": f"clotho:{root}", "split": "development"}]
    recipe = recipe_from_dict(settings(LM, data={"train": sources, "streaming": True}))
    assert trained_tasks(recipe, []) == ["transcribe", "answer", "caption"]


# ---- what goes on from before ----------------------------------------------------------------------------------------


def test_a_checkpoints_tasks_and_decoding_are_kept(settings, speech, chats, tmp_path):
    first = settings({**LM, "steps": 1}, data={"train": [{"path": str(chats)}]}, output_dir=str(tmp_path / "first"),
                     generation={"answer": {"max_new_tokens": 7}}, alignment={"merges": None})  # fmt: skip
    start = run_recipe(recipe_from_dict(first))
    keys = {"init_from": str(start), "instructions": {"transcribe": ["Write it."]}, "alignment": {"merges": None}}
    keys["generation"] = {"transcribe": {"draft_tokens": 3}}
    then = run_recipe(recipe_from_dict(settings({**LM, "steps": 1}, output_dir=str(tmp_path / "then"), **keys)))
    processor = AudioPhiProcessor.from_pretrained(then)
    assert list(processor.tasks) == ["transcribe", "answer"], "what is done unasked comes first"
    assert processor.tasks["transcribe"]["instructions"][0] == "Write it."
    trained = {name: task["trained"] for name, task in processor.tasks.items()}
    assert trained == {"transcribe": ["Write it."], "answer": ["What is it?"]}, "what a demo offers, about one clip"
    again = settings({**LM, "steps": 1}, output_dir=str(tmp_path / "again"), init_from=str(then),
                     alignment={"merges": None})  # fmt: skip
    decoding = AudioPhiForConditionalGeneration.from_pretrained(run_recipe(recipe_from_dict(again))).generation_config
    assert decoding.tasks["answer"]["max_new_tokens"] == 7
    assert decoding.tasks["transcribe"]["draft_tokens"] == 3, "a task's defaults replaced the checkpoint's settings"


def test_a_run_is_continued_with_the_same_text_in_a_step_and_a_streams_shares(settings, speech, tmp_path):
    def recipe(streaming=False, num_workers=0, **stage):
        data = {"train": [{"path": str(speech)}], "streaming": streaming}
        return recipe_from_dict(settings({**ALIGN, **stage}, data=data, num_workers=num_workers))

    folder = tmp_path / "run"
    (folder / "align").mkdir(parents=True)
    remember_recipe(recipe(batch_tokens=100), folder, 2)
    check_same_recipe(recipe(batch_tokens=200, batch_size=8), folder, 1)
    with pytest.raises(RecipeError, match="other settings of stages.0.batch_"):
        check_same_recipe(recipe(batch_tokens=100, batch_size=8), folder, 1)
    check_same_recipe(recipe(batch_tokens=100, num_workers=3), folder, 2)
    remember_recipe(recipe(streaming=True), folder, 1)
    check_same_recipe(recipe(streaming=True, num_workers=1), folder, 1)
    with pytest.raises(RecipeError, match="num_workers"):
        check_same_recipe(recipe(streaming=True, num_workers=2), folder, 1)


# ---- development -----------------------------------------------------------------------------------------------------


def test_scores_of_several_tasks_do_not_hide_each_other(settings, speech, chats, tmp_path):
    data = {"train": [{"path": str(speech)}], "eval": [{"path": str(chats)}, {"path": str(speech)}]}
    train(settings({**LM, "steps": 1}, data=data, evaluation={"clips": 40, "max_new_tokens": 3}))
    entries = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    (scores,) = [entry for entry in entries if "wer" in entry]
    assert {"never_stopped", "never_stopped_answer", "accuracy"} <= scores.keys()


def test_sources_name_their_tasks():
    with pytest.raises(RecipeError, match="data.train.0.task.*did you mean 'transcribe'"):
        recipe_from_dict({"name": "x", "components": {"audio": "a", "text": "b"},
                          "data": {"train": [{"path": "a", "task": "transcibe"}]},
                          "stages": [LM]})  # fmt: skip
    assert Source(path="a").task is None


def test_the_same_seed_draws_the_same_chats(settings, chats, tmp_path):
    data = {"train": [{"path": str(chats)}]}
    stage = {**LM, "steps": 3}
    first, second = (train(settings(stage, data=data, output_dir=str(tmp_path / name))) for name in "ab")
    assert largest_difference(first, second) == 0
