"""`generate`: the same alone and in a batch, audio encoded once, beams, turns, lengths."""

import pytest
import torch
from transformers import GenerationConfig

from modeling_audiophi.kv_cache_audiophi import CACHE_NAME
from tests.conftest import prompts

READOUTS = ["frames", "collapse", "mixed"]


@pytest.mark.parametrize("readout", READOUTS)
def test_generation_is_the_same_alone_and_in_a_batch(make_tiny_model, waveform, readout):
    model, processor = make_tiny_model(readout=readout)
    clips = [[waveform(1.4)], [waveform(0.4, 1)], [waveform(0.8, 2), waveform(0.5, 3)], []]
    inputs = prompts(processor, clips)
    length = inputs["input_ids"].shape[1]
    batch = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(batch[:, :length], inputs["input_ids"]) and batch.shape[1] > length
    for row, waves in enumerate(clips):
        single = prompts(processor, [waves])
        alone = model.generate(**single, max_new_tokens=8, do_sample=False)[0, single["input_ids"].shape[1] :]
        words = batch[row, length:]
        assert torch.equal(words[: len(alone)], alone)
        assert (words[len(alone) :] == model.generation_config.pad_token_id).all()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("readout", READOUTS)
def test_audio_is_encoded_once_per_generation(make_tiny_model, waveform, readout, use_cache):
    model, processor = make_tiny_model(readout=readout)
    calls = []
    hook = model.model.audio_tower.register_forward_hook(lambda *_: calls.append(1))
    inputs = prompts(processor, [[waveform(0.7)], [waveform(0.5, 1)]])
    out = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use_cache)
    hook.remove()
    assert len(calls) == 1 and out.shape[1] == inputs["input_ids"].shape[1] + 6
    other = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=not use_cache)
    assert torch.equal(out, other)


@pytest.mark.parametrize("readout", READOUTS)
def test_audio_that_was_encoded_already(make_tiny_model, waveform, monkeypatch, readout):
    """In its place `audio_features`, also without the alignment's scores where these are wanted."""
    model, processor = make_tiny_model(readout=readout)
    inputs = prompts(processor, [[waveform(0.7), waveform(0.5, 1)], []])
    settings = {"max_new_tokens": 5, "do_sample": False, "ctc_weight": 0.5, "num_beams": 2}
    expected = model.generate(**inputs, **settings)
    audio = {name: inputs.pop(name) for name in [*inputs] if name.startswith(("input_f", "audio_"))}
    for with_alignment in (True, False):
        features = model.get_audio_features(**audio, with_alignment=with_alignment)
        with monkeypatch.context() as patch:
            patch.setattr(type(model.model.audio_tower), "forward", lambda *_: pytest.fail("encoded again"))
            assert torch.equal(model.generate(**inputs, **settings, audio_features=features), expected)
    with pytest.raises(ValueError, match="not both"):
        model.generate(**inputs, **audio, audio_features=features)


@pytest.mark.parametrize("readout", READOUTS)
def test_generate_continues_what_forward_predicts(make_tiny_model, waveform, readout):
    model, processor = make_tiny_model(readout=readout)
    inputs = prompts(processor, [[waveform(0.9)], [waveform(0.6, 1)]])
    words = model.generate(**inputs, max_new_tokens=1, do_sample=False)[:, -1]
    with torch.no_grad():
        assert torch.equal(words, model(**inputs).logits[:, -1].argmax(-1))


@pytest.mark.parametrize("readout", READOUTS)
def test_beams_and_several_sequences_with_several_clips(make_tiny_model, waveform, readout):
    model, processor = make_tiny_model(readout=readout)
    clips = [[waveform(0.9), waveform(0.4, 1)], [waveform(0.5, 2)]]
    inputs = prompts(processor, clips)
    length = inputs["input_ids"].shape[1]
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    out = model.generate(**inputs, **settings, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(out.sequences[:, :length], inputs["input_ids"].repeat_interleave(2, 0))
    for row, waves in enumerate(clips):
        single = prompts(processor, [waves])
        alone = model.generate(**single, **settings)[:, single["input_ids"].shape[1] :]
        assert torch.equal(out.sequences[2 * row : 2 * row + 2, length : length + alone.shape[1]], alone)
    # The best token only, three times: what greedy decoding gives.
    settings = {"max_new_tokens": 5, "min_new_tokens": 5}
    greedy = model.generate(**inputs, **settings, do_sample=False)
    sampled = model.generate(**inputs, **settings, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(sampled, greedy.repeat_interleave(3, 0))


@pytest.mark.parametrize("as_config", [False, True])
def test_max_length_counts_the_prompt_as_given(make_tiny_model, waveform, as_config):
    model, processor = make_tiny_model(readout="collapse")
    inputs = prompts(processor, [[waveform(1.0)]])
    total = inputs["input_ids"].shape[1] + 4
    settings = {"max_length": total, "min_length": total, "do_sample": False}
    if as_config:
        config = GenerationConfig(**settings, pad_token_id=model.generation_config.pad_token_id)
        out = model.generate(**inputs, generation_config=config)
        assert config.max_length == total
    else:
        out = model.generate(**inputs, **settings)
    assert out.shape[1] == total


@pytest.mark.parametrize("readout", READOUTS)
def test_second_turn_on_a_cache_equals_one_without(make_tiny_model, waveform, readout):
    """The cache of the first turn holds its audio: only the new clip's tokens go in."""
    model, processor = make_tiny_model(readout=readout)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    first, second = prompts(processor, [[waveform(0.7)]]), prompts(processor, [[waveform(0.5, 1)]])
    turn = model.generate(**first, **settings, return_dict_in_generate=True)
    text = torch.cat([turn.sequences, second["input_ids"]], dim=1)
    both = prompts(processor, [[waveform(0.7), waveform(0.5, 1)]])
    inputs = {**both, "input_ids": text, "attention_mask": torch.ones_like(text)}
    expected = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, **settings, **{CACHE_NAME: turn[CACHE_NAME]}), expected)
