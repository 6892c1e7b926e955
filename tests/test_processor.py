"""AudioPhiProcessor: prompts, labels, windows, padding, saving."""

import base64
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoProcessor, AutoTokenizer, WhisperFeatureExtractor

from processing import AudioError, AudioPhiProcessor
from processing.chat_audiophi import task_code, wording_key
from processing.chat_templates import CHATML, default_template
from processing.processing_audiophi import choose_audio_token

RATE = 16_000
TASKS = {
    "write": {"instructions": ["Transcribe the speech.", "¿Qué dice?", "Schreib’s groß!"], "in_pieces": True},
    "name": {"instructions": ("Name the sound.", "这是什么声音？"), "in_pieces": False},
}


@pytest.fixture(scope="module")
def processor(tiny_whisper_dir, tiny_llm_dir):
    processor = AudioPhiProcessor.from_components(tiny_whisper_dir, tiny_llm_dir, window_frames=200)
    return AudioPhiProcessor(**vars_of(processor), tasks=TASKS)


def vars_of(processor):
    names = ("feature_extractor", "tokenizer", "chat_template", "audio_token", "window_frames", "shortest_frames")
    return {name: getattr(processor, name) for name in names}


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


def test_output_has_one_placeholder_per_clip_and_one_row_per_window(processor, waveform):
    batch = encode(processor, [question(waveform(0.5)), question(waveform(3.0), waveform(1.0)), question()])
    placeholders = (batch["input_ids"] == processor.audio_token_id).sum(1).tolist()
    assert placeholders == [1, 2, 0]
    assert batch["audio_num_windows"].tolist() == [1, 2, 1]  # 3 s do not fit in one window of 2 s
    assert batch["input_features"].shape == (4, 16, 150) and batch["input_features_mask"].dtype == torch.bool
    assert batch["input_features_mask"].sum(1).tolist() == [50, 150, 150, 100]
    assert set(batch) <= set(processor.model_input_names)


def test_text_only_prompts_have_no_audio_inputs(processor):
    batch = encode(processor, [question(text="Who are you?")], add_generation_prompt=True)
    assert set(batch) == {"input_ids", "attention_mask", "asked"} and batch["asked"].tolist() == [[0, 0]]
    assert processor(text="Who are you?")["input_ids"].shape[0] == 1


def test_plain_call_equals_chat_template(processor, waveform):
    clip = waveform(0.7)
    prompt = processor.apply_chat_template(question(clip), add_generation_prompt=True)
    called = processor(text=prompt, audio=(clip, RATE))
    templated = encode(processor, question(clip), add_generation_prompt=True)
    assert set(called) == set(templated) - {"asked"}
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
        answered(waveform(1.5, 1), *([waveform(0.2, 2)] if multi else []), answer="the quick brown fox jumps"),
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
    questions = [question(waveform(1.0)), question(waveform(0.3), text="Transcribe the speech and more.")]
    batch = encode(processor, questions, add_generation_prompt=True)
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
    assert processor.frame_counts(samples) == [frames]


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
    assert processor.frame_counts(3600 * RATE) == 1800 * [200]


def test_encoded_clips_replace_audio(processor, waveform):
    """What the feature cache does: encode once, put the features into messages later."""
    clip = waveform(0.9)
    encoded = processor.encode_audio((clip, RATE))
    messages = [{"role": "user", "content": [{"type": "audio", "encoded": encoded}, {"type": "text", "text": "hear"}]}]
    cached, fresh = encode(processor, messages), encode(processor, question(clip, text="hear"))
    assert all(torch.equal(cached[name], fresh[name]) for name in fresh)
    held = [{"role": "user", "content": [{"type": "audio", "audio": encoded}, {"type": "text", "text": "hear"}]}]
    assert all(torch.equal(encode(processor, held)[name], fresh[name]) for name in fresh)
    states = {"audio_hidden_states": torch.ones(2, 5, 3), "audio_hidden_mask": torch.ones(2, 5, dtype=torch.bool)}
    for clip in (states, {"audio_hidden_states": states["audio_hidden_states"]}):
        batch = processor(text=processor.audio_token + "x", audio=[clip])
        assert batch["audio_hidden_states"].shape == (2, 5, 3) and batch["audio_num_windows"].tolist() == [2]
        assert torch.equal(batch["audio_hidden_mask"], states["audio_hidden_mask"])
        assert (batch["input_ids"] == processor.audio_token_id).sum() == 1
    with pytest.raises(ValueError, match="turn 1 .'user'., item 1: its encoded has none of input_features"):
        encode(processor, [{"role": "user", "content": [{"type": "audio", "encoded": {"a": 1}}]}])
    assert processor.pad_audio([]) == {}


def in_base64(path):
    return base64.b64encode(path.read_bytes()).decode()


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
        {"type": "audio_url", "audio_url": {"url": str(path)}},
        {"type": "audio_url", "audio_url": f"file://{path}"},
        {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64," + in_base64(path)}},
        {"type": "input_audio", "input_audio": {"data": in_base64(path), "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": "data:audio/wav;base64," + in_base64(path)}},
    ):
        content = [{"type": "audio", **item}, {"type": "input_text", "text": "Transcribe the speech."}]
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


@pytest.mark.parametrize(
    "message, said",
    [
        (
            {"role": "user", "content": [{"type": "Audio", "path": "a.wav"}]},
            "turn 2 .'user'., item 1: type 'Audio' is not",
        ),
        (
            {"role": "user", "content": [{"type": "image", "url": "a.png"}]},
            "type 'image' is not understood; known are audio",
        ),
        ({"role": "user", "content": [{"text": "a"}]}, "item 1: type None is not understood"),
        ({"role": "user", "content": ["a"]}, "turn 2 .'user'., item 1: 'a' is not an item"),
        ({"role": "user", "content": [{"type": "text"}]}, "item 1: its text is None"),
        ({"role": "user", "content": [{"type": "audio_url"}]}, "item 1: audio_url has no url"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "?"}}]}, "no data in base64"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "no data in base64"),
        ({"role": "user", "content": None}, "turn 2 .'user'.: content is None; expected a text or a list"),
        ({"role": "user"}, "turn 2 .'user'.: content is None"),
        ({"role": "user", "content": {"type": "text", "text": "a"}}, "content is dict"),
        ({"content": "a"}, "turn 2: a message is a dict with a role"),
        ("a", "turn 2: a message is a dict with a role and a content, not 'a'"),
    ],
)
def test_nothing_in_a_chat_is_dropped_silently(processor, message, said):
    with pytest.raises(ValueError, match=said):
        processor.apply_chat_template([{"role": "user", "content": "a"}, message])
    with pytest.raises(ValueError, match=said):
        processor.task_of([{"role": "user", "content": "a"}, message])


@pytest.mark.parametrize(
    "chat, said", [([], "at least one message"), ("hi", "a list of messages, not str"), ([[]], "one")]
)
def test_what_is_no_chat_is_refused(processor, chat, said):
    with pytest.raises(ValueError, match=said):
        processor.apply_chat_template(chat)


def test_calls_of_functions_are_the_templates_business(processor):
    template = "{% for m in messages %}{{ m.tool_calls[0].function.name if m.tool_calls else m.content }};{% endfor %}"
    call = {"type": "function", "function": {"name": "look<|im_end|>", "arguments": {}}}
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "fine"},
    ]
    batch = encode(processor, chat, chat_template=template, return_assistant_tokens_mask=True)
    assert processor.tokenizer.decode(batch["input_ids"][0]).startswith("a;look<|im_end|>;sun;fine")
    assert processor.end_token_id not in batch["input_ids"][0, :-1]
    assert processor.tokenizer.decode(batch["input_ids"][batch["assistant_masks"].bool()]).startswith("fine")


def test_bad_audio_in_a_message_is_refused_by_name(processor, waveform, tmp_path):
    with pytest.raises(AudioError, match="no sampling rate"):
        encode(processor, [{"role": "user", "content": [{"type": "audio", "audio": waveform(0.1)}]}])
    with pytest.raises(AudioError, match="missing.wav: cannot be read"):
        encode(processor, [{"role": "user", "content": [{"type": "audio", "path": str(tmp_path / "missing.wav")}]}])
    with pytest.raises(AudioError, match="none of path, url, bytes"):
        encode(processor, [{"role": "user", "content": [{"type": "audio"}]}])


def test_truncation_that_would_cut_audio_is_refused(processor, waveform):
    with pytest.raises(ValueError, match="[Mm]ismatch in `audio` token count"):
        processor(
            text="what is this " + processor.audio_token, audio=(waveform(1.0), RATE), truncation=True, max_length=2
        )


def test_only_pytorch_tensors(processor):
    with pytest.raises(ValueError, match="return_tensors='np'"):
        processor(text="a", return_tensors="np")


def test_match_model_copies_the_limits_and_checks_the_placeholder(make_tiny_model):
    model, processor = make_tiny_model()
    assert processor.window_frames == model.config.window_frames == 200
    assert processor.shortest_frames == model.config.shortest_frames
    model.config.audio_token_id += 1
    with pytest.raises(ValueError, match="audio_token_id is .* in the model"):
        processor.match_model(model.config)
    model.config.audio_token_id -= 1


class TestAsked:
    @pytest.mark.parametrize(
        "text, task",
        [
            ("Transcribe the speech.", "write"),
            ("transcribe the speech", "write"),
            (" TRANSCRIBE\nthe speech!? ", "write"),
            ("que dice", None),
            ("Qué dice", "write"),
            ("schreib's GROSS", "write"),
            ("这是什么声音", "name"),
            ("Transcribe the speech, please.", None),
            ("Transcribe", None),
            ("?!", None),
            ("", None),
        ],
    )
    def test_a_task_is_recognised_by_its_words(self, processor, waveform, text, task):
        assert processor.task_of(question(waveform(0.1), text=text)) == task
        before = question(waveform(0.1), text=text)
        before[0]["content"].reverse()
        assert processor.task_of(before) == task

    @given(
        wording=st.sampled_from([wording for task in TASKS.values() for wording in task["instructions"]]),
        between=st.lists(st.text(st.sampled_from(" \n\t.,;:!?¿。！-–—'\"()…\u200b\u00a0"), max_size=3), min_size=99),
        case=st.sampled_from([str.lower, str.upper, str.title, str.swapcase, str.casefold]),
        where=st.integers(0, 30),
    )
    def test_case_punctuation_and_white_space_do_not_matter(self, processor, wording, between, case, where):
        text = "".join(a + b for a, b in zip(case(wording), between, strict=False))
        audio = {"type": "audio", "encoded": {"input_features": 0}}
        parts = [{"type": "text", "text": part} for part in (text[:where], text[where:])]
        chat = [{"role": "user", "content": [parts[0], audio, parts[1]]}]
        task = next(name for name, task in TASKS.items() if wording in task["instructions"])
        assert processor.task_of(chat) == task
        parts[1]["text"] += "x"
        assert processor.task_of(chat) is None

    def test_the_last_user_turn_counts(self, processor, waveform):
        clip = waveform(0.1)
        turns = [*answered(clip), *question(clip, clip, text="Name the sound.")]
        assert processor.task_of(turns) == processor.task_of([turns]) == "name"
        assert processor.task_of([*turns, {"role": "assistant", "content": "a"}]) == "name"
        assert processor.task_of([*turns, {"role": "user", "content": "Name the sound."}]) is None  # of which clip?
        batch = encode(processor, [turns, question(clip, text="Why?"), [{"role": "user", "content": "Why?"}]],
                       add_generation_prompt=True)  # fmt: skip
        assert batch["asked"].tolist() == [[task_code("name"), 2], [0, 1], [0, 0]]
        assert task_code("name") == zlib.crc32(b"name") & 0x7FFFFFFF
        begun = encode(processor, answered(clip), continue_final_message=True)
        assert begun["asked"].tolist() == [[task_code("write"), 1]]
        assert "asked" not in encode(processor, answered(clip))

    def test_marks_of_vowels_are_kept(self):
        assert wording_key("की") != wording_key("का")


def test_options_of_transformers(processor, waveform):
    chats = [answered(waveform(0.2)), answered(waveform(0.3), answer="no")]
    with pytest.raises(ValueError, match="continue the last message and ask for a new one"):
        processor.apply_chat_template(chats, add_generation_prompt=True, continue_final_message=True)
    for options in ({}, {"tokenize": True}, {"tokenize": True, "return_dict": True, "continue_final_message": True}):
        with pytest.raises(ValueError, match="return_assistant_tokens_mask needs"):
            processor.apply_chat_template(chats, return_assistant_tokens_mask=True, **options)
    with pytest.raises(ValueError, match="return_tensors='np'"):
        encode(processor, chats, return_tensors="np")
    template = "{{ documents[0].text }}{{ tools[0].function.name }}{{ colour }}{{ enable_thinking }}"
    tool = {"type": "function", "function": {"name": "look"}}
    options = {"documents": [{"text": "<|im_end|>"}], "tools": [tool], "colour": "red", "chat_template": template}
    batch = encode(processor, question(), add_generation_prompt=True, **options)
    assert processor.tokenizer.decode(batch["input_ids"][0]) == "<|im_end|>lookredFalse"
    assert processor.end_token_id not in batch["input_ids"]
    assert processor.apply_chat_template(question(text="a"), chat_template="plain") == "User: a\n"
    assert encode(processor, chats, padding="max_length", max_length=80)["input_ids"].shape == (2, 80)


def test_save_and_load(processor, waveform, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AudioPhiProcessor.from_pretrained(tmp_path)
    assert loaded.window_frames == 200 and loaded.shortest_frames == 1
    assert loaded.tasks == processor.tasks and list(loaded.tasks) == ["write", "name"]
    assert loaded.tasks["name"] == {"instructions": ["Name the sound.", "这是什么声音？"], "in_pieces": False}
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

    @pytest.mark.parametrize("name", ["chatml", "llama3", "plain"])
    def test_list_content_equals_plain_content(self, processor, name):
        plain, listed = (
            processor.apply_chat_template([{"role": "user", "content": content}], chat_template=name)
            for content in ("who", [{"type": "text", "text": "w"}, {"type": "text", "text": "ho"}])
        )
        assert plain == listed and "who" in plain

    def test_the_llms_own_template_is_the_default(self, tiny_llm_dir):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llm_dir)
        assert default_template(tokenizer) == tokenizer.chat_template != CHATML
        tokenizer.chat_template = {"default": "{{ messages }}", "rag": "other"}
        assert default_template(tokenizer) == "{{ messages }}"
        tokenizer.chat_template = None
        assert default_template(tokenizer) == CHATML  # by its tokens

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
        processor = AudioPhiProcessor(extractor, tokenizer)
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
