"""The engine through which everybody asks a model."""

import pytest
import torch
from transformers import GenerationConfig, Lfm2Config, Lfm2ForCausalLM

from modeling_audiophi.engine_audiophi import MAX_NEW_TOKENS, Answer, Engine
from tests.conftest import message, random_like_trained, tiny_tokenizer

SHORT = {"max_new_tokens": 6, "do_sample": False}
READOUTS = ["frames", "collapse", "mixed"]
TRANSCRIBE = "Transcribe the speech."


@pytest.fixture
def build(make_tiny_model):
    def make(**arguments):
        model, processor = make_tiny_model(**arguments)
        decoding = {"ctc_weight": 0.5, "num_beams": 2, "no_repeat_ngram_size": 2, "max_new_tokens": 9}
        model.generation_config.tasks["transcribe"] = decoding
        return model, processor, Engine(model, processor)

    return make


@pytest.mark.parametrize("readout", READOUTS)
def test_batches_of_anything_equal_single_prompts(build, waveform, readout):
    """Text alone, one clip, two clips, two turns; with what the alignment hears in each."""
    _, _, engine = build(readout=readout)
    turns = [*message([waveform(0.5)], "What?"), {"role": "assistant", "content": "words"}, *message([waveform(0.3)])]
    chats = [message([]), message([waveform(0.9)]), message([waveform(0.4, 1), waveform(0.7, 2)]), turns]
    for settings in (SHORT, {**SHORT, "num_beams": 2}, {**SHORT, "task": "transcribe"}):
        together = engine(chats, with_alignment=True, **settings)
        assert [len(answer.heard) for answer in together] == [0, 1, 2, 2]
        for chat, answer in zip(chats, together, strict=True):
            assert engine([chat], with_alignment=True, **settings) == [answer]
    texts = engine([message([]), message([], "the quick")], with_alignment=True, **SHORT)
    assert [answer.heard for answer in texts] == [[], []] and engine([message([])], **SHORT)[0].heard is None


@pytest.mark.parametrize("readout", READOUTS)
def test_the_encoder_runs_once_for_both_readings(build, waveform, monkeypatch, readout):
    model, processor, engine = build(readout=readout)
    calls, encode = [], type(model.model.audio_tower).forward
    monkeypatch.setattr(type(model.model.audio_tower), "forward", lambda *args: calls.append(1) or encode(*args))
    chats = [message([waveform(0.9)], TRANSCRIBE), message([waveform(0.5, 1)], TRANSCRIBE)]
    both = engine(chats, with_alignment=True)
    assert len(calls) == 1
    calls.clear()
    assert [answer.texts for answer in engine(chats)] == [answer.texts for answer in both] and len(calls) == 1
    calls.clear()
    heard = engine(chats, with_alignment=True, with_lm=False)
    assert heard == [Answer([], None, answer.heard) for answer in both] and len(calls) == 1
    encoded = [processor.encode_audio(wave, 16_000) for wave in (waveform(0.9), waveform(0.5, 1))]
    prompts = [
        [{"role": "user", "content": [{"type": "audio", "encoded": clip}, {"type": "text", "text": TRANSCRIBE}]}]
        for clip in encoded
    ]
    assert engine(prompts, with_alignment=True) == both


def test_settings_are_the_calls_then_the_configs_then_the_tasks(build):
    model, processor, engine = build()

    def config(*args, **settings):
        return engine.arguments(*args, **settings)["generation_config"]

    plain, transcript = config(), config("transcribe")
    assert (plain.ctc_weight, plain.num_beams, plain.max_new_tokens) == (0.0, None, MAX_NEW_TOKENS)
    assert (transcript.ctc_weight, transcript.num_beams, transcript.max_new_tokens) == (0.5, 2, 9)
    assert processor.end_token_id in plain.eos_token_id and model.generation_config.num_beams is None
    changed = config("transcribe", num_beams=4, ctc_weight=0.0, max_length=50)
    assert (changed.num_beams, changed.ctc_weight, changed.max_length, changed.max_new_tokens) == (4, 0.0, 50, None)
    given = GenerationConfig(num_beams=3)
    mixed = config("transcribe", generation_config=given)
    assert (mixed.num_beams, mixed.no_repeat_ngram_size) == (3, 2) and given.no_repeat_ngram_size is None
    assert config("transcribe", streamer=object()).num_beams == 1
    assert config("transcribe", streamer=object(), num_beams=2).num_beams == 2
    assert config(eos_token_id=7).eos_token_id == [7]
    del model.generation_config.tasks["caption"]
    assert config("caption").num_beams is None  # decoded plainly
    for wrong in ({"max_new_token": 3}, {"_from_model_config": True}):
        with pytest.raises(TypeError, match=f"setting {next(iter(wrong))!r}"):
            config(**wrong)
    with pytest.raises(ValueError, match="unknown task 'translate'"):
        config("translate")
    with pytest.raises(ValueError, match="ctc_weight=2"):
        config(ctc_weight=2)


def test_answers_say_how_they_ended(build, waveform):
    model, processor, engine = build()
    chat = message([waveform(0.8)])
    (whole,) = engine([chat], **SHORT)
    assert len(whole.texts) == 1 and whole.stopped is False
    first = processor.tokenizer.encode(whole.texts[0])[0]
    model.train()
    (ended,) = engine([chat], **SHORT, eos_token_id=first)
    assert ended == Answer([""], True) and model.training
    model.eval()
    assert len(engine([chat], **SHORT, num_beams=3, num_return_sequences=3)[0].texts) == 3
    begun = [*chat, {"role": "assistant", "content": "the quick "}]
    (answer,) = engine([begun], continued=True, **SHORT)
    assert answer.texts and answer != whole


def test_no_alignment_is_said(build, waveform):
    _, _, engine = build(align=False)
    with pytest.raises(ValueError, match="alignment head"):
        engine([message([waveform(0.4)])], with_alignment=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(build, waveform, dtype):
    model, _, engine = build(readout="mixed")
    model.to(dtype)
    chats = [message([waveform(0.9)], TRANSCRIBE), message([waveform(0.5, 1)], TRANSCRIBE)]
    assert all(answer.texts and answer.heard for answer in engine(chats, with_alignment=True))


@pytest.mark.parametrize("beams", [1, 2])
def test_a_hybrid_language_model_has_a_prior_too(make_tiny_model, waveform, tmp_path, beams):
    """Convolutions and attention: its cache is not one of keys and values alone."""
    tokenizer = tiny_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Lfm2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], max_position_embeddings=512, **special,
    )  # fmt: skip
    random_like_trained(Lfm2ForCausalLM(config)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, processor = make_tiny_model(readout="collapse", text=str(tmp_path))
    settings = {**SHORT, "ctc_weight": 0.4, "lm_prior_weight": 0.3, "draft_tokens": 4, "num_beams": beams}
    chats = [message([waveform(0.9)]), message([waveform(0.5, 1)])]
    engine = Engine(model, processor)
    assert engine(chats[:1], **settings) == engine(chats[:1], **settings, use_cache=False)
    assert len(engine(chats, **settings)) == 2
