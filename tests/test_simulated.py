"""Clips that are known by their words only: what the LLM is given for them, and training on them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from audiophi.data.collator import AudioPhiCollator, training_item
from audiophi.data.datasets import load_examples, stream_examples
from audiophi.data.example import AUDIO, RowError
from modeling_audiophi.heard_audiophi import hear_simulated, simulated_embeddings

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
    asked = write_rows(tmp_path, [{"question": "Who?", "answer": "A dog.", "transcript": "the lazy dog"}], "asked.jsonl")
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
    from audiophi.data.example import Clip, Example, content_of

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
                                  torch.tensor([2, 1]), table)  # fmt: skip
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
    from audiophi.data.alignment_text import AlignmentTokenizer

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
    with pytest.raises(ValueError, match="placeholder"):
        model(**{**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == processor.audio_token_id, 3)})
