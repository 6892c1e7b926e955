"""Speculative decoding with the alignment's transcript: the words of greedy decoding, in fewer passes of the LLM."""

import copy

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig, StoppingCriteria, TextIteratorStreamer

from modeling_audiophi.drafting_audiophi import HeardDraft, can_forget
from modeling_audiophi.kv_cache_audiophi import CACHE_NAME
from tests.conftest import message, prompts

# No token twice: a model with random weights would write one of them again and again.
SETTINGS = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "no_repeat_ngram_size": 1}
SETTINGS["task"] = "transcribe"  # whose settings have draft_tokens
WORDS = st.lists(st.integers(10, 14), max_size=8)


def drafted(heard, written, size=4, max_length=100, prompt=(1, 2, 3)):
    draft = HeardDraft(heard, len(prompt), size)
    draft.max_length = max_length
    for length in range(len(written) + 1):  # as the loop asks: after every token
        ids = torch.tensor([[*prompt, *written[:length]]])
        candidates, probabilities = draft.get_candidates(ids)
        assert probabilities is None and torch.equal(candidates[:, : ids.shape[1]], ids)
    return candidates[0, ids.shape[1] :].tolist()


def edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


# ---- the draft


@pytest.mark.parametrize(
    "written, expected",
    [
        ([], [10, 11, 12, 13]),
        ([10, 11], [12, 13, 14, 15]),
        ([10, 99], [12, 13, 14, 15]),  # another word
        ([10, 12], [13, 14, 15]),  # one left out
        ([10, 99, 11], [12, 13, 14, 15]),  # one more
        ([10, 11, 12, 13, 14, 15], []),
        ([10, 11, 12, 13, 14, 15, 16], []),
    ],
)
def test_the_draft_goes_on_where_the_words_are(written, expected):
    assert drafted([10, 11, 12, 13, 14, 15], written) == expected


@given(heard=WORDS, written=WORDS)
@example(heard=[], written=[10])
def test_the_draft_begins_behind_the_most_similar_beginning(heard, written):
    draft = drafted(heard, written, size=len(heard) + 1)
    place = len(heard) - len(draft)
    distances = [edit_distance(written, heard[:j]) for j in range(len(heard) + 1)]
    assert draft == heard[place:] and distances[place] == min(distances)
    assert all(distance > distances[place] for distance in distances[place + 1 :])


@pytest.mark.parametrize("max_length, expected", [(3, 0), (4, 0), (5, 1), (6, 2), (50, 4)])
def test_the_draft_leaves_room_for_the_token_that_follows(max_length, expected):
    assert len(drafted([10, 11, 12, 13, 14], [], max_length=max_length)) == expected


def test_after_a_rejection_less_is_proposed():
    draft = HeardDraft(range(10, 100), 1, 16)
    draft.max_length, ids = 1000, torch.tensor([[1]])
    sizes = []
    for matches in (16, 0, 2, 6, 16):
        sizes.append(draft.get_candidates(ids)[0].shape[1] - ids.shape[1])
        draft.update_candidate_strategy(ids, None, torch.tensor(matches))
    assert sizes == [16, 16, 2, 6, 14]


# ---- generate


@pytest.fixture
def passes():
    """passes(model) -> list that gets an entry per pass of its language model."""
    hooks = []

    def count(model):
        seen = []
        hooks.append(model.model.language_model.register_forward_pre_hook(lambda *_: seen.append(1)))
        return seen

    yield count
    for hook in hooks:
        hook.remove()


def hear(model, monkeypatch, tokens):
    def greedy(self, logits, mask):
        return [list(tokens) if audio else [] for audio in mask.any(1).tolist()]

    monkeypatch.setattr(type(model.model.alignment), "greedy", greedy)


def words_of(output, inputs):
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("readout", ["frames", "collapse", "mixed"])
def test_the_same_words_in_fewer_passes(make_tiny_model, waveform, monkeypatch, passes, readout):
    model, processor = make_tiny_model(readout=readout)
    inputs, seen = prompts(processor, [[waveform(1.2)]]), passes(model)
    plain = model.generate(**inputs, **SETTINGS, draft_tokens=0)
    assert len(seen) == 12
    written = words_of(plain, inputs)
    for heard, most in ((written, 2), ([*written[:5], 9, *written[6:]], 4), ([9, 9, 9], 12), (written[:6], 8)):
        hear(model, monkeypatch, heard)
        seen.clear()
        assert torch.equal(model.generate(**inputs, **SETTINGS), plain)
        assert len(seen) <= most, heard
    # Really heard, whatever that is.
    monkeypatch.undo()
    assert torch.equal(model.generate(**inputs, **SETTINGS), plain)


@pytest.mark.parametrize("prior", [0.0, 0.4])
@pytest.mark.parametrize("readout", ["frames", "collapse"])
def test_joint_decoding_with_a_draft(make_tiny_model, waveform, monkeypatch, passes, readout, prior):
    """The alignment and the LLM without audio score drafted words, also those that are taken back."""
    model, processor = make_tiny_model(readout=readout)
    inputs, seen = prompts(processor, [[waveform(1.2)]]), passes(model)
    joint = {**SETTINGS, "ctc_weight": 0.4, "ctc_temperature": 1.5, "lm_prior_weight": prior}
    plain = model.generate(**inputs, **joint, draft_tokens=0)
    per_word = 2 if prior else 1
    assert len(seen) == 12 * per_word
    assert not torch.equal(plain, model.generate(**inputs, **SETTINGS))
    written = words_of(plain, inputs)
    for heard, most in ((written, 2), ([*written[:5], 9, *written[6:]], 4), ([9, 9, 9], 12), (written[:6], 8),
                        ([*written[:3], *written[4:]], 6)):  # fmt: skip
        hear(model, monkeypatch, heard)
        seen.clear()
        assert torch.equal(model.generate(**inputs, **joint), plain)
        assert len(seen) <= most * per_word, heard
    monkeypatch.undo()
    assert torch.equal(model.generate(**inputs, **joint), plain)


def test_a_whole_transcript_in_one_pass(make_tiny_model, waveform, monkeypatch, passes):
    """Its end is drafted too, and nothing comes behind it."""
    model, processor = make_tiny_model(readout="collapse")
    inputs = prompts(processor, [[waveform(1.2)]])
    written = words_of(model.generate(**inputs, **SETTINGS, draft_tokens=0), inputs)
    end = written[8]
    settings = {**SETTINGS, "max_new_tokens": 30, "min_new_tokens": 0, "eos_token_id": [end]}
    plain = model.generate(**inputs, **settings, draft_tokens=0)
    assert words_of(plain, inputs) == written[:9]
    hear(model, monkeypatch, words_of(plain, inputs)[:-1])
    seen = passes(model)
    assert torch.equal(model.generate(**inputs, **settings, draft_tokens=20), plain) and len(seen) == 1


@pytest.mark.parametrize("heard", [[9, 9], None])
@pytest.mark.parametrize("length", [{"max_new_tokens": 5}, {"max_length": 5}, {"max_new_tokens": 1}])
def test_lengths_are_kept(make_tiny_model, waveform, monkeypatch, heard, length):
    model, processor = make_tiny_model(readout="collapse")
    inputs = prompts(processor, [[waveform(1.2)]])
    if "max_length" in length:
        length = {"max_length": inputs["input_ids"].shape[1] + 5}
    written = words_of(model.generate(**inputs, **SETTINGS, draft_tokens=0), inputs)
    hear(model, monkeypatch, heard or written)
    settings = {**SETTINGS, "max_new_tokens": None, "min_new_tokens": None, **length}
    plain = model.generate(**inputs, **settings, draft_tokens=0)
    assert torch.equal(model.generate(**inputs, **settings), plain)
    assert len(words_of(plain, inputs)) in (1, 5)


def test_a_config_is_left_as_it_was_given(make_tiny_model, waveform, monkeypatch, passes):
    model, processor = make_tiny_model(readout="collapse")
    inputs = prompts(processor, [[waveform(1.2)]])
    plain = model.generate(**inputs, **SETTINGS, draft_tokens=0)
    hear(model, monkeypatch, words_of(plain, inputs))
    config = copy.deepcopy(model.generation_config)
    config.update(**{name: value for name, value in SETTINGS.items() if name != "task"})
    before, own, seen = config.to_dict(), model.generation_config.to_dict(), passes(model)
    assert torch.equal(model.generate(**inputs, generation_config=config, task="transcribe"), plain) and len(seen) < 12
    assert config.to_dict() == before and model.generation_config.to_dict() == own
    config.draft_tokens = 0
    seen.clear()
    assert torch.equal(model.generate(**inputs, generation_config=config, task="transcribe"), plain) and len(seen) == 12


def test_words_come_through_a_streamer(make_tiny_model, waveform, monkeypatch):
    model, processor = make_tiny_model(readout="collapse")
    inputs = prompts(processor, [[waveform(1.2)]])
    plain = model.generate(**inputs, **SETTINGS, draft_tokens=0)
    hear(model, monkeypatch, words_of(plain, inputs))
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    model.generate(**inputs, **SETTINGS, streamer=streamer)
    assert "".join(streamer) == processor.decode(words_of(plain, inputs))


def test_only_what_the_task_drafts_is_drafted(make_tiny_model, waveform, monkeypatch, passes):
    """The alignment says nothing about other answers."""
    model, processor = make_tiny_model(readout="collapse")
    settings = {name: value for name, value in SETTINGS.items() if name != "task"}
    ask = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    words = [("Transcribe the speech", True), ("write down what IS said", True), ("Describe the sound.", False),
             ("Who speaks?", False)]  # fmt: skip
    for text, fewer in words:
        inputs = processor.apply_chat_template([message([waveform(1.2)], text)], **ask)
        plain = model.generate(**inputs, **settings, draft_tokens=0)
        hear(model, monkeypatch, words_of(plain, inputs))
        seen = passes(model)
        assert torch.equal(model.generate(**inputs, **settings), plain) and (len(seen) < 12) == fewer, text
        seen.clear()
        other = {**inputs, "asked": None} if fewer else inputs
        assert torch.equal(model.generate(**other, **settings, task="caption" if fewer else "transcribe"), plain)
        assert (len(seen) < 12) != fewer, text


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "top_k": 1},
        {"num_beams": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"logits_processor": [lambda ids, scores: scores]},
        {"stopping_criteria": [Never()]},
        {"max_time": 1e6},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_no_draft_where_the_words_could_be_others(make_tiny_model, waveform, monkeypatch, settings):
    """Each of these needs every token on its own, or brings drafts of its own."""
    model, processor = make_tiny_model(readout="collapse")
    monkeypatch.setattr(HeardDraft, "__init__", lambda *_: pytest.fail("drafted"))
    inputs = prompts(processor, [[waveform(1.2)]])
    model.generate(**inputs, **{**SETTINGS, **settings})


def test_no_draft_for_several_prompts_nor_without_an_alignment(make_tiny_model, waveform, monkeypatch):
    monkeypatch.setattr(HeardDraft, "__init__", lambda *_: pytest.fail("drafted"))
    model, processor = make_tiny_model(readout="collapse")
    model.generate(**prompts(processor, [[waveform(1.2)], [waveform(0.8)]]), **SETTINGS)
    model, processor = make_tiny_model(readout="frames", align=False)
    model.generate(**prompts(processor, [[waveform(1.2)]]), **SETTINGS)


def test_the_cache_holds_what_was_written_and_nothing_else(make_tiny_model, waveform, monkeypatch, passes):
    model, processor = make_tiny_model(readout="collapse")
    inputs = prompts(processor, [[waveform(1.2)]])
    plain = model.generate(**inputs, **SETTINGS, draft_tokens=0)
    hear(model, monkeypatch, words_of(plain, inputs))
    seen, cache = passes(model), DynamicCache(config=model.config.text_config)
    assert torch.equal(model.generate(**inputs, **SETTINGS, **{CACHE_NAME: cache}), plain) and len(seen) < 12
    # What the LLM rejected or was not asked to read has left nothing behind.
    assert cache.get_seq_length() == len(words_of(plain, inputs)) - 1 + int(
        model.get_audio_features(**{k: inputs[k] for k in ("input_features", "input_features_mask")}).keep.sum()
    ) + int((inputs["input_ids"] != model.config.audio_token_id).sum())


def test_negative_draft_tokens_are_named(make_tiny_model, waveform):
    model, processor = make_tiny_model(readout="collapse")
    with pytest.raises(ValueError, match="draft_tokens=-1"):
        model.generate(**prompts(processor, [[waveform(0.5)]]), draft_tokens=-1)


def test_caches_that_cannot_forget_are_known():
    config = MistralConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=1, vocab_size=20, sliding_window=8)  # fmt: skip
    assert not can_forget(AutoModelForCausalLM.from_config(config).model)
    config.sliding_window = None
    assert can_forget(AutoModelForCausalLM.from_config(config).model)
