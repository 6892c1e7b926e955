"""The weights of decoding are chosen on development clips, and never do worse there than the alignment alone."""

import json

import pytest
import torch
from transformers import TextIteratorStreamer

from audiophi.training.decoding_fit import ALONE
from audiophi.training.recipe import recipe_from_dict
from audiophi.training.stages import run_recipe
from modeling_audiophi import AudioPhiForConditionalGeneration
from modeling_audiophi.generation_audiophi import AUDIO_INPUTS

from .conftest import prompts
from .tiny_runs import ALIGN, LM


@pytest.fixture
def trained(settings, speech):
    """run(**keys) -> what decoding.json says, the final model, and the last development scores."""

    def run(**keys):
        data = {"train": [{"path": str(speech)}], "eval": [{"path": str(speech), "limit": 6}]}
        recipe = settings({**ALIGN, "steps": 150, "learning_rate": 1e-2}, LM, data=data, **keys)
        final = run_recipe(recipe_from_dict(recipe))
        told = final.parent / "decoding.json"
        scores = [json.loads(line) for line in (final.parent / "history.jsonl").read_text().splitlines()]
        model = AudioPhiForConditionalGeneration.from_pretrained(final)
        scores = [entry for entry in scores if "wer_align" in entry]
        return json.loads(told.read_text()) if told.exists() else None, model, scores[-1]

    return run


def test_the_best_that_was_tried_is_saved_with_the_model(trained, speech, tmp_path, capsys):
    told, model, scores = trained()
    final = next(tmp_path.rglob("final"))
    assert len(told["tried"]) > 4 and told["clips"] == 4
    alone = told["tried"][0]
    assert ALONE.items() <= alone.items() and alone["error_rate"] == pytest.approx(scores["wer_align"])
    errors = [trial["error_rate"] for trial in told["tried"]]
    assert len(set(errors)) > 1  # or there was nothing to choose
    best = told["tried"][errors.index(min(errors))]
    assert told["chosen"].items() <= best.items() and min(errors) <= alone["error_rate"]
    assert told["chosen"].items() <= model.generation_config.tasks["transcribe"].items()
    assert "on 4 development clips" in capsys.readouterr().out
    assert told["data"] == [{"path": str(speech), "split": None, "clips": 4}]
    card = (final / "README.md").read_text()
    assert f"on 4 development clips (4 of {speech.name}): of {len(errors)} settings" in card
    assert f"word errors there, {min(errors):.2f} %" in card and str(speech.parent) not in card


def test_what_the_recipe_says_is_kept(trained):
    told, model, _ = trained(generation={"transcribe": {"ctc_weight": 0.4, "no_repeat_ngram_size": 3}})
    decoding = model.generation_config.tasks["transcribe"]
    assert (decoding["ctc_weight"], decoding["no_repeat_ngram_size"]) == (0.4, 3)
    assert all("ctc_weight" not in trial and "lm_prior_weight" in trial for trial in told["tried"])


def test_an_llm_that_has_learned_nothing_has_no_say(settings, speech):
    data = {"train": [{"path": str(speech)}], "eval": [{"path": str(speech), "limit": 6}]}
    final = run_recipe(recipe_from_dict(settings(ALIGN, data=data)))
    model = AudioPhiForConditionalGeneration.from_pretrained(final)
    assert ALONE.items() <= model.generation_config.tasks["transcribe"].items()


def test_it_can_be_left_out(trained):
    told, model, _ = trained(evaluation={"clips": 4, "max_new_tokens": 5, "fit_decoding": False})
    assert told is None and "ctc_weight" not in model.generation_config.tasks["transcribe"]


def test_the_alignment_alone_is_written_as_it_is(make_tiny_model, waveform):
    model, processor = make_tiny_model(readout="collapse")
    inputs = prompts(processor, [[waveform(0.9, 1)], [waveform(1.6, 2)]])
    clips = {name: inputs[name] for name in AUDIO_INPUTS if name in inputs}
    audio = model.get_audio_features(**clips, with_alignment=True, return_dict=True)
    heard = model.model.alignment.greedy(audio.align_logits, audio.tokens_mask)
    assert any(heard)
    length, end = inputs["input_ids"].shape[1], processor.tokenizer.eos_token_id
    settings = {"do_sample": False, "ctc_weight": 1.0, "eos_token_id": end, "pad_token_id": end}
    written = model.generate(**inputs, max_new_tokens=50, **settings)
    assert torch.equal(written[:, :length], inputs["input_ids"])
    for row, words in zip(written[:, length:].tolist(), heard, strict=True):
        assert row[: len(words) + 1] == [*words, end] and set(row[len(words) :]) == {end}
    assert model.generate(**inputs, max_new_tokens=2, **settings).shape[1] == length + 2
    # Or a recipe's beams make of it something else than what the alignment's own words are compared with.
    assert torch.equal(model.generate(**inputs, max_new_tokens=50, num_beams=3, **settings), written)
    one = prompts(processor, [[waveform(1.6, 2)]])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**one, max_new_tokens=50, streamer=streamer, **settings)
    assert "".join(streamer) == processor.tokenizer.decode(heard[1], skip_special_tokens=True)
