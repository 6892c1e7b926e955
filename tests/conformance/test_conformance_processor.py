"""What transformers' processor tests (tests/test_processing_common.py) ask of a processor with audio."""

import json

import numpy as np
import pytest
import soundfile as sf
import torch
from transformers import AutoProcessor

from processing import AudioPhiProcessor
from tests.conformance.cases import ENCODERS, LLMS
from tests.conftest import message

PROCESSORS = [f"{encoder}-{llm}" for encoder in ENCODERS for llm in LLMS]
RATE = 16_000


@pytest.fixture(params=PROCESSORS)
def processor(request, build):
    return build(f"{request.param}-frames")[1]


def encode(processor, conversations, **kwargs):
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, add_generation_prompt=True, **kwargs
    )


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---- saving and loading


def test_saved_and_loaded(processor, waveform, tmp_path):
    files = processor.save_pretrained(tmp_path)
    own = {key: value for key, value in processor.to_dict().items() if key != "auto_map"}  # says only where code lies
    json.loads((tmp_path / "processor_config.json").read_text())
    assert files and (tmp_path / "chat_template.jinja").is_file()
    clip = waveform(0.6)
    for loaded in (AudioPhiProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is AudioPhiProcessor and loaded.to_dict() == own
        assert loaded.chat_template == processor.chat_template and loaded.audio_token_id == processor.audio_token_id
        assert repr(loaded.feature_extractor) == repr(processor.feature_extractor)
        assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
        assert same(encode(loaded, [message([clip])]), encode(processor, [message([clip])]))
    changed = AudioPhiProcessor.from_pretrained(tmp_path, window_frames=50)
    assert changed.window_frames == 50 != processor.window_frames


def test_as_json(processor):
    told = json.loads(processor.to_json_string())
    assert told["processor_class"] == "AudioPhiProcessor"
    for name in ("audio_token", "window_frames", "shortest_frames"):
        assert told[name] == getattr(processor, name)


# ---- chat templates


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("kind", ["array", "path"])
def test_chat_template_with_audio(processor, waveform, tmp_path, batch_size, kind):
    clips = [waveform(0.6 + 0.4 * number, number) for number in range(batch_size)]
    conversations = []
    for number, clip in enumerate(clips):
        item = {"type": "audio", "audio": clip, "sampling_rate": RATE}
        if kind == "path":
            sf.write(tmp_path / f"{number}.wav", clip, RATE, subtype="FLOAT")
            item = {"type": "audio", "path": str(tmp_path / f"{number}.wav")}
        conversations.append([{"role": "user", "content": [item, {"type": "text", "text": "Write."}]}])
    texts = processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    assert len(texts) == batch_size and all(text.count(processor.audio_token) == 1 for text in texts)
    ids_only = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    inputs = encode(processor, conversations, return_tensors="pt")
    assert torch.equal(torch.as_tensor(ids_only), inputs["input_ids"])
    key = processor.feature_key
    assert len(inputs["input_ids"]) == len(inputs["attention_mask"]) == len(inputs[key]) == batch_size
    assert (inputs["input_ids"] == processor.audio_token_id).sum(1).tolist() == [1] * batch_size
    called = processor(text=texts, audio=clips, sampling_rate=RATE)
    assert called.keys() == inputs.keys() - {"asked"}
    assert torch.equal(called["input_ids"], inputs["input_ids"]) and torch.allclose(called[key], inputs[key], atol=1e-3)


def test_one_conversation_is_a_batch_of_one(processor, waveform):
    clip = waveform(0.6)
    assert same(encode(processor, message([clip])), encode(processor, [message([clip])]))
    assert isinstance(processor.apply_chat_template(message([clip]), tokenize=False), str)


def test_several_clips_and_turns_and_a_begun_answer(processor, waveform):
    turns = [
        *message([waveform(0.5), waveform(0.7, 1)]),
        {"role": "assistant", "content": [{"type": "text", "text": "the quick fox"}]},
        *message([waveform(0.4, 2)]),
    ]
    inputs = encode(processor, [turns])
    assert int((inputs["input_ids"] == processor.audio_token_id).sum()) == 3
    assert inputs["audio_num_windows"].tolist() == [1, 1, 1]
    begun = [*turns, {"role": "assistant", "content": [{"type": "text", "text": "it was"}]}]
    text = processor.apply_chat_template(begun, tokenize=False, continue_final_message=True)
    assert text.endswith("it was") and text.count(processor.audio_token) == 3


# ---- arguments


def test_names_of_what_comes_out(processor, waveform):
    inputs = encode(processor, [message([waveform(0.5)])])
    assert set(inputs) == set(processor.model_input_names)
    assert processor.model_input_names[0] == "input_ids" and processor.audio_token_ids == [processor.audio_token_id]


def test_arguments_reach_the_tokenizer(processor, waveform):
    clips = [waveform(0.5), waveform(0.9, 1)]
    text = [f"{processor.audio_token} write", f"{processor.audio_token} write it down"]
    flat = processor(text=text, audio=clips, sampling_rate=RATE, padding="max_length", max_length=76)
    nested = processor(
        text=text, audio=clips, sampling_rate=RATE, text_kwargs={"padding": "max_length", "max_length": 76}
    )
    assert flat["input_ids"].shape == (2, 76) and same(flat, nested)
    right = processor(text=text, audio=clips, sampling_rate=RATE, padding_side="right")
    assert right["attention_mask"][:, 0].all() and not right["attention_mask"][0, -1]
    with pytest.raises(ValueError, match="padding"):
        processor(text=text, audio=clips, sampling_rate=RATE, padding=True, text_kwargs={"padding": "max_length"})


def test_the_tokenizers_own_settings_hold(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    tokenizer = type(processor.tokenizer).from_pretrained(tmp_path, padding="max_length", max_length=61)
    other = AudioPhiProcessor.from_pretrained(tmp_path)
    other.tokenizer = tokenizer
    assert other(text="write")["input_ids"].shape == (1, 61)
    assert other(text="write", padding=True)["input_ids"].shape[1] < 61


def test_where_the_placeholders_went(processor, waveform):
    clips = [waveform(0.5), waveform(0.7, 1)]
    text = f"a {processor.audio_token} b {processor.audio_token}"
    inputs = processor(
        text=text, audio=clips, sampling_rate=RATE, return_text_replacement_offsets=True, return_mm_token_type_ids=True
    )
    (places,) = inputs["text_replacement_offsets"]
    assert [place["type"] for place in places] == ["audio", "audio"]
    assert [place["replacement"] for place in places] == [processor.audio_token] * 2
    is_audio = torch.as_tensor(inputs["mm_token_type_ids"]) != 0
    assert torch.equal(is_audio, inputs["input_ids"] == processor.audio_token_id)


def test_decoding_is_the_tokenizers(processor):
    ids = processor(text=["the quick fox", "the bear"])["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["the quick fox", "the bear"]
    assert processor.decode(ids[0]) == processor.tokenizer.decode(ids[0])


def test_clips_of_any_dtype_and_container(processor, waveform):
    clip = waveform(0.5)
    expected = processor(text=processor.audio_token, audio=clip, sampling_rate=RATE)
    for other in (
        [clip],
        (clip, RATE),
        (RATE, clip),
        [(RATE, clip)],
        clip.astype(np.float64),
        torch.from_numpy(clip),
        clip.tolist(),
    ):
        got = processor(text=processor.audio_token, audio=other, sampling_rate=RATE)
        assert got.keys() == expected.keys() and torch.equal(got["input_ids"], expected["input_ids"])
        assert torch.allclose(got[processor.feature_key], expected[processor.feature_key], atol=1e-5)
