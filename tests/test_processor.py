"""AudioPhiProcessor: prompts, labels, windows, padding, saving."""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, WhisperFeatureExtractor

from processing import AudioError, AudioPhiProcessor
from processing.chat_templates import CHATML, LLAMA3, PLAIN, training_template
from processing.processing_audiophi import choose_audio_token

RATE = 16_000
WHISPER_RULE = [[3, 1, 2, 1], [3, 2, 2, 1], [4, 4, 3, 1]]


@pytest.fixture(scope="module")
def processor(tiny_whisper_dir, tiny_llm_dir):
    return AudioPhiProcessor.from_components(
        tiny_whisper_dir, tiny_llm_dir, audio_length_rule=WHISPER_RULE, window_frames=200
    )


def question(*clips, text="Transcribe the speech."):
    items = [{"type": "audio", "audio": clip, "sampling_rate": RATE} for clip in clips]
    return [{"role": "user", "content": [*items, {"type": "text", "text": text}]}]


def answered(*clips, answer="the quick fox"):
    return [*question(*clips), {"role": "assistant", "content": answer}]


def encode(processor, conversations, **kwargs):
    processor_kwargs = kwargs.pop("processor_kwargs", {})
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, processor_kwargs=processor_kwargs, **kwargs
    )


def test_output_has_one_placeholder_per_audio_token_and_one_row_per_window(processor, waveform):
    batch = encode(processor, [question(waveform(0.5)), question(waveform(3.0), waveform(1.0)), question()])
    placeholders = (batch["input_ids"] == processor.audio_token_id).sum(1).tolist()
    assert placeholders == [7, 19 + 19 + 13, 0]  # 12.5 tokens/s, every window rounded up
    assert batch["audio_num_windows"].tolist() == [1, 2, 1]  # 3 s do not fit in one window of 2 s
    assert batch["input_features"].shape == (4, 16, 150) and batch["input_features_mask"].dtype == torch.bool
    assert batch["input_features_mask"].sum(1).tolist() == [50, 150, 150, 100]
    assert set(batch) <= set(processor.model_input_names)


def test_text_only_prompts_have_no_audio_inputs(processor):
    batch = encode(processor, [question(text="Who are you?")], add_generation_prompt=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert processor(text="Who are you?")["input_ids"].shape[0] == 1


def test_plain_call_equals_chat_template(processor, waveform):
    clip = waveform(0.7)
    prompt = processor.apply_chat_template(question(clip), add_generation_prompt=True)
    called = processor(text=prompt, audio=(clip, RATE))
    templated = encode(processor, question(clip), add_generation_prompt=True)
    assert set(called) == set(templated)
    assert all(torch.equal(called[name], templated[name]) for name in called)
    assert torch.equal(processor(text=prompt, audio=clip, sampling_rate=RATE)["input_ids"], called["input_ids"])


def test_input_rates_are_resampled(processor, waveform):
    slow = waveform(1.0)[::2]
    batch = processor(text=processor.audio_token, audio=[(slow, 8000)])
    assert batch["input_features_mask"].sum() == 100


def test_labels_are_the_answer_and_the_end_token(processor, waveform):
    batch = encode(
        processor, [answered(waveform(1.0)), answered(waveform(0.3), answer="no")], return_assistant_tokens_mask=True
    )
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for ids, mask, answer in zip(
        batch["input_ids"], batch["assistant_masks"].bool(), ["the quick fox", "no"], strict=True
    ):
        labels = ids[mask].tolist()
        assert labels == [*processor.tokenizer(answer)["input_ids"], end]
    assert processor.end_token_id == end


def test_training_text_continues_the_generation_prompt(processor, waveform):
    clip = waveform(0.4)
    prompt = encode(processor, question(clip), add_generation_prompt=True)["input_ids"][0]
    training = encode(processor, answered(clip))["input_ids"][0]
    assert torch.equal(training[: len(prompt)], prompt)


@pytest.mark.parametrize("multi", [False, True])
def test_left_and_right_padding_hold_the_same_content(processor, waveform, multi):
    conversations = [
        answered(waveform(0.3)),
        answered(waveform(1.5, 1), *([waveform(0.2, 2)] if multi else []), answer="no"),
    ]
    sides = {
        side: encode(
            processor, conversations, return_assistant_tokens_mask=True, processor_kwargs={"padding_side": side}
        )
        for side in ("left", "right")
    }
    left, right = sides["left"], sides["right"]
    assert left["attention_mask"][0, 0] == 0 and right["attention_mask"][0, -1] == 0
    for row in range(2):
        for name in ("input_ids", "assistant_masks"):
            values = [batch[name][row][batch["attention_mask"][row].bool()] for batch in (left, right)]
            assert torch.equal(*values)
    for batch in sides.values():
        assert not (batch["assistant_masks"].bool() & ~batch["attention_mask"].bool()).any()
    assert torch.equal(left["input_features"], right["input_features"])


def test_generation_pads_left_by_default(processor, waveform):
    batch = encode(processor, [question(waveform(0.3)), question(waveform(1.0))], add_generation_prompt=True)
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][:, -1].all()


def test_features_do_not_depend_on_the_batch(processor, waveform):
    short, long = waveform(0.5), 3 * waveform(1.9, 1)
    alone = processor(text=processor.audio_token, audio=(short, RATE))
    together = processor(text=[processor.audio_token] * 2, audio=[(short, RATE), (long, RATE)])
    frames = together["input_features_mask"][0]
    assert torch.equal(together["input_features"][0][:, frames], alone["input_features"][0])
    assert (together["input_features"][0][:, ~frames] == 0).all()


def test_whisper_features_equal_the_padded_ones_where_there_is_audio(processor, waveform):
    """The loudest frame sets the floor of the log-mel spectrogram, so 30 s of padding do not change the others."""
    clip = waveform(1.0)
    padded = WhisperFeatureExtractor(feature_size=16)(clip, sampling_rate=RATE, return_tensors="pt")["input_features"][
        0
    ]
    ours = processor.encode_audio((clip, RATE))["input_features"][0]
    assert ours.shape == (16, 100)
    # The last two frames see the clip's edge: mirrored here, zeros there.
    torch.testing.assert_close(ours[:, :98], padded[:, :98], atol=1e-4, rtol=0)


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 319, 320, 321, 31_999, 32_000])
def test_frames_are_rounded_up_to_even(processor, samples):
    encoded = processor.encode_audio((np.full(samples, 0.1, dtype=np.float32), RATE))
    frames = max(2, int(np.ceil(samples / 320)) * 2)
    assert encoded["input_features"].shape == (1, 16, frames)
    assert encoded["num_audio_tokens"] == processor.num_audio_tokens(samples) == int(np.ceil(frames / 2 / 4))


def test_long_audio_is_cut_in_windows_of_equal_length(processor, waveform):
    clip = waveform(1.0)
    hour = np.tile(clip, 90)
    encoded = processor.encode_audio((hour, RATE))
    assert encoded["input_features"].shape == (45, 16, 200)
    one_more = processor.encode_audio((np.concatenate([hour, clip[:320]]), RATE))
    lengths = one_more["input_features_mask"].sum(1)
    assert len(lengths) == 46 and lengths.sum() == 9002 and lengths.max() <= 200
    # Windows are consecutive: the second one alone gives the same features.
    window = np.concatenate([hour, clip[:320]])[lengths[0] * 160 : (lengths[0] + lengths[1]) * 160]
    torch.testing.assert_close(
        one_more["input_features"][1][:, : lengths[1]], processor.encode_audio((window, RATE))["input_features"][0]
    )
    assert processor.num_audio_tokens(3600 * RATE) == 1800 * 25


def test_encoded_clips_replace_audio(processor, waveform):
    """What the feature cache does: encode once, put the features into messages later."""
    clip = waveform(0.9)
    encoded = processor.encode_audio((clip, RATE))
    messages = [{"role": "user", "content": [{"type": "audio", "encoded": encoded}, {"type": "text", "text": "hear"}]}]
    cached, fresh = encode(processor, messages), encode(processor, question(clip, text="hear"))
    assert all(torch.equal(cached[name], fresh[name]) for name in fresh)
    states = {"audio_hidden_states": torch.ones(2, 5, 3), "audio_hidden_mask": torch.ones(2, 5), "num_audio_tokens": 4}
    batch = processor(text=processor.audio_token + "x", audio=[states])
    assert batch["audio_hidden_states"].shape == (2, 5, 3) and batch["audio_num_windows"].tolist() == [2]
    assert (batch["input_ids"] == processor.audio_token_id).sum() == 4


def test_every_message_form_of_audio(processor, waveform, tmp_path):
    import soundfile

    clip = waveform(0.5)
    path = tmp_path / "clip.wav"
    soundfile.write(path, clip, RATE, subtype="FLOAT")
    reference = encode(processor, question(clip))
    for item in (
        {"path": str(path)},
        {"url": str(path)},
        {"audio": str(path)},
        {"audio": (clip, RATE)},
        {"audio": {"array": clip, "sampling_rate": RATE}},
        {"audio": {"path": None, "bytes": path.read_bytes()}},
        {"array": clip, "sampling_rate": RATE},
        {"bytes": path.read_bytes()},
    ):
        content = [{"type": "audio", **item}, {"type": "text", "text": "Transcribe the speech."}]
        batch = encode(processor, [{"role": "user", "content": content}])
        assert torch.equal(batch["input_ids"], reference["input_ids"]), item
        torch.testing.assert_close(batch["input_features"], reference["input_features"], atol=1e-5, rtol=0)


def test_placeholder_and_clip_counts_must_agree(processor, waveform):
    clip = (waveform(0.2), RATE)
    token = processor.audio_token
    with pytest.raises(ValueError, match="2 .* tokens and 1 audio"):
        processor(text=token * 2, audio=clip)
    with pytest.raises(ValueError, match="1 .* tokens and 2 audio"):
        processor(text=token, audio=[clip, clip])
    with pytest.raises(ValueError, match="1 .* tokens in the text but no audio"):
        processor(text=token)


def test_bad_audio_in_a_message_is_refused_by_name(processor, waveform, tmp_path):
    with pytest.raises(AudioError, match="no sampling rate"):
        encode(processor, [{"role": "user", "content": [{"type": "audio", "audio": waveform(0.1)}]}])
    with pytest.raises(AudioError, match="missing.wav: cannot be read"):
        encode(processor, [{"role": "user", "content": [{"type": "audio", "path": str(tmp_path / "missing.wav")}]}])
    with pytest.raises(AudioError, match="none of path, url, bytes"):
        encode(processor, [{"role": "user", "content": [{"type": "audio"}]}])


def test_truncation_that_would_cut_audio_is_refused(processor, waveform):
    with pytest.raises(ValueError, match="[Mm]ismatch in `audio` token count"):
        processor(text=processor.audio_token, audio=(waveform(1.0), RATE), truncation=True, max_length=5)


def test_only_pytorch_tensors(processor):
    with pytest.raises(ValueError, match="return_tensors='np'"):
        processor(text="a", return_tensors="np")


def test_without_the_models_length_rule_audio_is_refused(tiny_whisper_dir, tiny_llm_dir, waveform):
    fresh = AudioPhiProcessor.from_components(tiny_whisper_dir, tiny_llm_dir)
    with pytest.raises(ValueError, match="match_model"):
        fresh(text=fresh.audio_token, audio=(waveform(0.2), RATE))


def test_match_model_copies_the_rule_and_checks_the_placeholder(make_tiny_model):
    model, processor = make_tiny_model()
    assert processor.audio_length_rule == model.config.audio_length_rule
    assert processor.window_frames == model.config.window_frames == 200
    model.config.audio_token_id += 1
    with pytest.raises(ValueError, match="audio_token_id is .* in the model"):
        processor.match_model(model.config)
    model.config.audio_token_id -= 1


def test_save_and_load(processor, waveform, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AudioPhiProcessor.from_pretrained(tmp_path)
    assert loaded.audio_length_rule == WHISPER_RULE and loaded.window_frames == 200
    assert loaded.chat_template == processor.chat_template and loaded.tokenizer.padding_side == "left"
    conversations = [answered(waveform(0.3)), answered(waveform(2.5))]
    before, after = (encode(p, conversations, return_assistant_tokens_mask=True) for p in (processor, loaded))
    assert all(torch.equal(before[name], after[name]) for name in before)


class TestChatTemplates:
    OWN = (  # SmolLM2-135M-Instruct's own template
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )

    @pytest.mark.parametrize("add_generation_prompt", [False, True])
    def test_chatml_writes_what_the_llms_own_template_writes(self, tiny_llm_dir, add_generation_prompt):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llm_dir)
        messages = [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "who are you"},
            {"role": "assistant", "content": "a fox"},
            {"role": "user", "content": "and who"},
        ]
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        assert tokenizer.apply_chat_template(
            messages, chat_template=CHATML, **options
        ) == tokenizer.apply_chat_template(messages, chat_template=self.OWN, **options)

    def test_list_content_equals_plain_content(self, tiny_llm_dir):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llm_dir)
        for template in (CHATML, LLAMA3, PLAIN):
            plain, listed = (
                tokenizer.apply_chat_template([{"role": "user", "content": c}], chat_template=template, tokenize=False)
                for c in ("who", [{"type": "text", "text": "who"}])
            )
            assert plain == listed and "who" in plain

    def test_template_is_chosen_by_the_chat_format(self, tiny_llm_dir):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llm_dir)
        assert training_template(tokenizer) == CHATML
        assert "<pad>" in training_template(tokenizer, "<pad>") and "<|audio|>" not in training_template(
            tokenizer, "<pad>"
        )
        tokenizer.chat_template = "{{ messages }} in a format of its own"
        with pytest.raises(ValueError, match="chat format is not known"):
            training_template(tokenizer)
        tokenizer.chat_template = own = "<|audio|>{% generation %}{% endgeneration %}"
        assert training_template(tokenizer) == own

    def test_base_models_get_a_plain_template_with_the_end_token_in_the_labels(self, tiny_whisper_dir, waveform):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|audio|>"]})
        extractor = WhisperFeatureExtractor.from_pretrained(tiny_whisper_dir)
        processor = AudioPhiProcessor(extractor, tokenizer, audio_length_rule=WHISPER_RULE)
        for answer in ("fox", " fox"):
            batch = encode(processor, answered(waveform(0.2), answer=answer), return_assistant_tokens_mask=True)
            labels = batch["input_ids"][batch["assistant_masks"].bool()]
            assert tokenizer.decode(labels) == " fox</s>"
            assert labels[-1] == tokenizer.eos_token_id == processor.end_token_id
        prompt = encode(processor, question(waveform(0.2)), add_generation_prompt=True)["input_ids"][0]
        assert torch.equal(batch["input_ids"][0][: len(prompt)], prompt)


class TestAudioToken:
    def test_a_free_embedding_row_is_used_first(self, tiny_llm_dir):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llm_dir)
        assert choose_audio_token(tokenizer, len(tokenizer) + 1) == "<|audio|>"

    def test_then_a_reserved_token(self, tiny_llm_dir, processor):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llm_dir)
        assert choose_audio_token(tokenizer, len(tokenizer)) == "<reponame>" == processor.audio_token
        assert processor.audio_token_id < len(tokenizer)

    def test_then_a_new_row(self):
        class NoReserve:
            def get_vocab(self):
                return {"a": 0}

            def __len__(self):
                return 1

        assert choose_audio_token(NoReserve(), 1) == "<|audio|>"

    def test_unknown_placeholder_is_refused(self, tiny_whisper_dir, tiny_llm_dir):
        extractor = WhisperFeatureExtractor.from_pretrained(tiny_whisper_dir)
        with pytest.raises(ValueError, match="<|nowhere|>"):
            AudioPhiProcessor(extractor, AutoTokenizer.from_pretrained(tiny_llm_dir), audio_token="<|nowhere|>")


def test_auto_processor_finds_it(processor, tmp_path):
    import modeling_audiophi  # noqa: F401  (registers)

    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is AudioPhiProcessor
