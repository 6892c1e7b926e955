"""Clips that are known by their words only: what the LLM is given for them, and training on them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from safetensors.numpy import load_file

from audiophi.data.alignment_text import AlignmentTokenizer
from audiophi.data.collator import AudioPhiCollator, training_item
from audiophi.data.dataset_streams import stream_examples
from audiophi.data.datasets import load_examples
from audiophi.data.example import AUDIO, Clip, Example, RowError, content_of
from audiophi.training.bad_rows import BadRows
from audiophi.training.batches import Draw
from audiophi.training.corpus import Corpus, TrainingSet
from audiophi.training.recipe import RecipeError, Source, recipe_from_dict
from audiophi.training.row_facts import CHARACTERS_PER_SECOND
from audiophi.training.simulated import Confusions, Heard, hear_clips, measure
from modeling_audiophi.heard_audiophi import simulated_embeddings
from tests.tiny_runs import ALIGN, LM, TEXTS, largest_difference, train

RATE = 16_000


def write_rows(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def heard_clip(*tokens, width=3):
    """A simulated clip that hears these tokens without a doubt."""
    ids, weights = torch.zeros(len(tokens), width, dtype=torch.long), torch.zeros(len(tokens), width)
    ids[:, 0], weights[:, 0] = torch.tensor(tokens), 1.0
    return {"heard_ids": ids, "heard_weights": weights}


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_without_audio_have_a_clip_where_their_words_are_known(tmp_path):
    def user(*items):
        return {"role": "user", "content": list(items)}

    asked, answer = {"type": "text", "text": "Who is it?"}, {"role": "assistant", "content": "A fox."}
    rows = [
        {"messages": [user(asked), answer], "transcript": "the quick fox"},
        {"messages": [user(asked), answer]},
        {"messages": [user(asked, {"type": "audio"}), answer], "transcript": "the fox"},
        {"messages": [user({"type": "text", "text": "<audio>\nWho?"}), answer], "transcript": "a fox"},
        {"messages": [user({"type": "audio", "path": "nowhere.wav"}, asked), answer], "transcript": "no file"},
        {"messages": [user({"type": "audio"}, asked), answer]},
        {"messages": [user({"type": "audio"}, {"type": "audio"}, asked), answer], "transcript": "who says it?"},
    ]
    spec = {"path": str(write_rows(tmp_path, rows)), "heard": "simulated"}
    examples = load_examples(spec)
    known = [examples[number] for number in range(5)]
    assert [[clip.transcript for clip in example.clips] for example in known] == [
        ["the quick fox"], [], ["the fox"], ["a fox"], ["no file"],
    ]  # fmt: skip
    assert all(clip.simulated and clip.audio is None for example in known for clip in example.clips)
    assert known[0].messages[0]["content"] == [AUDIO, asked] and known[1].messages[0]["content"] == [asked]
    assert known[2].messages[0]["content"] == [asked, AUDIO]
    assert known[3].messages[0]["content"] == [AUDIO, {"type": "text", "text": "Who?"}]
    for number in (5, 6):
        with pytest.raises(RowError, match=rf"row {number + 1}, .*not known what is said"):
            examples[number]
    streamed = list(stream_examples([spec]))
    assert [isinstance(example, RowError) for example in streamed] == [False] * 5 + [True] * 2


def test_rows_of_plain_text_are_transcribed_or_asked_about(tmp_path):
    texts = write_rows(tmp_path, [{"text": "the lazy dog"}])
    example = load_examples({"path": str(texts), "heard": "simulated"})[0]
    assert example.task == "transcribe" and example.clips[0].transcript == example.reference == "the lazy dog"
    rows = [{"question": "Who?", "answer": "A dog.", "transcript": "the lazy dog"}]
    asked = write_rows(tmp_path, rows, "asked.jsonl")
    example = load_examples({"path": str(asked), "heard": "simulated"})[0]
    assert example.clips[0].transcript == "the lazy dog" and example.messages[0]["content"][0] == AUDIO
    with pytest.raises(RowError, match="not known what is said"):
        load_examples({"path": str(texts), "heard": "simulated", "task": "caption"})[0]
    with pytest.raises(ValueError, match="no column looks like audio"):
        load_examples(str(texts))
    with pytest.raises(ValueError, match="heard 'maybe' is not one of real, simulated"):
        load_examples({"path": str(texts), "heard": "maybe"})


# ---- model -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["collapse", "mixed"])
def model_and_processor(request, make_tiny_model):
    model, processor = make_tiny_model(readout=request.param)
    with torch.no_grad():  # so that it hears words
        model.model.alignment.bias[0] -= 1.0
    return model, processor


def items_of(processor, clips, answer="the fox", turns=None):
    """One item per clip, or one about all of them."""
    groups = [clips] if turns == "one" else [[clip] for clip in clips]
    items = []
    for number, group in enumerate(groups):
        asked = ({"role": "user", "content": content_of(len(group), "What is said?")},)
        known = tuple(Clip(None, "a fox", simulated="heard_ids" in clip) for clip in group)
        example = Example("answer", number, f"row{number}", "data", known, asked, (answer,))
        items.append(training_item(example, group, wordings=[]))
    return items


def test_certain_tokens_are_the_rows_of_the_embedding_table():
    table = torch.randn(20, 4)
    embeds = simulated_embeddings(torch.tensor([[[5, 0], [7, 3]], [[2, 1], [0, 0]]]),
                                  torch.tensor([[[1.0, 0], [0.25, 0.75]], [[1.0, 0], [0, 0]]]),
                                  torch.tensor([2, 1]), torch.nn.Embedding.from_pretrained(table))  # fmt: skip
    torch.testing.assert_close(embeds, torch.stack([table[5], table[7] / 4 + table[3] * 0.75, table[2]]))


def test_a_prompt_with_a_simulated_clip_reads_its_words(model_and_processor):
    model, processor = model_and_processor
    tokens = processor.tokenizer(" the fox").input_ids
    batch = AudioPhiCollator(processor)(items_of(processor, [heard_clip(*tokens)]))
    # The same prompt with the words in the placeholder's place.
    row = batch["input_ids"][0].tolist()
    place = row.index(processor.audio_token_id)
    ids, labels = (
        torch.tensor([[*values[:place], *put, *values[place + 1 :]]])
        for values, put in ((row, tokens), (batch["labels"][0].tolist(), [-100] * len(tokens)))
    )
    with torch.no_grad():
        heard, read = model(**batch).loss, model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(heard, read)


@pytest.mark.parametrize("mode", ["lm", "both"])
def test_mixed_batches_equal_ones_run_apart(model_and_processor, waveform, mode):
    model, processor = model_and_processor
    collate = AudioPhiCollator(processor, mode, AlignmentTokenizer(processor.tokenizer, 5))
    real = [processor.encode_audio((waveform(seconds, 1), RATE)) for seconds in (1.0, 2.5)]
    clips = [real[0], heard_clip(20, 31, 40), real[1], heard_clip(), heard_clip(50, width=2)]
    items = items_of(processor, clips)
    counted = {"num_items_in_batch": 1, "align_items_in_batch": 1}
    with torch.no_grad():
        together = model(**collate(items), **counted)
        apart = [model(**collate([item]), **counted) for item in items]
    torch.testing.assert_close(together.lm_loss, sum(output.lm_loss for output in apart))
    torch.testing.assert_close(together.audio_counts, torch.cat([output.audio_counts for output in apart]))
    assert together.audio_counts[[1, 3, 4]].tolist() == [3, 0, 1]
    if mode == "both":
        torch.testing.assert_close(together.align_loss, apart[0].align_loss + apart[2].align_loss)
        assert apart[1].align_loss is None
    # Both kinds in one prompt.
    with torch.no_grad():
        one, other = (
            model(**collate(items_of(processor, order, turns="one"))).audio_counts for order in (clips, clips[::-1])
        )
    assert one.tolist() == other.tolist()[::-1] == together.audio_counts.tolist()


def test_a_batch_of_simulated_clips_runs_no_encoder_and_leaves_gradients_of_zero(make_tiny_model, monkeypatch):
    model, processor = make_tiny_model(readout="mixed")
    model.tune("audio", "frozen")
    model.train()

    def refuse(*_, **__):
        raise AssertionError("runs")

    for part in (model.model.audio_tower, model.model.multi_modal_projector, model.model.readout):
        monkeypatch.setattr(part, "forward", refuse)
    batch = AudioPhiCollator(processor)(items_of(processor, [heard_clip(20, 31), heard_clip(40)]))
    model(**batch).loss.backward()
    for part in (model.model.multi_modal_projector, model.model.readout, model.model.alignment):
        assert all(not p.grad.any() for p in part.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.model.language_model.parameters())


def test_numbers_of_clips_that_do_not_fit_are_refused(model_and_processor):
    model, processor = model_and_processor
    batch = AudioPhiCollator(processor)(items_of(processor, [heard_clip(20, 31)]))
    with pytest.raises(ValueError, match="names 0 simulated and 1 real clips, but 1 and 0 are given"):
        model(**{**batch, "heard_clips": torch.tensor([False])})
    without = batch["input_ids"].masked_fill(batch["input_ids"] == processor.audio_token_id, 3)
    with pytest.raises(ValueError, match="placeholder"):
        model(**{**batch, "input_ids": without})


# ---- confusions ------------------------------------------------------------------------------------------------------


def noisy(tokens, rng, delete=0.15, insert=0.1, confuse=0.1, vocabulary=30):
    """`Heard` of an alignment with known errors; the best token has weight 0.8."""
    found = []
    for token in [*tokens, None]:
        if rng.random() < insert:
            found.append(1000)  # like no reference, so that nothing but an insertion explains it
        if token is not None and rng.random() >= delete:
            found.append(int(rng.integers(100, 100 + vocabulary)) if rng.random() < confuse else token)
    ids = np.zeros((len(found), 8), dtype=np.int64)
    ids[:, 0] = found
    ids[:, 1] = ids[:, 0] + 1
    weights = np.zeros(ids.shape, dtype=np.float32)
    weights[:, 0], weights[:, 1] = 0.8, 0.2
    return Heard(ids[:, 0].copy(), ids, weights)


def numbers(text):
    return [int(word) for word in text.split()]


@pytest.fixture(scope="module")
def confusions():
    """Of 400 clips with 20 of 30 tokens each, heard with known errors."""
    rng = np.random.default_rng(0)
    clips = [(" ".join(map(str, rng.integers(10, 40, size=20))), {}) for _ in range(400)]
    said = iter([numbers(text) for text, _ in clips])
    return measure(lambda clips: [noisy(next(said), rng) for _ in clips], clips, numbers)


def test_the_errors_of_real_clips_are_reproduced(confusions):
    """Measured on what was simulated, they are what they were. A lost token beside an added one counts as confused."""
    rng, heard = np.random.default_rng(1), []
    texts = [" ".join(map(str, rng.integers(10, 40, size=20))) for _ in range(400)]
    for text in texts:
        ids, weights = confusions.simulate(text, rng)
        heard.append(Heard(ids[:, 0], ids, weights))
    spoken = iter(heard)
    again = measure(lambda clips: [next(spoken) for _ in clips], [(text, {}) for text in texts], numbers)
    assert 0.1 < confusions.deletion_rate < 0.15 and 0.06 < confusions.insertion_rate < 0.1
    assert abs(again.deletion_rate - confusions.deletion_rate) < 0.03
    assert abs(again.insertion_rate - confusions.insertion_rate) < 0.03
    right = [(found.ids[:, 0] == found.tokens).mean() for found in (confusions, again)]
    assert 0.8 < right[0] < 0.9 and abs(right[0] - right[1]) < 0.03
    ids, weights = confusions.simulate(" ".join(map(str, np.tile(np.arange(10, 40), 200))), rng)
    best = ids[:, 0]
    assert abs(len(best) / 6000 - (1 - 0.15 + 0.1)) < 0.02
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    # What is heard rightly comes in order.
    right = best[best < 100]
    steps = np.diff(right) % 30
    assert (steps >= 1).mean() > 0.97 and np.median(steps) == 1


@settings_of_hypothesis(max_examples=30, deadline=None)
@given(rate=st.floats(0, 0.9), deletes=st.booleans(), seed=st.integers(0, 1000))
def test_any_rates_are_reproduced(rate, deletes, seed):
    delete, insert = (rate, 0.0) if deletes else (0.0, rate)
    rng = np.random.default_rng(seed)
    clips = [(" ".join(map(str, rng.integers(10, 40, size=15))), {}) for _ in range(150)]
    said = iter([numbers(text) for text, _ in clips])
    measured = measure(lambda clips: [noisy(next(said), rng, delete, insert, 0.0) for _ in clips], clips, numbers)
    text = " ".join(map(str, np.tile(np.arange(10, 40), 400)))
    best = measured.simulate(text, np.random.default_rng(seed + 1))[0][:, 0]
    # Six standard deviations and more.
    assert abs(1 - (best != 1000).sum() / 12_000 - measured.deletion_rate) < 0.06 > abs(measured.deletion_rate - delete)
    assert abs((best == 1000).sum() / 12_000 - measured.insertion_rate) < 0.06 > abs(measured.insertion_rate - insert)


def test_what_is_heard_depends_on_the_key_alone_and_survives_saving(confusions, tmp_path):
    confusions.save(tmp_path / "confusions.safetensors")
    again = Confusions.load(tmp_path / "confusions.safetensors", numbers)
    text = "11 12 13 14 15 16 17 18"
    first = confusions.clip(text, 7, 0, 3, 0)
    assert all(torch.equal(first[key], again.clip(text, 7, 0, 3, 0)[key]) for key in first)
    others = [again.clip(text, *key)["heard_ids"].tolist() for key in ((7, 1, 3, 0), (7, 0, 4, 0), (7, 0, 3, 1))]
    assert first["heard_ids"].tolist() not in others
    assert again.describe() == confusions.describe()
    assert first["heard_ids"].dtype == torch.long and first["heard_weights"].dtype == torch.float32


def test_tokens_never_seen_are_heard_as_surely_as_others(confusions):
    ids, weights = confusions.simulate(" ".join(["77777"] * 2000), np.random.default_rng(0))
    own = (np.where(ids == 77777, weights, 0)).sum(1)
    assert 0.75 < (own > 0.7).mean() < 0.88  # a tenth is confused, a tenth added
    assert abs(own[own > 0].mean() - 0.8) < 0.01
    assert abs(len(ids) / 2000 - (1 - confusions.deletion_rate + confusions.insertion_rate)) < 0.03


def test_silence_and_deaf_alignments_leave_nothing_or_what_is_added(confusions):
    ids, weights = confusions.simulate("", np.random.default_rng(0))
    assert ids.shape == weights.shape == (len(ids), 8) and (ids[:, :1] == 1000).all()
    nothing = Heard(*(np.zeros(shape, dtype=kind) for shape, kind in ((0, int), ((0, 8), int), ((0, 8), np.float32))))
    deaf = measure(lambda clips: [nothing for _ in clips], [("10 11", {}), ("12", {})], numbers)
    assert deaf.deletion_rate == 1 and deaf.simulate("10 11 99", np.random.default_rng(0))[0].shape == (0, 8)


@pytest.mark.parametrize("readout", ["collapse", "mixed"])
def test_what_is_measured_is_what_the_readout_gives(make_tiny_model, waveform, readout):
    """Heard runs, put into the prompt as a simulated clip, are what the untrained readout makes of the clip's words."""
    model, processor = make_tiny_model(readout=readout)
    with torch.no_grad():
        model.model.alignment.bias[0] -= 1.0
        model.model.alignment.scale.fill_(30.0)  # sure enough for its best 8 tokens to be nearly all
    clip = processor.encode_audio((waveform(2.5, 3), RATE))
    with torch.no_grad():
        audio = model.get_audio_features(**processor.pad_audio([clip]), with_alignment=True)
    heard = hear_clips(model, processor, [clip])[0]
    words = audio.embeds[0][audio.keep[0] & (audio.align_logits[0].argmax(-1) > 0)]
    assert len(heard.tokens) == len(words) > 2
    assert model.read_alignment(**processor.pad_audio([clip]))[0] == heard.tokens.tolist()
    lengths = torch.tensor([len(words)])
    embeds = simulated_embeddings(
        torch.tensor(heard.ids)[None], torch.tensor(heard.weights)[None], lengths, model.get_input_embeddings()
    )
    torch.testing.assert_close(embeds, words, atol=0.02, rtol=0.1)


# ---- training --------------------------------------------------------------------------------------------------------

# Long enough for it to hear something.
DEAF = ALIGN
ALIGN = {**ALIGN, "steps": 200, "learning_rate": 1e-2}
SIMULATED = {**LM, "name": "simulated"}


@pytest.fixture
def texts(tmp_path):
    """Rows of text without any audio: to transcribe, and to answer questions about."""
    folder = tmp_path / "texts"
    folder.mkdir()
    plain = write_rows(folder, [{"text": text, "id": f"text{n}"} for n, text in enumerate(TEXTS * 2)], "plain.jsonl")
    asked = [{"question": "Who?", "answer": f"number {n}", "transcript": text} for n, text in enumerate(TEXTS)]
    asked.append({"question": "2 + 2?", "answer": "4"})
    return str(plain), str(write_rows(folder, asked, "asked.jsonl"))


@pytest.mark.parametrize("readout", ["collapse", "mixed"])
@pytest.mark.parametrize("loss", ["lm", "both"])
def test_training_on_text_beside_real_clips(settings, speech, texts, readout, loss):
    plain, asked = texts
    sources = [{"path": str(speech)}, {"path": plain, "heard": "simulated"}, {"path": asked, "heard": "simulated"}]
    recipe = settings(ALIGN, {**SIMULATED, "loss": loss, "data": sources}, readout=readout)
    weights = train(recipe)
    out = Path(recipe["output_dir"])
    assert (out / "confusions.safetensors").exists() and not (out / "bad_rows.jsonl").read_text()
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert all(np.isfinite(entry["loss"]) for entry in history if "loss" in entry)
    assert any(value.isfinite().all() and "lora_B" in name and value.any() for name, value in weights.items())
    # Run again from nothing: the same.
    assert loss == "both" or largest_difference(weights, train({**recipe, "output_dir": str(out) + "2"})) == 0


def test_a_stage_of_text_alone_is_measured_on_clips_of_others(settings, speech, texts, tmp_path, monkeypatch):
    plain, _ = texts
    stage = {**SIMULATED, "data": [{"path": plain, "heard": "simulated"}]}
    train(settings(ALIGN, stage))
    measured = load_file(Path(settings()["output_dir"]) / "confusions.safetensors")
    assert measured["times"].sum() > 100
    # data.train is text, too; with a stage before it that has clips, these are not looked for.
    keys = {"data": {"train": [{"path": plain, "heard": "simulated"}], "heard_from": [{"path": str(speech)}]}}
    first = {**ALIGN, "data": [{"path": str(speech)}]}
    recipe = settings(first, SIMULATED, **keys, output_dir=str(tmp_path / "other"), cache=False)
    train(recipe)
    again = load_file(tmp_path / "other" / "confusions.safetensors")
    np.testing.assert_array_equal(measured["times"], again["times"])  # with or without the cache
    # A resumed run does not measure again.
    shutil.rmtree(tmp_path / "other" / "simulated")
    monkeypatch.setattr("audiophi.training.measured_clips.measure", None)
    train(recipe)


def test_training_on_a_stream_of_text(settings, speech, texts):
    plain, asked = texts
    real = {"path": str(speech)}
    words = [{"path": path, "heard": "simulated", "weight": 1.0} for path in (plain, asked)]
    sources = [{**real, "weight": 1.0}, *words]
    stage = {**SIMULATED, "data": sources}
    train(settings(ALIGN, stage, data={"train": [real], "streaming": True}))
    assert load_file(Path(settings()["output_dir"]) / "confusions.safetensors")["times"].sum() > 100


def test_rows_are_the_same_whatever_the_batch_and_differ_between_epochs(settings, speech, texts, confusions, tmp_path):
    plain, _ = texts
    sources = [Source(path=plain, heard="simulated"), Source(path=str(speech))]
    corpus = Corpus(sources, BadRows(tmp_path / "bad.jsonl", 0))
    assert corpus.rows[0].lengths == (len(TEXTS[0]) / CHARACTERS_PER_SECOND,)
    assert sorted(corpus.texts()) == sorted(TEXTS)
    tokenized = replace_tokenizer(confusions)
    rows = TrainingSet(corpus, None, None, {}, seed=3, confusions=tokenized)
    first, again, later = (rows[Draw(2, epoch, 1.0)] for epoch in (0, 0, 1))
    assert torch.equal(first["clips"][0]["heard_ids"], again["clips"][0]["heard_ids"])
    assert first["clips"][0]["heard_ids"].tolist() != later["clips"][0]["heard_ids"].tolist()
    assert first["transcripts"] == [TEXTS[2]]


def replace_tokenizer(confusions):
    """The same confusions for texts whose letters are tokens."""
    return Confusions(lambda text: [10 + ord(letter) % 30 for letter in text], **confusions.arrays)


def test_long_texts_are_left_out(settings, speech, tmp_path):
    rows = [{"text": "the fox " * 2000, "id": "long"}, *({"text": text} for text in TEXTS * 20)]
    stage = {**SIMULATED, "data": [{"path": str(write_rows(tmp_path, rows)), "heard": "simulated"}]}
    train(settings(ALIGN, stage))
    bad = (Path(settings()["output_dir"]) / "bad_rows.jsonl").read_text().splitlines()
    assert len(bad) == 1 and "exceed the context" in bad[0] and '"long"' in bad[0]


def test_recipes_that_cannot_be_trained_name_the_reason(settings, speech, texts):
    plain, asked = texts
    text, real = {"path": plain, "heard": "simulated"}, {"path": str(speech)}
    stage = {**SIMULATED, "data": [text]}
    refused = [
        (settings({**ALIGN, "data": [real, text]}), "stages.0: heard: simulated: the align loss needs audio"),
        (settings(ALIGN, stage, readout="frames"), "only readout collapse and mixed"),
        (settings(stage), "alignment is not trained yet"),
        (settings({**ALIGN, "data": [real]}, stage, data={"train": [text]}), "no real clips.*data.heard_from"),
        (settings(ALIGN, data={"train": [real], "eval": [text]}), "data.eval: heard: simulated is for training"),
        (settings(stage, init_from="x", alignment=None), "add `alignment`"),
        (settings(ALIGN, {**stage, "data": [{**text, "heard": "maybe"}]}), "heard"),
    ]
    for recipe, reason in refused:
        with pytest.raises(RecipeError, match=reason):
            recipe_from_dict(recipe)
    frozen = {**stage, "tune": {"adapter": "full"}}
    with pytest.raises(RecipeError, match="only the LLM could learn"):
        train(settings(ALIGN, {**frozen, "lora": {}}))


def test_neither_unknown_words_nor_deaf_alignments_measure_anything(settings, speech, texts):
    plain, _ = texts
    captions = {"path": str(speech), "task": "caption"}
    recipe = settings(DEAF, {**SIMULATED, "data": [{"path": plain, "heard": "simulated"}]})
    with pytest.raises(RecipeError, match="hears none of the words of 226 tokens"):
        train(recipe)
    shutil.rmtree(recipe["output_dir"])
    recipe["data"]["heard_from"] = [captions]
    with pytest.raises(RecipeError, match="known what is said"):
        train(recipe)
